"""Builds the repository `tally` with its history, the same hashes on every machine. The tests build it too."""

import os
import subprocess

WHO = {"ines": "Ines Okoye <ines@tally.example>", "piotr": "Piotr Lind <piotr@tally.example>"}

INIT = '"""Hours on timesheets, for people who bill them."""\n'
MAIN = """\
import sys

from tally.cli import main

sys.exit(main(sys.argv[1:]))
"""
PARSE = '''\
from collections import namedtuple

Entry = namedtuple("Entry", "day person minutes project")


def parse_duration(text):
    """Minutes of "90", "1h" and "1h30"."""
    hours, sign, minutes = text.rpartition("h")
    return int(hours or 0) * 60 + int(minutes or 0)


def parse_line(line):
    day, person, duration, project = line.split()
    return Entry(day, person, parse_duration(duration), project)


def read_sheet(path):
    with open(path) as file:
        return [parse_line(line) for line in file if line.strip()]
'''
HOURS = '''\
def round_up(minutes, step=15):
    return -(-minutes // step) * step


def billed(entries):
    """Minutes to bill by person: what somebody worked on a day is added up, then rounded up to quarters."""
    days = {}
    for entry in entries:
        key = entry.person, entry.day
        days[key] = days.get(key, 0) + entry.minutes
    result = {}
    for (person, _), minutes in days.items():
        result[person] = result.get(person, 0) + round_up(minutes)
    return result
'''
CLI = """\
from tally.hours import billed
from tally.parse import read_sheet


def main(arguments):
    if len(arguments) != 1:
        print("usage: python3 -m tally SHEET")
        return 2
    for person, minutes in sorted(billed(read_sheet(arguments[0])).items()):
        print(f"{person} {minutes / 60:.2f}")
    return 0
"""
TEST = """\
import unittest

from tally.hours import billed
from tally.parse import parse_duration, parse_line


class TallyTest(unittest.TestCase):
    def test_durations(self):
        self.assertEqual([parse_duration(text) for text in ("90", "1h", "1h30")], [90, 60, 90])

    def test_a_day_is_rounded_up_to_quarters(self):
        lines = ["2023-03-03 mo 50 web", "2023-03-03 mo 20 web", "2023-03-04 mo 10 web"]
        self.assertEqual(billed([parse_line(line) for line in lines]), {"mo": 90})


if __name__ == "__main__":
    unittest.main()
"""
SAMPLE = """\
2023-02-03 ada 1h30 web
2023-02-03 ada 20 mail
2023-02-04 ada 2h web
2023-02-03 bo 7h05 depot
2023-02-05 bo 45 web
"""
STREAMED = '''\
def billed(entries):
    """Minutes to bill by person: what somebody worked on a day is added up, then rounded up to quarters."""
    result = {}
    for (person, _), group in groupby(entries, key=lambda entry: (entry.person, entry.day)):
        result[person] = result.get(person, 0) + round_up(sum(entry.minutes for entry in group))
    return result
'''
# The months' sheets are written as people report: not sorted by anything.
MARCH = """\
2023-03-03 ada 50 web
2023-03-03 bo 1h10 depot
2023-03-03 ada 1h05 depot
2023-03-04 bo 2h web
2023-03-04 cleo 35 mail
2023-03-03 cleo 3h20 web
2023-03-04 cleo 40 web
2023-03-04 ada 4h depot
2023-03-04 bo 20 depot
2023-03-05 ada 25 web
2023-03-05 bo 5 mail
2023-03-05 ada 10 web
2023-03-04 cleo 1h web
"""


class History:
    """Files, and the commits so far as `git fast-import` reads them."""

    def __init__(self):
        self.files, self.stream, self.marks, self.clock = {}, [], 0, 1_679_400_000

    def commit(self, who, message, files=(), branch="main", merge=None, start=None):
        self.marks += 1
        self.clock += 9_000 + self.marks * 977 % 5_000
        self.files |= dict(files)
        text = f"commit refs/heads/{branch}\nmark :{self.marks}\ncommitter {WHO[who]} {self.clock} +0000\n"
        text += f"data {len(message.encode())}\n{message}\n"
        text += f"from :{start}\n" if start else ""
        text += f"merge :{merge}\n" if merge else ""
        for path, content in self.files.items() if not merge and not start else dict(files).items():
            text += f"M 100644 inline {path}\ndata {len(content.encode())}\n{content}\n"
        self.stream.append(text)
        return self.marks

    def edit(self, who, message, path, *changes, **options):
        content = self.files[path]
        for old, new in changes:
            assert content.count(old) == 1, (message, old)
            content = content.replace(old, new)
        return self.commit(who, message, {path: content}, **options)

    def tag(self, name, mark):
        self.stream.append(f"reset refs/tags/{name}\nfrom :{mark}\n\n")

    def move(self, who, message, old, new, files):
        content = self.files.pop(old)
        mark = self.commit(who, message, {new: content, **files})
        self.stream[-1] += f"D {old}\n"
        return mark


