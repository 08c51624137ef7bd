#!/bin/bash
set -e
cd /home/agent/evidence
{ zcat auth.log.2.gz; cat auth.log.1 auth.log; } > /tmp/all.log
python3 - <<'PY'
import collections, json, re

failures, first, known = collections.Counter(), {}, set()
for line in open("/tmp/all.log"):
    time = line.split()[2]
    if m := re.search(r"Failed password for (?:invalid user )?(\S+) from (\S+)", line):
        repeated = re.search(r"message repeated (\d+) times", line)
        failures[m.groups()] += int(repeated.group(1)) if repeated else 1
        first.setdefault(m.groups(), time)
    elif m := re.search(r"sshd\[(\d+)\]: Accepted (\S+) for (\S+) from (\S+)", line):
        session, how, key = m.group(1), m.group(2), (m.group(3), m.group(4))
        if key not in known and how == "password" and failures[key] >= 10:
            break
        known.add(key)
commands = [
    line.rstrip("\n").split("COMMAND=")[1]
    for line in open("/tmp/all.log")
    if f"session={session} ;" in line and f"sudo: {key[0]} " in line
]
json.dump(
    {"address": key[1], "account": key[0], "first_failure": first[key], "failures": failures[key], "login": time,
     "commands": commands},
    open("/home/agent/incident.json", "w"),
)
PY
