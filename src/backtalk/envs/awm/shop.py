"""The shop, filled from a seed: other products, prices, orders and coupons for each, and a task about them.

The program is the one in the files (``assets/awm/shop``); what it sells is drawn here, so that training sees other
shops than the held-out measurement. Task 0 to 9 of the files are the ten kinds of task in the shop of seed 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from backtalk.envs.awm.checks import SQL_VERIFIER, code_verifier
from backtalk.envs.awm.files import Contents
from backtalk.messages import ToolCall

TASK_COUNT = 4000  # of the generated tasks "awm:shop" offers, one in five held out
SEEDS_FROM = 1  # seed 0 is the shop of the files

DESCRIPTION = "You shop online for a customer. Call one tool at a time, and call done when the task is done."
SCHEMA = (
    "CREATE TABLE products (id INTEGER PRIMARY KEY, name TEXT NOT NULL, category TEXT NOT NULL, "
    "price INTEGER NOT NULL, rating REAL NOT NULL, stock INTEGER NOT NULL)",
    "CREATE TABLE cart_items (product_id INTEGER PRIMARY KEY, quantity INTEGER NOT NULL)",
    "CREATE TABLE coupons (code TEXT PRIMARY KEY, percent INTEGER NOT NULL, active INTEGER NOT NULL, "
    "in_cart INTEGER NOT NULL DEFAULT 0)",
    "CREATE TABLE orders (id INTEGER PRIMARY KEY, status TEXT NOT NULL, coupon TEXT, total INTEGER NOT NULL)",
    "CREATE TABLE order_items (order_id INTEGER NOT NULL, product_id INTEGER NOT NULL, quantity INTEGER NOT NULL, "
    "price INTEGER NOT NULL)",
    "CREATE TABLE returns (order_id INTEGER NOT NULL, product_id INTEGER NOT NULL, reason TEXT NOT NULL)",
)
CATEGORIES = {
    "bags": "bag",
    "chairs": "chair",
    "clocks": "clock",
    "kettles": "kettle",
    "lamps": "lamp",
    "mugs": "mug",
}
KINDS_OF_THINGS = (
    "amber black blue bronze cedar copper cotton cream crimson green grey ivory jade leather linen marble navy oak "
    "olive pearl pine red rose silver slate steel teal velvet white willow"
).split()
STATUSES = ("open", "shipped", "delivered", "cancelled")
REASONS = ("broken", "wrong", "late", "unwanted")
STOCKS = (0, 6, 7, 8, 9)  # enough for what any task wants, or none
CODES = "APRIL BASIL CLOUD DAISY EMBER FROST GRAPE HAZEL".split()


class Product(NamedTuple):
    id: int
    name: str
    category: str
    price: int
    rating: float
    stock: int


class Order(NamedTuple):
    id: int
    status: str
    total: int
    items: tuple[tuple[int, int, int], ...]  # product id, quantity, price


@dataclass(frozen=True, slots=True)
class Shop:
    """What a shop holds when an episode begins. Prices are whole numbers."""

    products: tuple[Product, ...]
    cart: dict[int, int]  # quantity by product id
    coupons: dict[str, tuple[int, bool]]  # percent off, and whether it is active
    orders: tuple[Order, ...]

    def named(self, product_id: int) -> Product:
        return next(product for product in self.products if product.id == product_id)

    def inserts(self) -> tuple[str, ...]:
        sold = [line for order in self.orders for line in ((order.id, *item) for item in order.items)]
        coupons = [(code, percent, int(active), 0) for code, (percent, active) in self.coupons.items()]
        orders = [(order.id, order.status, None, order.total) for order in self.orders]
        return (
            *(_insert("products", product) for product in self.products),
            *(_insert("cart_items", item) for item in self.cart.items()),
            *(_insert("coupons", coupon) for coupon in coupons),
            *(_insert("orders", order) for order in orders),
            *(_insert("order_items", line) for line in sold),
        )


@dataclass(frozen=True, slots=True)
class ShopTask:
    """A task, the calls that do it, and what they change. The last call is ``done``, with the answer."""

    kind: str
    text: str
    calls: tuple[ToolCall, ...]
    changes: tuple[str, ...] = ()
    answer: str | None = None
    among: tuple[str, ...] = ()

    @property
    def solution(self) -> tuple[ToolCall, ...]:
        return (*self.calls, ToolCall("done", {"answer": self.answer or ""}))


def make_shop(seed: int) -> Shop:
    """Four products of each category, six orders, three coupons, two things in the cart."""
    random = Random(f"shop/{seed}")
    ids = iter(random.sample(range(11, 100), 4 * len(CATEGORIES)))
    products = []
    for category, thing in CATEGORIES.items():
        prices, ratings = random.sample(range(8, 90), 4), random.sample(range(20, 50), 4)
        for adjective, price, rating in zip(random.sample(KINDS_OF_THINGS, 4), prices, ratings, strict=True):
            name = f"{adjective} {thing}"
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


def shop_task(shop: Shop, kind: str, seed: int) -> ShopTask:
    """A task of one kind about a shop."""
    return TASKS[kind](shop, Random(f"shop/{kind}/{seed}"))


def shop_contents(seed: int, kind: str | None = None) -> tuple[Contents, ShopTask]:
    """The shop and the task of a seed. Seeds go through the kinds in turn unless one is named."""
    shop, kind = make_shop(seed), kind or KINDS[seed % len(KINDS)]
    task = shop_task(shop, kind, seed)
    verifiers = {"code": code_verifier(task.changes, task.answer, task.among), "sql": SQL_VERIFIER}
    contents = Contents(task=task.text, task_idx=KINDS.index(kind), inserts=shop.inserts(), verifiers=verifiers)
    return contents, task


def _price(shop: Shop, random: Random) -> ShopTask:
    product = random.choice(shop.products)
    text = random.choice(("What does the {} cost?", "What is the price of the {}?", "How much is the {}?"))
    look = ToolCall("search_products", {"name": product.name})
    return ShopTask("price", text.format(product.name), (look,), answer=str(product.price))


def _status(shop: Shop, random: Random) -> ShopTask:
    order = random.choice(shop.orders)
    text = random.choice(("What is the status of order {}?", "How is order {} doing? Answer with its status."))
    look = ToolCall("get_order", {"order_id": order.id})
    return ShopTask("status", text.format(order.id), (look,), answer=order.status, among=STATUSES)


def _total(shop: Shop, random: Random) -> ShopTask:
    text = random.choice(("What does my cart come to?", "What is the total of my cart?"))
    total = sum(count * shop.named(number).price for number, count in shop.cart.items())
    return ShopTask("total", text, (ToolCall("view_cart", {}),), answer=str(total))


def _add(shop: Shop, random: Random) -> ShopTask:
    product, count = random.choice(_in_stock(shop.products)), random.randint(1, 3)
    text = random.choice(("Put {} of the {} into my cart.", "I want {} of the {} in my cart."))
    calls = (ToolCall("search_products", {"name": product.name}), _adding(product, count))
    return ShopTask("add", text.format(count, product.name), calls, (_into_cart(product, count),))


def _cheapest(shop: Shop, random: Random) -> ShopTask:
    category, count = random.choice(_in_stock(shop.products)).category, random.randint(1, 3)
    product = min((p for p in _in_stock(shop.products) if p.category == category), key=lambda p: p.price)
    text = random.choice(
        (
            "Put {} of the cheapest of the {} in stock into my cart.",
            "I want {} of the cheapest of the {} in my cart; it has to be in stock.",
        )
    )
    calls = (ToolCall("search_products", {"category": category, "sort_by": "price"}), _adding(product, count))
    return ShopTask("cheapest", text.format(count, category), calls, (_into_cart(product, count),))


def _best_under(shop: Shop, random: Random) -> ShopTask:
    some, count = random.choice(_in_stock(shop.products)), random.randint(1, 3)
    limit = some.price + random.randint(0, 9)
    offered = [p for p in _in_stock(shop.products) if p.category == some.category and p.price <= limit]
    best = max(offered, key=lambda p: p.rating)
    text = random.choice(
        (
            "Put {} of the best rated of the {} in stock up to {} into my cart.",
            "Add {} of the best rated of the {} in stock up to {} to my cart.",
        )
    )
    look = {"category": best.category, "max_price": limit, "sort_by": "rating"}
    calls = (ToolCall("search_products", look), _adding(best, count))
    return ShopTask("best_under", text.format(count, best.category, limit), calls, (_into_cart(best, count),))


def _remove(shop: Shop, random: Random) -> ShopTask:
    product = shop.named(random.choice(list(shop.cart)))
    text = random.choice(("Take the {} out of my cart.", "I do not want the {} in my cart after all."))
    calls = (ToolCall("view_cart", {}), ToolCall("remove_from_cart", {"product_id": product.id}))
    gone = f"DELETE FROM cart_items WHERE product_id = {product.id}"
    return ShopTask("remove", text.format(product.name), calls, (gone,))


def _cancel(shop: Shop, random: Random) -> ShopTask:
    which, place = random.choice((("newest", -1), ("oldest", 0)))
    order = [order for order in shop.orders if order.status == "open"][place]
    text = random.choice(("Cancel the {} of my open orders.", "Of my open orders, cancel the {} one."))
    calls = (ToolCall("list_orders", {"status": "open"}), ToolCall("cancel_order", {"order_id": order.id}))
    changed = f"UPDATE orders SET status = 'cancelled' WHERE id = {order.id}"
    return ShopTask("cancel", text.format(which), calls, (changed,))


def _buy(shop: Shop, random: Random) -> ShopTask:
    product, count = random.choice(_in_stock(shop.products)), random.randint(1, 3)
    code = random.choice([code for code, (_, active) in shop.coupons.items() if active])
    text = random.choice(
        (
            "Put {} of the {} into my cart and order all of it with the coupon {}.",
            "Add {} of the {} to my cart, then check out with coupon {}.",
        )
    )
    calls = (
        ToolCall("search_products", {"name": product.name}),
        _adding(product, count),
        ToolCall("apply_coupon", {"code": code}),
        ToolCall("checkout", {}),
    )
    cart = shop.cart | {product.id: count + shop.cart.get(product.id, 0)}
    bought = [(number, held, shop.named(number).price) for number, held in cart.items()]
    total = sum(held * price for _, held, price in bought) * (100 - shop.coupons[code][0]) // 100
    number = max(order.id for order in shop.orders) + 1
    changes = [_insert("orders", (number, "open", code, total)), "DELETE FROM cart_items"]
    for item, held, price in bought:
        changes.append(_insert("order_items", (number, item, held, price)))
        changes.append(f"UPDATE products SET stock = stock - {held} WHERE id = {item}")
    return ShopTask("buy", text.format(count, product.name, code), calls, tuple(changes))


def _return(shop: Shop, random: Random) -> ShopTask:
    order = random.choice([order for order in shop.orders if order.status == "delivered"])
    product, reason = shop.named(random.choice(order.items)[0]), random.choice(REASONS)
    text = random.choice(
        ("Send back the {} of order {}, the reason is {}.", "The {} of order {} has to go back, give {} as the reason.")
    )
    sent = {"order_id": order.id, "product_id": product.id, "reason": reason}
    calls = (ToolCall("get_order", {"order_id": order.id}), ToolCall("return_item", sent))
    changed = _insert("returns", (order.id, product.id, reason))
    return ShopTask("return", text.format(product.name, order.id, reason), calls, (changed,))


TASKS = {
    "price": _price,
    "status": _status,
    "total": _total,
    "add": _add,
    "cheapest": _cheapest,
    "best_under": _best_under,
    "remove": _remove,
    "cancel": _cancel,
    "buy": _buy,
    "return": _return,
}
KINDS = tuple(TASKS)


def _in_stock(products: Iterable[Product]) -> list[Product]:
    return [product for product in products if product.stock]


def _adding(product: Product, count: int) -> ToolCall:
    return ToolCall("add_to_cart", {"product_id": product.id, "quantity": count})


def _into_cart(product: Product, count: int) -> str:
    added = _insert("cart_items", (product.id, count))
    return f"{added} ON CONFLICT (product_id) DO UPDATE SET quantity = quantity + {count}"


def _insert(table: str, values: tuple[object, ...]) -> str:
    written = ", ".join("NULL" if v is None else f"'{v}'" if isinstance(v, str) else str(v) for v in values)
    return f"INSERT INTO {table} VALUES ({written})"
