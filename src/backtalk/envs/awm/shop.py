"""Generates tasks for the shop scenario from seeds: other products, prices, orders and coupons, and a task about them.

The program is the one in the files (``assets/awm/shop``); the rows of its database are drawn here, so that training
sees other shops than the held-out measurement. Tasks 0 to 9 of the files are the ten kinds of task in the shop of
seed 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from backtalk.envs.awm.files import ScenarioTask
from backtalk.messages import ToolCall

TASK_COUNT = 4000  # tasks of "awm:shop", one in five held out
FIRST_SEED = 1  # seed 0 is the shop of the files

CATEGORIES = {f"{noun}s": noun for noun in ("bag", "chair", "clock", "kettle", "lamp", "mug")}
ADJECTIVES = (
    "amber black blue bronze cedar copper cotton cream crimson green grey ivory jade leather linen marble navy oak "
    "olive pearl pine red rose silver slate steel teal velvet white willow"
).split()
STATUSES = ("open", "shipped", "delivered", "cancelled")
REASONS = ("broken", "wrong", "late", "unwanted")
STOCKS = (0, 6, 7, 8, 9)  # none, or enough for every task
CODES = "APRIL BASIL CLOUD DAISY EMBER FROST GRAPE HAZEL".split()
INSTRUCTIONS = {  # of each kind of task; one of the texts is drawn
    "price": ("What does the {} cost?", "What is the price of the {}?", "How much is the {}?"),
    "status": ("What is the status of order {}?", "How is order {} doing? Answer with its status."),
    "total": ("What does my cart come to?", "What is the total of my cart?"),
    "add": ("Put {} of the {} into my cart.", "I want {} of the {} in my cart."),
    "cheapest": (
        "Put {} of the cheapest of the {} in stock into my cart.",
        "I want {} of the cheapest of the {} in my cart; it has to be in stock.",
    ),
    "best_under": (
        "Put {} of the best rated of the {} in stock up to {} into my cart.",
        "Add {} of the best rated of the {} in stock up to {} to my cart.",
    ),
    "remove": ("Take the {} out of my cart.", "I do not want the {} in my cart after all."),
    "cancel": ("Cancel the {} of my open orders.", "Of my open orders, cancel the {} one."),
    "buy": (
        "Put {} of the {} into my cart and order all of it with the coupon {}.",
        "Add {} of the {} to my cart, then check out with coupon {}.",
    ),
    "return": (
        "Send back the {} of order {}, the reason is {}.",
        "The {} of order {} has to go back, give {} as the reason.",
    ),
}
KINDS = tuple(INSTRUCTIONS)


class Product(NamedTuple):
    """A row of products; the price is a whole number."""

    id: int
    name: str
    category: str
    price: int
    rating: float
    stock: int


class Order(NamedTuple):
    """An order and its items."""

    id: int
    status: str
    total: int
    items: tuple[tuple[int, int, int], ...]  # product id, quantity, price


@dataclass(frozen=True, slots=True)
class Shop:
    """The contents of a shop when a rollout begins."""

    products: tuple[Product, ...]
    cart: dict[int, int]  # quantity by product id
    coupons: dict[str, tuple[int, bool]]  # percent off, and whether it is active
    orders: tuple[Order, ...]

    def product(self, product_id: int) -> Product:
        """Return the product with an id."""
        return next(product for product in self.products if product.id == product_id)

    def inserts(self) -> tuple[str, ...]:
        """Return the SQL that fills an empty database with this shop."""
        rows: list[tuple[str, Sequence[object]]] = [("products", product) for product in self.products]
        rows += [("cart_items", item) for item in self.cart.items()]
        rows += [("coupons", (code, percent, int(active), 0)) for code, (percent, active) in self.coupons.items()]
        rows += [("orders", (order.id, order.status, None, order.total)) for order in self.orders]
        rows += [("order_items", (order.id, *item)) for order in self.orders for item in order.items]
        return tuple(insert_statement(table, values) for table, values in rows)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a task asks for: the calls that do it, the SQL of what they change, and the answer to give to done."""

    kind: str
    values: tuple[object, ...]  # that the instruction names
    calls: tuple[ToolCall, ...]
    changes: tuple[str, ...] = ()
    answer: str | None = None
    choices: tuple[str, ...] = ()  # words that the answer is one of; empty for a number

    @property
    def solution(self) -> tuple[ToolCall, ...]:
        """Return the calls, ``done`` with the answer among them."""
        return (*self.calls, ToolCall("done", {"answer": self.answer or ""}))


