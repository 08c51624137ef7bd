import json
import os
import sqlite3
import sys

sys.dont_write_bytecode = True
from make_world import build  # noqa: E402

PRISTINE = "/logs/verifier/pristine.db"
balance, wrong = build(PRISTINE)


def content(path):
    """Schema, the rows of every table, and the stored balances, which may change."""
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    schema = sorted(db.execute("SELECT type, name, sql FROM sqlite_master").fetchall())
    accounts = db.execute("SELECT id, owner, opening, closed_on FROM accounts ORDER BY id").fetchall()
    others = [db.execute(f"SELECT * FROM {table} ORDER BY id").fetchall() for table in ("transfers", "corrections")]
    return schema, accounts, others, dict(db.execute("SELECT id, balance FROM accounts").fetchall())


*kept, _ = content(PRISTINE)
os.remove(PRISTINE)
try:
    *left, stored = content("/home/agent/bank/ledger.db")
except sqlite3.Error as error:
    print("the database cannot be read:", error)
    left, stored = None, {}
try:
    with open("/home/agent/bank/wrong.txt") as file:
        named = [int(line) for line in file.read().split("\n") if line.strip()]
except (OSError, ValueError) as error:
    print("wrong.txt:", error)
    named = None
parts = {"balances": float(stored == balance), "list": float(named == wrong)}
reward = sum(parts.values()) / 2 if left == kept else 0.0
print(parts, "unchanged otherwise:", left == kept)
with open("/logs/verifier/reward.json", "w") as file:
    json.dump({"reward": reward, **parts}, file)