def until_the_release(h):
    """The beginnings, in which all is right."""
    h.commit(
        "ines",
        "Begin",
        {".gitignore": "__pycache__/\n", "README.md": "# tally\n\nHours on timesheets.\n", "tally/__init__.py": INIT},
    )
    h.commit("ines", "Read sheets", {"tally/parse.py": PARSE})
    h.commit("ines", "Bill by person", {"tally/hours.py": HOURS, "tally/cli.py": CLI, "tally/__main__.py": MAIN})
    h.commit("piotr", "Tests and a sample", {"test_tally.py": TEST, "sheets/sample.txt": SAMPLE})
    release = h.edit(
        "ines", "README: how to run", "README.md", ("Hours on timesheets.\n", "    python3 -m tally SHEET\n")
    )
    h.tag("v1.0", release)


def until_the_branch(h):
    """From the release to where the branch leaves; one commit on the way does not run at all."""
    h.commit("piotr", "Sheet of March", {"sheets/march.txt": MARCH})
    h.edit(
        "ines",
        "Comments on sheets",
        "tally/parse.py",
        ("for line in file if line.strip()]", 'for line in file if line.split("#")[0].strip()]'),
        (
            "    day, person, duration, project = line.split()\n",
            '    day, person, duration, project = line.split("#")[0].split()\n',
        ),
    )
    h.edit(
        "piotr",
        "Print a total at the end",
        "tally/cli.py",
        (
            "    for person, minutes in sorted(billed(read_sheet(arguments[0])).items()):\n",
            "    people = billed(read_sheet(arguments[0]))\n    for person, minutes in sorted(people.items()):\n",
        ),
        ("    return 0\n", '    print(f"total {sum(people.values()) / 60:.2f}")\n    return 0\n'),
    )
    h.edit(
        "ines",
        "Fix rounding of the total: bill it as printed",
        "tally/cli.py",
        ("sum(people.values()) / 60:.2f", "sum(round(m / 60, 2) for m in people.values()):.2f"),
    )
    h.edit("piotr", "README: comments", "README.md", ("SHEET\n", "SHEET\n\n`#` begins a comment on a sheet.\n"))
    h.edit(
        "ines",
        "round_up: say what it does",
        "tally/hours.py",
        ("step=15):\n", 'step=15):\n    """The next multiple of step, minutes itself if it is one."""\n'),
    )
    h.edit(
        "piotr",
        "Options: only one project",
        "tally/cli.py",
        (
            'def main(arguments):\n    if len(arguments) != 1:\n        print("usage: python3 -m tally SHEET")\n',
            'def main(arguments):\n    project = None\n    if len(arguments) == 3 and arguments[0] == "--project"\n'
            "        _, project, *arguments = arguments\n    if len(arguments) != 1:\n"
            '        print("usage: python3 -m tally [--project NAME] SHEET")\n',
        ),
        (
            "    people = billed(read_sheet(arguments[0]))\n",
            "    entries = [e for e in read_sheet(arguments[0]) if project in (None, e.project)]\n"
            "    people = billed(entries)\n",
        ),
    )
    h.edit("piotr", "Missing colon", "tally/cli.py", ('== "--project"\n', '== "--project":\n'))


def branch_and_merge(h):
    """Two branches and their merge; returns the mark of the commit that broke the billing, in the middle of one."""
    side = dict(h.files)
    main_at = h.marks
    h.files = dict(side)
    h.edit(
        "ines",
        "Sheets of any size: read line by line",
        "tally/parse.py",
        (
            '        return [parse_line(line) for line in file if line.split("#")[0].strip()]\n',
            '        for line in file:\n            if line.split("#")[0].strip():\n                yield parse_line(line)\n',
        ),
        branch="streaming",
        start=main_at,
    )
    documented = h.files["tally/hours.py"].partition("def billed")[0]
    bad = h.commit(
        "ines",
        "Hold one day at a time instead of the whole sheet",
        {"tally/hours.py": "from itertools import groupby\n\n\n" + documented + STREAMED},
        branch="streaming",
    )
    h.edit(
        "ines",
        "Streaming: note in README",
        "README.md",
        ("on a sheet.\n", "on a sheet. Sheets may be of any size.\n"),
        branch="streaming",
    )
    streaming, streamed = h.marks, dict(h.files)
    h.files = dict(side)
    h.edit(
        "piotr",
        "Weeks: a helper",
        "tally/__init__.py",
        (INIT, INIT + '\n__version__ = "1.1"\n'),
        branch="main",
        start=main_at,
    )
    changed = {path: text for path, text in streamed.items() if text != side.get(path)}
    h.commit("piotr", "Merge branch 'streaming'", changed, merge=streaming)
    return bad


