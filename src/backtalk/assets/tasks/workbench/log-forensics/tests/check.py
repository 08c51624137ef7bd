import gzip
import hashlib
import json

TRUTH = {
    "address": "198.51.100.14",
    "account": "tobias",
    "first_failure": "02:32:00",
    "failures": 22,
    "login": "18:20:31",
    "commands": ["/usr/bin/cat /etc/shadow", "/usr/sbin/useradd -o -u 0 support", "/usr/bin/rm -f /var/log/wtmp"],
}
# Of the three parts after one another, oldest first, unpacked.
EVIDENCE = "02597b60abf9c52ae0ecdc3dde044142b3d1173b5d003c3b2b5ae0ea03277167"


def evidence():
    folder = "/home/agent/evidence"
    try:
        with gzip.open(f"{folder}/auth.log.2.gz") as old, open(f"{folder}/auth.log.1", "rb") as before:
            with open(f"{folder}/auth.log", "rb") as now:
                return hashlib.sha256(old.read() + b"|" + before.read() + b"|" + now.read()).hexdigest()
    except (OSError, EOFError) as error:
        return str(error)


def same(given, true):
    return type(given) is type(true) and given == true


try:
    with open("/home/agent/incident.json") as file:
        given = json.load(file)
except (OSError, ValueError) as error:
    print("incident.json:", error)
    given = {}
whole = isinstance(given, dict) and set(given) == set(TRUTH) and evidence() == EVIDENCE
parts = {key: float(whole and same(given[key], true)) for key, true in TRUTH.items()}
print(parts, "whole:", whole)
with open("/logs/verifier/reward.json", "w") as file:
    json.dump({"reward": sum(parts.values()) / len(parts), **parts}, file)
