import os
import random
import subprocess
import sys

sys.dont_write_bytecode = True
os.environ |= {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1", "HOME": "/nonexistent"}
import fence  # noqa: E402
from make_world import build  # noqa: E402

REPOSITORY, JUDGE, TIP = "/home/agent/tally", "/tmp/judge/repository", "/tmp/judge/tip"
rng = random.Random(77)


def git(*words):
    """git in a repository of the tests' own, which borrows the agent's objects: none of the agent's settings count."""
    return subprocess.run(["git", "-C", JUDGE, *words], capture_output=True, text=True, timeout=30)


def entry():
    """A line of a sheet, and what it says: (day, person, minutes, project)."""
    day, person = f"2023-05-{rng.randint(1, 4):02}", rng.choice(["ada", "bo", "cleo", "dov"])
    project, hours, minutes = rng.choice(["web", "mail", "depot"]), rng.randint(0, 3), rng.randint(1, 59)
    whole = hours * 60 + minutes
    forms = {f"{hours}h{minutes:02}": whole, f"{hours}h{minutes:02}m": whole, f"{minutes}m": minutes, f"{whole}": whole}
    text, long = rng.choice(sorted(forms.items()) + [(f"{hours}h", hours * 60)])
    times = rng.choice([None, None, 2, 3])
    line = (
        f"{day} {person} {text} {project}" + (f" x{times}" if times else "") + rng.choice(["", "", "  # by phone, 2h"])
    )
    return line, (day, person, long * (times or 1), project)


def printed(entries):
    """What is to be printed for them."""
    quarters = {}
    for person in sorted({person for _, person, _, _ in entries}):
        days = {}
        for day, who, minutes, _ in entries:
            if who == person:
                days[day] = days.get(day, 0) + minutes
        quarters[person] = sum((minutes + 14) // 15 for minutes in days.values())
    lines = [f"{person} {count / 4:.2f}" for person, count in quarters.items()]
    return "\n".join([*lines, f"total {sum(quarters.values()) / 4:.2f}"]) + "\n"


def bills(count):
    """Whether the program at the new tip prints what it should for one sheet, whole and by project."""
    lines, entries = zip(*(entry() for _ in range(count)))
    sheet = "/tmp/judge/sheet.txt"
    with open(sheet, "w") as file:
        file.write("# sheet\n\n" + "\n".join(lines) + "\n")
    web = [e for e in entries if e[3] == "web"]
    for options, held in (((), entries), (("--project", "web"), web)):
        status, output = fence.run(["python3", "-m", "tally", *options, sheet], cwd=TIP)
        if status != 0 or output.decode("utf-8", "replace") != printed(held):
            print(*options, sheet, status, output, "and it should be", printed(held))
            return False
    return True


bad, old_tip = build(JUDGE)
try:
    with open("/home/agent/bad-commit.txt") as file:
        named = file.read().strip() == bad
except (OSError, ValueError) as error:
    print("bad-commit.txt:", error)
    named = False
_, output = fence.run(["git", "-C", REPOSITORY, "rev-parse", "--verify", "-q", "refs/heads/main^{commit}"])
new_tip = output.decode("utf-8", "replace").strip()
with open(f"{JUDGE}/.git/objects/info/alternates", "w") as file:
    file.write(f"{REPOSITORY}/.git/objects\n")
kept = new_tip != old_tip and git("merge-base", "--is-ancestor", old_tip, new_tip).returncode == 0
os.makedirs(TIP)
checked_out = kept and git(f"--work-tree={TIP}", "checkout", "-q", "-f", new_tip, "--", ".").returncode == 0
fence.score(named=named, kept=kept, repaired=checked_out and all(bills(count) for count in (40, 9, 80, 25)))
