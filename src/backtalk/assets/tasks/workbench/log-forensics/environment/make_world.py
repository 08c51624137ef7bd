"""Writes the authentication log of one day, the oldest part compressed. The same bytes on every machine."""

import gzip
import os
import random

rng = random.Random(20310)
lines: list[tuple[int, str]] = []


def pick(items):
    return items[int(rng.random() * len(items))]


def at(second: int, text: str) -> None:
    lines.append((second, text))


def fail(second: int, pid: int, account: str, address: str, repeated: int = 0, known: bool = True) -> None:
    text = f"Failed password for {'' if known else 'invalid user '}{account} from {address} port {40000 + pid} ssh2"
    at(second, f"sshd[{pid}]: " + (f"message repeated {repeated} times: [ {text}]" if repeated else text))


def login(second: int, pid: int, account: str, address: str, how: str = "password") -> None:
    at(second, f"sshd[{pid}]: Accepted {how} for {account} from {address} port {40000 + pid} ssh2")


def sudo(second: int, pid: int, account: str, command: str) -> None:
    at(second, f"sudo: {account} : session={pid} ; PWD=/home/{account} ; USER=root ; COMMAND={command}")


# Everyday life: keys, a few slips, cron.
people = {"mira": "10.4.0.17", "tobias": "10.4.0.22", "yusuf": "10.4.0.31", "deploy": "10.4.0.5", "backup": "10.4.0.9"}
pid = 2000
for second in range(300, 86000, 190):
    pid += 3 + int(rng.random() * 9)
    person = pick(sorted(people))
    when = second + int(rng.random() * 150)
    chance = rng.random()
    if chance < 0.25:
        fail(when, pid, person, people[person])
        login(when + 6, pid, person, people[person], "password")
    elif chance < 0.6:
        login(when, pid, person, people[person], "publickey")
        sudo(when + 9, pid, person, pick(["/usr/bin/apt list", "/bin/systemctl status nginx", "/usr/bin/less /var/log/syslog"]))
    else:
        at(when, f"CRON[{pid}]: pam_unix(cron:session): session opened for user root by (uid=0)")

# Loud, and never let in: most failures of all, on many accounts.
for second in range(4000, 61000, 97):
    pid += 2
    fail(second, pid, pick(["root", "admin", "oracle", "test", "mira"]), "203.0.113.77", known=False)
# Many failures on one account, let in to another one.
for second in range(20000, 21400, 60):
    pid += 2
    fail(second, pid, "yusuf", "198.51.100.140")
login(21500, pid + 1, "backup", "198.51.100.140")
# Nine failures and in: somebody who forgot a password; one fewer than asked for.
for second in range(30000, 30540, 60):
    pid += 2
    fail(second, pid, "mira", "192.0.2.61")
login(30700, pid + 1, "mira", "192.0.2.61")
# Enough failures, let in with a key.
for second in range(50000, 51000, 60):
    pid += 2
    fail(second, pid, "deploy", "192.0.2.200")
login(51500, pid + 1, "deploy", "192.0.2.200", "publickey")
# The one: slow, over all three parts, also trying another account, with repeated lines.
for number, second in enumerate([9120, 17777, 26400, 35011, 43700, 52222, 60606, 66010]):
    fail(second, 600 + number, "tobias", "198.51.100.14")
    if number in (2, 5, 7):
        fail(second + 20, 600 + number, "tobias", "198.51.100.14", repeated=number)
    if number % 3 == 0:
        fail(second + 5, 600 + number, "root", "198.51.100.14")
fail(9000, 599, "root", "198.51.100.14")
login(66031, 711, "tobias", "198.51.100.14")
login(66100, 712, "tobias", people["tobias"], "publickey")
sudo(66090, 711, "tobias", "/usr/bin/cat /etc/shadow")
sudo(66150, 712, "tobias", "/bin/systemctl restart nginx")
sudo(66400, 711, "tobias", "/usr/sbin/useradd -o -u 0 support")
sudo(66420, 711, "tobias", "/usr/bin/rm -f /var/log/wtmp")
fail(70000, 820, "tobias", "198.51.100.14")
login(70010, 820, "tobias", "198.51.100.14")
sudo(70040, 820, "tobias", "/usr/bin/tar czf /tmp/h.tgz /home")

lines.sort(key=lambda line: line[0])
text = [f"Mar 14 {s // 3600:02}:{s // 60 % 60:02}:{s % 60:02} gate1 {body}\n" for s, body in lines]
parts = {"auth.log.2.gz": text[:400], "auth.log.1": text[400:800], "auth.log": text[800:]}
os.makedirs("/home/agent/evidence", exist_ok=True)
for name, part in parts.items():
    content = "".join(part).encode()
    if name.endswith(".gz"):
        content = gzip.compress(content, mtime=0)
    with open(f"/home/agent/evidence/{name}", "wb") as file:
        file.write(content)
