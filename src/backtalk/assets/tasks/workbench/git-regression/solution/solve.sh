#!/bin/bash
set -e
cd /home/agent/tally
cp sheets/march.txt /tmp/march.txt
python3 -m tally --project web sheets/march.txt > /dev/null
git worktree add -q /tmp/v1 v1.0
(cd /tmp/v1 && python3 -m tally /tmp/march.txt) > /tmp/right.txt
git worktree remove --force /tmp/v1
cat > /tmp/same.sh <<'SH'
PYTHONDONTWRITEBYTECODE=1 python3 -m tally /tmp/march.txt > /tmp/now.txt 2> /dev/null || exit 125
grep -v '^total' /tmp/now.txt | cmp -s - /tmp/right.txt
SH
git bisect start main v1.0 > /dev/null
git bisect run bash /tmp/same.sh > /tmp/bisect.txt
git rev-parse refs/bisect/bad > /home/agent/bad-commit.txt
git bisect reset > /dev/null 2>&1
python3 - <<'PY'
import re

path = "tally/billing.py"
with open(path) as file:
    text = file.read()
text = text.replace("from itertools import groupby\n\n\n", "").split("def _person_and_day")[0] + text[text.index("def round_up"):]
head, doc, _ = re.split(r'(def billed\(entries\):\n    """.*?"""\n)', text, flags=re.DOTALL)
with open(path, "w") as file:
    file.write(head + doc + """\
    days = {}
    for entry in entries:
        key = entry.person, entry.day
        days[key] = days.get(key, 0) + entry.minutes
    result = {}
    for (person, _), minutes in days.items():
        result[person] = result.get(person, 0) + round_up(minutes)
    return result
""")
PY
git commit -q -a -m "Bill a day as one, in whatever order its entries come"
