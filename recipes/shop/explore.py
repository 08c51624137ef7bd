"""Play the shop by scripts: middling rollouts of its tasks, and strolls that only look around.

They play in the real environment, one call after another; its observations are what the model reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from backtalk.envs.awm.config import AwmConfig
from backtalk.envs.awm.shop import ADJECTIVES, CATEGORIES, CODES, REASONS, STATUSES, Plan, generate_task
from backtalk.envs.awm.world import AwmWorld, open_scenarios
from backtalk.messages import Message, ToolCall
from backtalk.tasks.task import Split, Task

FIRST_SEED = 1_000_000  # far from the seeds that "awm:shop" offers
LOOKING_AROUND = "Look around in the shop."


@dataclass(frozen=True, slots=True)
class Session:
    """A rollout of a script. ``ordinary`` ones only look around."""

    id: str
    prompt: tuple[Message, ...]
    turns: tuple[tuple[ToolCall, tuple[Message, ...]], ...]
    ordinary: bool


def train_seeds(count: int, first: int = FIRST_SEED) -> Iterator[int]:
    """Yield ``count`` seeds from ``first`` on whose tasks are of the train split."""
    seed = first
    while count:
        if Task(id=f"shop-{seed}", instruction="").split is Split.TRAIN:
            yield seed
            count -= 1
        seed += 1


async def explore(seeds: Iterable[int], *, skill: float, ordinary: bool) -> list[Session]:
    """Return a session for each seed. ``skill`` is the share of rollouts that do what the task asks."""
    world = AwmWorld("shop", AwmConfig())
    description = open_scenarios("shop").scenarios["shop"].description
    sessions = []
    for seed in seeds:
        shop_task, plan = generate_task(seed)
        random = Random(f"explore/{seed}")
        text = LOOKING_AROUND if ordinary else shop_task.instruction
        metadata = {"scenario": "shop", "seed": seed, "description": description}
        task = Task(id=f"shop-{seed}", instruction=text, metadata=metadata)
        async with world.open(task) as env:
            prompt = await env.reset()
            calls = _stroll(random, shop_task.inserts) if ordinary else _rollout(random, plan, skill)
            turns = [(call, (await env.step(call)).messages) for call in calls]
        sessions.append(Session(task.id, prompt, tuple(turns), ordinary))
    return sessions


def _rollout(random: Random, plan: Plan, skill: float) -> list[ToolCall]:
    calls = list(plan.solution)
    if random.random() < skill:
        return calls
    style = random.randrange(4)
    place = random.randrange(len(calls))
    if style == 0:  # leaves a step out
        if place < len(calls) - 1:
            del calls[place]
        else:
            calls[-1] = ToolCall("done", {"answer": ""})
    elif style == 1:  # gets one argument wrong
        calls[place] = _mistaken(random, calls[place])
    elif style == 2:  # does something else first, and then too little
        calls = [_any_call(random), *calls[: random.randrange(len(calls))], calls[-1]]
    else:  # an answer or a number that is not the one
        calls[-2:] = [_mistaken(random, call) for call in calls[-2:]]
    return calls


def _mistaken(random: Random, call: ToolCall) -> ToolCall:
    """Return the call with one argument changed. Ids stay: a wrong one would teach to guess, not to look."""
    changeable = [name for name in call.arguments if not name.endswith("_id")]
    if not changeable:
        return _any_call(random)
    name = random.choice(changeable)
    return ToolCall(call.tool, {**call.arguments, name: _other(random, call.arguments[name])})


def _other(random: Random, value: Any) -> Any:
    if isinstance(value, int):
        return random.randint(1, 3) if value < 10 else random.randint(10, 90)
    if value in ("price", "rating"):
        return {"price": "rating", "rating": "price"}[value]
    if value.isdigit() or not value:
        return str(random.randint(8, 90))
    names = [f"{random.choice(ADJECTIVES)} {random.choice(list(CATEGORIES.values()))}"]
    return random.choice(next((kind for kind in (list(CATEGORIES), STATUSES, REASONS, CODES) if value in kind), names))


def _stroll(random: Random, inserts: tuple[str, ...]) -> list[ToolCall]:
    names = [text.split("'")[1] for text in inserts if text.startswith("INSERT INTO products")]
    ids = [int(text.split("(")[1].split(",")[0]) for text in inserts if text.startswith("INSERT INTO products")]
    orders = [int(text.split("(")[1].split(",")[0]) for text in inserts if text.startswith("INSERT INTO orders")]
    return [_any_call(random, names, ids, orders) for _ in range(random.randint(3, 6))]


def _any_call(random: Random, names: Any = (), ids: Any = (), orders: Any = ()) -> ToolCall:
    thing = random.choice(list(CATEGORIES.values()))
    name = random.choice(names or [f"{random.choice(ADJECTIVES)} {thing}"])
    product, order = random.choice(ids or range(11, 100)), random.choice(orders or range(201, 260))
    category = random.choice(list(CATEGORIES))
    tool, arguments = random.choice(
        (
            ("list_categories", {}),
            ("search_products", {"name": name}),
            ("search_products", {"category": category}),
            ("search_products", {"category": category, "sort_by": random.choice(("price", "rating"))}),
            ("search_products", {"category": category, "max_price": random.randint(10, 90), "sort_by": "rating"}),
            ("get_product", {"product_id": product}),
            ("view_cart", {}),
            ("add_to_cart", {"product_id": product, "quantity": random.randint(1, 9)}),
            ("remove_from_cart", {"product_id": product}),
            ("apply_coupon", {"code": random.choice(CODES)}),
            ("list_orders", {}),
            ("list_orders", {"status": random.choice(STATUSES)}),
            ("get_order", {"order_id": order}),
            ("cancel_order", {"order_id": order}),
            ("return_item", {"order_id": order, "product_id": product, "reason": random.choice(REASONS)}),
        )
    )
    return ToolCall(tool, arguments)


def texts(session: Session) -> Iterator[str]:
    """Yield the texts that the tokenizer is trained on."""
    yield from (message.text for message in session.prompt)
    for call, messages in session.turns:
        yield json.dumps({"name": call.tool, "arguments": dict(call.arguments)})
        yield from (message.text for message in messages)