def since_the_merge(h):
    """New things, and the broken code moved and renamed."""
    h.edit(
        "ines",
        "Durations with minutes: 1h30m, 45m",
        "tally/parse.py",
        (
            '    hours, sign, minutes = text.rpartition("h")\n',
            '    hours, _, minutes = text.removesuffix("m").rpartition("h")\n',
        ),
        ('"90", "1h" and "1h30"', '"90", "45m", "1h", "1h30" and "1h30m"'),
    )
    h.edit(
        "piotr",
        "Test the new durations",
        "test_tally.py",
        ('("90", "1h", "1h30")], [90, 60, 90])', '("90", "1h", "1h30", "45m", "2h05m")], [90, 60, 90, 45, 125])'),
    )
    h.move(
        "piotr",
        "hours.py becomes billing.py",
        "tally/hours.py",
        "tally/billing.py",
        {
            "tally/cli.py": h.files["tally/cli.py"].replace("tally.hours", "tally.billing"),
            "test_tally.py": h.files["test_tally.py"].replace("tally.hours", "tally.billing"),
        },
    )
    h.edit(
        "ines",
        "Repeat an entry: x3",
        "tally/parse.py",
        (
            '    day, person, duration, project = line.split("#")[0].split()\n',
            '    day, person, duration, project, *times = line.split("#")[0].split()\n',
        ),
        ("parse_duration(duration), project)", 'parse_duration(duration) * int((times or ["x1"])[0][1:]), project)'),
    )
    h.edit(
        "piotr",
        "billing: one function for a person's day",
        "tally/billing.py",
        (
            "def billed(entries):",
            "def worked(entries):\n    return sum(entry.minutes for entry in entries)\n\n\ndef billed(entries):",
        ),
        ("round_up(sum(entry.minutes for entry in group))", "round_up(worked(group))"),
        ("key=lambda entry: (entry.person, entry.day)", "key=_person_and_day"),
        ("def round_up", "def _person_and_day(entry):\n    return entry.person, entry.day\n\n\ndef round_up"),
    )


def until_the_tip(h):
    """The last commits; returns the mark of the tip."""
    h.edit(
        "ines",
        "Usage goes to standard error",
        "tally/cli.py",
        ('SHEET")\n', 'SHEET", file=sys.stderr)\n'),
        ("from tally.billing", "import sys\n\nfrom tally.billing"),
    )
    april = MARCH.replace("2023-03", "2023-04").replace("50 web", "55m web").replace("1h05 depot", "1h05m depot # van")
    h.commit("piotr", "Sheet of April", {"sheets/april.txt": april + "2023-04-07 bo 20m mail x3\n"})
    return h.edit(
        "ines", "README: repeated entries", "README.md", ("any size.\n", "any size. `x3` repeats an entry.\n")
    )


def history():
    """The whole history, and the marks of the commit that broke the billing and of the tip."""
    h = History()
    until_the_release(h)
    until_the_branch(h)
    bad = branch_and_merge(h)
    since_the_merge(h)
    return h.stream, bad, until_the_tip(h)


def build(folder):
    """Make the repository; returns the full hashes of the commit that broke the billing and of the tip."""
    stream, bad, tip = history()

    def git(*words, given=None):
        done = subprocess.run(["git", "-C", folder, *words], check=True, capture_output=True, text=True, input=given)
        return done.stdout.strip()

    os.makedirs(folder)
    git("init", "-q")
    git("symbolic-ref", "HEAD", "refs/heads/main")
    git("fast-import", "--quiet", "--export-marks=.git/marks", given="".join(stream))
    git("config", "user.name", "Agent")
    git("config", "user.email", "agent@tally.example")
    git("reset", "-q", "--hard")
    git("branch", "-q", "-D", "streaming")
    with open(f"{folder}/.git/marks") as file:
        marks = dict(line.split() for line in file)
    os.remove(f"{folder}/.git/marks")
    return marks[f":{bad}"], marks[f":{tip}"]


if __name__ == "__main__":
    build("/home/agent/tally")
