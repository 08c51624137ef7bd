"""Builds the ledger, with some balances wrong. `build` is imported by the tests too, which know the right ones."""

import random
import sqlite3

SCHEMA = """
CREATE TABLE accounts(id INTEGER PRIMARY KEY, owner TEXT, opening INTEGER, balance INTEGER, closed_on TEXT);
CREATE TABLE transfers(id INTEGER PRIMARY KEY, source INTEGER, target INTEGER, cents INTEGER, day TEXT, state TEXT);
CREATE TABLE corrections(id INTEGER PRIMARY KEY, transfer INTEGER, cents INTEGER);
CREATE INDEX by_source ON transfers(source);
CREATE TRIGGER stamp AFTER UPDATE OF owner ON accounts BEGIN SELECT RAISE(ABORT, 'owners do not change'); END;
"""


def build(path):
    """Write the database; returns the right balance of every account, and the ids of those that are stored wrong."""
    rng = random.Random(99)

    def number(low, high):
        return low + int(rng.random() * (high - low))

    def day():
        return f"2031-{number(1, 13):02}-{number(1, 29):02}"

    closed = {i: day() if rng.random() < 0.2 else None for i in range(1, 41)}
    opening = {i: number(0, 500_000) for i in closed}
    balance = dict(opening)
    transfers, corrections, naive = [], {}, dict(opening)
    for i in range(1, 601):
        source, target = number(1, 41), number(1, 41)
        if source == target:
            source = None
        elif rng.random() < 0.05:
            target = None
        state = "booked" if rng.random() < 0.85 else ["pending", "rejected", "Booked?"][number(0, 3)]
        cents, when = number(1, 40_000), day()
        transfers.append((i, source, target, cents, when, state))
        if rng.random() < 0.1:
            corrections.setdefault(i, []).append(number(0, 40_000))
            if rng.random() < 0.4:
                corrections[i].append(number(0, 40_000))
        true = corrections[i][-1] if i in corrections else cents
        late = any(a is not None and closed[a] is not None and when > closed[a] for a in (source, target))
        for account, sign in ((source, -1), (target, 1)):
            if account is None:
                continue
            if state == "booked":
                naive[account] += sign * cents
                if not late:
                    balance[account] += sign * true
    stored, wrong = dict(balance), []
    for account in (3, 8, 13, 14, 22, 29, 37):
        off = naive[account] if naive[account] != balance[account] and account % 2 else balance[account] + account
        stored[account] = off
        wrong.append(account)
    db = sqlite3.connect(path)
    db.executescript(SCHEMA)
    db.executemany(
        "INSERT INTO accounts VALUES(?, ?, ?, ?, ?)",
        [(i, f"owner {i}", opening[i], stored[i], closed[i]) for i in closed],
    )
    db.executemany("INSERT INTO transfers VALUES(?, ?, ?, ?, ?, ?)", transfers)
    # Written highest id first, so that the order of the rows does not tell which one holds.
    flat = [(i, cents) for i in sorted(corrections) for cents in corrections[i]]
    rows = [(number, i, cents) for number, (i, cents) in enumerate(flat, 1)]
    db.executemany("INSERT INTO corrections VALUES(?, ?, ?)", reversed(rows))
    db.commit()
    db.close()
    return balance, wrong


if __name__ == "__main__":
    import os

    os.makedirs("/home/agent/bank", exist_ok=True)
    build("/home/agent/bank/ledger.db")