def make_shop(seed: int) -> Shop:
    """Draw four products of each category, six orders, three coupons and two products in the cart."""
    random = Random(f"shop/{seed}")
    ids = iter(random.sample(range(11, 100), 4 * len(CATEGORIES)))
    products = []
    for category, noun in CATEGORIES.items():
        prices, ratings = random.sample(range(8, 90), 4), random.sample(range(20, 50), 4)
        for adjective, price, rating in zip(random.sample(ADJECTIVES, 4), prices, ratings, strict=True):
            name = f"{adjective} {noun}"
            products.append(Product(next(ids), name, category, price, rating / 10, random.choice(STOCKS)))
    numbers = sorted(random.sample(range(201, 260), 6))
    statuses = random.sample(("open", "open", "delivered", "delivered", "shipped", "cancelled"), 6)
    orders = []
    for number, status in zip(numbers, statuses, strict=True):
        bought = [(p.id, random.randint(1, 3), p.price) for p in random.sample(products, 2)]
        orders.append(Order(number, status, sum(count * price for _, count, price in bought), tuple(sorted(bought))))
    percents, active = random.sample((5, 10, 15, 20, 25), 3), random.sample((True, True, False), 3)
    coupons = {code: (p, a) for code, p, a in zip(random.sample(CODES, 3), percents, active, strict=True)}
    in_stock = [product.id for product in products if product.stock]
    cart = {number: random.randint(1, 3) for number in random.sample(in_stock, 2)}
    return Shop(tuple(sorted(products)), cart, coupons, tuple(orders))


def generate_task(seed: int, kind: str | None = None) -> tuple[ScenarioTask, Plan]:
    """Return the task of a seed as the scenario runs it, and its solution. Kinds alternate unless one is given.

    The task has no sql verifier of its own: the one in the files suits every task of the shop.
    """
    shop, kind = make_shop(seed), kind or KINDS[seed % len(KINDS)]
    random = Random(f"shop/{kind}/{seed}")
    plan = _draw_plan(kind, shop, random)
    instruction = random.choice(INSTRUCTIONS[kind]).format(*plan.values)
    task = ScenarioTask(
        instruction=instruction,
        task_idx=KINDS.index(kind),
        inserts=shop.inserts(),
        verifiers={"code": code_verifier(plan.changes, plan.answer, plan.choices)},
    )
    return task, plan


def _draw_plan(kind: str, shop: Shop, random: Random) -> Plan:
    in_stock = [product for product in shop.products if product.stock]
    match kind:
        case "price":
            product = random.choice(shop.products)
            return Plan(kind, (product.name,), (_search(name=product.name),), answer=str(product.price))
        case "status":
            order = random.choice(shop.orders)
            calls = (ToolCall("get_order", {"order_id": order.id}),)
            return Plan(kind, (order.id,), calls, answer=order.status, choices=STATUSES)
        case "total":
            total = sum(count * shop.product(number).price for number, count in shop.cart.items())
            return Plan(kind, (), (ToolCall("view_cart", {}),), answer=str(total))
        case "add":
            product, count = random.choice(in_stock), random.randint(1, 3)
            return _plan_to_add(kind, (count, product.name), _search(name=product.name), product, count)
        case "cheapest":
            category, count = random.choice(in_stock).category, random.randint(1, 3)
            product = min((p for p in in_stock if p.category == category), key=lambda p: p.price)
            search = _search(category=category, sort_by="price")
            return _plan_to_add(kind, (count, category), search, product, count)
        case "best_under":
            (_, _, category, price, *_), count = random.choice(in_stock), random.randint(1, 3)
            limit = price + random.randint(0, 9)
            offered = [p for p in in_stock if p.category == category and p.price <= limit]
            product = max(offered, key=lambda p: p.rating)
            search = _search(category=category, max_price=limit, sort_by="rating")
            return _plan_to_add(kind, (count, category, limit), search, product, count)
        case "remove":
            product = shop.product(random.choice(list(shop.cart)))
            calls = (ToolCall("view_cart", {}), ToolCall("remove_from_cart", {"product_id": product.id}))
            return Plan(kind, (product.name,), calls, (f"DELETE FROM cart_items WHERE product_id = {product.id}",))
        case "cancel":
            age, place = random.choice((("newest", -1), ("oldest", 0)))
            order = [order for order in shop.orders if order.status == "open"][place]
            calls = (ToolCall("list_orders", {"status": "open"}), ToolCall("cancel_order", {"order_id": order.id}))
            return Plan(kind, (age,), calls, (f"UPDATE orders SET status = 'cancelled' WHERE id = {order.id}",))
        case "buy":
            product, count = random.choice(in_stock), random.randint(1, 3)
            return _plan_to_buy(shop, product, count, random.choice([c for c, (_, on) in shop.coupons.items() if on]))
        case "return":
            order = random.choice([order for order in shop.orders if order.status == "delivered"])
            product, reason = shop.product(random.choice(order.items)[0]), random.choice(REASONS)
            item = {"order_id": order.id, "product_id": product.id, "reason": reason}
            calls = (ToolCall("get_order", {"order_id": order.id}), ToolCall("return_item", item))
            changes = (insert_statement("returns", tuple(item.values())),)
            return Plan(kind, (product.name, order.id, reason), calls, changes)
    raise ValueError(f"there is no kind of task {kind!r}; use one of {', '.join(KINDS)}")


