#!/bin/bash
set -e
cd /home/agent/bank
python3 - <<'PY'
import sqlite3

db = sqlite3.connect("ledger.db")
right = """
WITH moved AS (
  SELECT t.source, t.target,
         COALESCE((SELECT c.cents FROM corrections c WHERE c.transfer = t.id ORDER BY c.id DESC LIMIT 1), t.cents) AS cents
  FROM transfers t
  LEFT JOIN accounts s ON s.id = t.source
  LEFT JOIN accounts g ON g.id = t.target
  WHERE t.state = 'booked' AND (s.closed_on IS NULL OR t.day <= s.closed_on)
    AND (g.closed_on IS NULL OR t.day <= g.closed_on)
)
SELECT a.id, a.opening + COALESCE((SELECT SUM(cents) FROM moved WHERE target = a.id), 0)
       - COALESCE((SELECT SUM(cents) FROM moved WHERE source = a.id), 0), a.balance
FROM accounts a ORDER BY a.id
"""
wrong = [(true, account) for account, true, stored in db.execute(right).fetchall() if true != stored]
db.executemany("UPDATE accounts SET balance = ? WHERE id = ?", wrong)
db.commit()
with open("wrong.txt", "w") as file:
    file.writelines(f"{account}\n" for _, account in wrong)
PY
