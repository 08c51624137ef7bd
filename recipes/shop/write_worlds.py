"""Write our two worlds in the file format of the Agent World Model, from their programs in worlds/.

python recipes/shop/write_worlds.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

from backtalk.envs.awm.files import Scenario
from backtalk.envs.awm.shop import KINDS, code_verifier, generate_task, insert_statement
from scenario_files import write_scenario

HERE = Path(__file__).parent
ASSETS = HERE.parents[1] / "src/backtalk/assets/awm"

# For a judge, who is shown the changes and reads the answer in the conversation.
SQL_VERIFIER = """\
def verify_task(initial_db_path: str, final_db_path: str) -> dict:
    import sqlite3

    def contents(path):
        database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = {name: set(map(repr, database.execute(f'SELECT * FROM "{name}"'))) for name in tables}
        database.close()
        return rows

    before, after = contents(initial_db_path), contents(final_db_path)
    return {
        name: {"removed": sorted(rows - after[name]), "added": sorted(after[name] - rows)}
        for name, rows in before.items()
        if rows != after[name]
    }
"""

SHOP_SCHEMA = (
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

AGENTS = [
    (1, "Ines Halloran", "billing"),
    (2, "Bram Okafor", "billing"),
    (3, "Tove Lindqvist", "network"),
    (4, "Marek Dudek", "accounts"),
    (5, "Sunniva Rao", "network"),
]
TICKETS = [  # id, title, body, customer, queue, priority, status, agent, resolution
    (
        101,
        "Charged twice",
        "My card was charged twice in March.",
        "Orchid Cafe",
        "billing",
        "normal",
        "open",
        1,
        None,
    ),
    (
        102,
        "Router restarts",
        "It restarts every night at two.",
        "Pine School",
        "network",
        "high",
        "open",
        3,
        None,
    ),
    (103, "Cannot sign in", "The reset mail never comes.", "Wim Aalders", "accounts", "normal", "open", None, None),
    (104, "Invoice address", "Please print our new address.", "Orchid Cafe", "billing", "low", "waiting", 2, None),
    (105, "Slow at noon", "Everything crawls at lunch.", "Harbour Clinic", "network", "normal", "open", None, None),
    (
        106,
        "Second double charge",
        "Same as before: two charges in March.",
        "Orchid Cafe",
        "billing",
        "normal",
        "open",
        1,
        None,
    ),
    (
        107,
        "New colleague",
        "Please add Lia to our account.",
        "Harbour Clinic",
        "accounts",
        "low",
        "closed",
        4,
        "solved",
    ),
    (108, "Refund", "I sent the phone back in May.", "Jo Castellan", "billing", "high", "open", None, None),
    (109, "Cable cut", "Roadworks cut our cable.", "Pine School", "network", "high", "closed", 5, "solved"),
    (110, "Wrong name", "The account says Kastellan.", "Jo Castellan", "billing", "low", "open", None, None),
    (
        111,
        "Locked out",
        "Too many attempts.",
        "Wim Aalders",
        "accounts",
        "high",
        "waiting",
        4,
        None,
    ),
    (112, "Static on the line", "We hear static on every call.", "Harbour Clinic", "network", "low", "open", 5, None),
]
COMMENTS = [
    (101, "customer", "Any news?"),
    (102, "desk", "We ordered a new router."),
    (104, "desk", "Which address is it?"),
    (107, "customer", "Lia still cannot get in."),
    (109, "desk", "The cable is mended."),
    (111, "desk", "Please call us."),
]
TICKET_SCHEMA = (
    "CREATE TABLE agents (id INTEGER PRIMARY KEY, name TEXT NOT NULL, skill TEXT NOT NULL)",
    "CREATE TABLE tickets (id INTEGER PRIMARY KEY, title TEXT NOT NULL, body TEXT NOT NULL, customer TEXT NOT NULL, "
    "queue TEXT NOT NULL, priority TEXT NOT NULL, status TEXT NOT NULL, agent_id INTEGER, resolution TEXT)",
    "CREATE TABLE comments (ticket_id INTEGER NOT NULL, author TEXT NOT NULL, body TEXT NOT NULL)",
)
TICKET_TASKS = (  # instruction, SQL of the changes it asks for, answer
    ("Give the ticket about the router to Sunniva Rao.", ["UPDATE tickets SET agent_id = 5 WHERE id = 102"], None),
    ("How many tickets of the billing queue are open?", [], "4"),
    ("Raise the ticket 'Slow at noon' to high priority and give it to the network agent with the fewest tickets that "
     "are not closed; of two such agents, the one with the lower id.",
     ["UPDATE tickets SET priority = 'high', agent_id = 3 WHERE id = 105"], None),
    ("Ticket 106 says the same as 101. Close 106 as a duplicate.",
     ["UPDATE tickets SET status = 'closed', resolution = 'duplicate' WHERE id = 106"], None),
    ("Lia of the Harbour Clinic still cannot get in. Reopen their ticket and comment 'We are looking into it.'",
     ["UPDATE tickets SET status = 'open', resolution = NULL WHERE id = 107",
      "INSERT INTO comments VALUES (107, 'desk', 'We are looking into it.')"], None),
    ("The ticket 'Wrong name' is in the wrong queue. Move it to accounts and give it to Marek Dudek.",
     ["UPDATE tickets SET queue = 'accounts', agent_id = 4 WHERE id = 110"], None),
    ("Which is the id of the ticket that Pine School has open?", [], "102"),
    ("Jo Castellan was refunded today. Give the refund ticket to Bram Okafor and close it as solved.",
     ["UPDATE tickets SET agent_id = 2, status = 'closed', resolution = 'solved' WHERE id = 108"], None),
    ("What is the priority of the ticket of Wim Aalders that waits?", [], "high"),
    ("Set every open ticket of low priority to normal.",
     ["UPDATE tickets SET priority = 'normal' WHERE id IN (110, 112)"], None),
)  # fmt: skip


def shop() -> Scenario:
    """Return the shop of seed 0 with a task of each kind."""
    tasks = [generate_task(0, kind)[0] for kind in KINDS]
    return Scenario(
        name="shop",
        description="You shop online for a customer. Call one tool at a time, and call done when the task is done.",
        program=(HERE / "worlds/shop.py").read_text(),
        schema=SHOP_SCHEMA,
        inserts=tasks[0].inserts,
        tasks=tuple(task.instruction for task in tasks),
        verifiers={
            "code": {task.task_idx: task.verifiers["code"] for task in tasks},
            "sql": dict.fromkeys(range(len(tasks)), SQL_VERIFIER),
        },
    )


def tickets() -> Scenario:
    """Return the ticket desk."""
    rows = {"agents": AGENTS, "tickets": TICKETS, "comments": COMMENTS}
    priorities = ("low", "normal", "high")
    return Scenario(
        name="tickets",
        description="You work at a ticket desk. Call one tool at a time, and call done when the task is done.",
        program=(HERE / "worlds/tickets.py").read_text(),
        schema=TICKET_SCHEMA,
        inserts=tuple(insert_statement(table, row) for table in rows for row in rows[table]),
        tasks=tuple(text for text, _, _ in TICKET_TASKS),
        verifiers={
            "code": {
                idx: code_verifier(changes, answer, priorities) for idx, (_, changes, answer) in enumerate(TICKET_TASKS)
            },
            "sql": dict.fromkeys(range(len(TICKET_TASKS)), SQL_VERIFIER),
        },
    )


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ASSETS
    for scenario in (shop(), tickets()):
        write_scenario(scenario, folder / scenario.name)


if __name__ == "__main__":
    main()
