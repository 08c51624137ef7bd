"""Writes the state of the stock, cut off in the middle, an older copy, and the journal since then."""

import json
import os
import random

FOLDER = "/home/agent/stock"


def days():
    """The copy, the lines of the journal, and the state after them. The same on every machine."""
    rng = random.Random(12)
    items = ["bolt-m6", "bolt-m8", "hinge", "lock", "nut-m6", "nut-m8", "plate", "rail"]
    stock = {item: rng.randint(20, 90) for item in items}
    orders = {"A-1": {"bolt-m6": 12, "nut-m6": 12}, "A-2": {"rail": 3}, "A-3": {"hinge": 4, "plate": 2, "lock": 1}}
    copy = json.loads(json.dumps({"stock": stock, "orders": orders}))
    lines = []
    for number in range(4, 90):
        chance = rng.random()
        if chance < 0.15:
            item, count = rng.choice([*items, "spring"]), rng.randint(5, 30)
            stock[item] = stock.get(item, 0) + count
            lines.append(f"receive {item} {count} ok")
        elif chance < 0.35:
            order = rng.choice(sorted(orders) + ["A-9", "A-30"])
            held = orders.pop(order, None)
            for item, count in (held or {}).items():
                stock[item] += count
            lines.append(f"cancel {order} {'refused' if held is None else 'ok'}")
        else:
            order = f"A-{number}"
            wanted = {item: rng.randint(1, 16) for item in rng.sample(sorted(stock), rng.randint(1, 3))}
            done = all(stock[item] >= count for item, count in wanted.items())
            if done:
                orders[order] = wanted
                for item, count in wanted.items():
                    stock[item] -= count
            said = " ".join(f"{item}={count}" for item, count in wanted.items())
            lines.append(f"reserve {order} {said} {'ok' if done else 'refused'}")
    return copy, lines, {"stock": stock, "orders": orders}


if __name__ == "__main__":
    copy, lines, state = days()
    text = json.dumps(state, indent=1)
    for name, content in {
        "stock-2023-05-01.json": json.dumps(copy, indent=1),
        "journal.log": "".join(f"{line}\n" for line in lines),
        "stock.json": text[: text.index('"orders"') - 20],
    }.items():
        with open(os.path.join(FOLDER, name), "w") as file:
            file.write(content)