def _plan_to_add(kind: str, values: tuple[object, ...], search: ToolCall, product: Product, count: int) -> Plan:
    insert = insert_statement("cart_items", (product.id, count))
    change = f"{insert} ON CONFLICT (product_id) DO UPDATE SET quantity = quantity + {count}"
    add = ToolCall("add_to_cart", {"product_id": product.id, "quantity": count})
    return Plan(kind, values, (search, add), (change,))


def _plan_to_buy(shop: Shop, product: Product, count: int, code: str) -> Plan:
    values = (count, product.name, code)
    calls = _plan_to_add("buy", values, _search(name=product.name), product, count).calls
    calls += (ToolCall("apply_coupon", {"code": code}), ToolCall("checkout", {}))
    cart = shop.cart | {product.id: count + shop.cart.get(product.id, 0)}
    items = [(product_id, held, shop.product(product_id).price) for product_id, held in cart.items()]
    total = sum(held * price for _, held, price in items) * (100 - shop.coupons[code][0]) // 100
    order_id = max(order.id for order in shop.orders) + 1
    changes = [insert_statement("orders", (order_id, "open", code, total)), "DELETE FROM cart_items"]
    for product_id, held, price in items:
        changes.append(insert_statement("order_items", (order_id, product_id, held, price)))
        changes.append(f"UPDATE products SET stock = stock - {held} WHERE id = {product_id}")
    return Plan("buy", values, calls, tuple(changes))


def _search(**arguments: object) -> ToolCall:
    return ToolCall("search_products", arguments)


def insert_statement(table: str, values: Sequence[object]) -> str:
    """Return the SQL that inserts one row; None is NULL."""
    literals = ("NULL" if v is None else f"'{v}'" if isinstance(v, str) else str(v) for v in values)
    return f"INSERT INTO {table} VALUES ({', '.join(literals)})"


_CODE_VERIFIER = """\
def verify_task_completion(initial_db_path: str, final_db_path: str, final_answer: str | None = None) -> dict:
    import re
    import sqlite3

    CHANGES = {changes}
    ANSWER = {answer!r}
    AMONG = {choices}

    def contents(path, changes=()):
        stored, database = sqlite3.connect(f"file:{{path}}?mode=ro", uri=True), sqlite3.connect(":memory:")
        stored.backup(database)
        stored.close()
        for statement in changes:
            database.execute(statement)
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = {{name: sorted(map(repr, database.execute(f'SELECT * FROM "{{name}}"'))) for name in tables}}
        database.close()
        return rows

    done = contents(initial_db_path, CHANGES) == contents(final_db_path)
    said = (final_answer or "").lower()
    if ANSWER is None:
        right = True
    elif ANSWER.isdigit():
        right = set(re.findall(r"[0-9]+(?:[.][0-9]+)?", said)) == {{ANSWER}}
    else:
        right = set(re.findall("[a-z]+", said)) & set(AMONG) == {{ANSWER}}
    return {{"result": "complete" if done and right else "others"}}
"""


def code_verifier(changes: Sequence[str] = (), answer: str | None = None, choices: Sequence[str] = ()) -> str:
    """Return the source of a verifier: the database must be the first one after ``changes`` (SQL), the answer right.

    A number must be the only number in the agent's answer, a word the only one of ``choices``; None accepts any answer.
    """
    return _CODE_VERIFIER.format(changes=repr(list(changes)), answer=answer, choices=repr(list(choices)))
