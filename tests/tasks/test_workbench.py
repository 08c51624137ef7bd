"""The tasks of the workbench: each solved by its solution, and by nothing less."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from backtalk.envs.terminal import TerminalConfig, open_terminal_env
from backtalk.messages import ToolCall
from backtalk.tasks.load import read_tasks
from backtalk.tasks.task import Task
from sandbox_help import backend_or_skip

TASKS = {task.id.removeprefix("workbench/"): task for task in read_tasks("workbench")}
NAMES = """backup-restore c-build config-surgery crontab csv-join git-regression log-forensics permissions rota-bug
    sqlite-ledger stock-service supervisor""".split()
AT_ONCE = 4  # most of their time the tests of a task wait


@dataclass(frozen=True)
class Attempt:
    """What somebody tries who does not do the task, or not all of it. ``solved`` is the solution before that."""

    task: str
    what: str
    command: str
    solved: bool = False


WRITE = "import pathlib, sys\npath, old, new = sys.argv[1:]\nfile = pathlib.Path(path)\ntext = file.read_text()\n"
WRITE += "assert old in text, old\nfile.write_text(text.replace(old, new))"


def edit(path: str, old: str, new: str) -> str:
    """A command that replaces text in a file, and fails where it is not there."""
    words = " ".join("'" + word.replace("'", "'\\''") + "'" for word in (path, old, new))
    return f"python3 -c '{WRITE}' {words}"


BAD_COMMIT = "git -C /home/agent/tally log --format=%H --grep 'Hold one day' main > /home/agent/bad-commit.txt"
FORGED = (
    "import os, signal\\nfor name in ('json', 'txt'):\\n try: open('/logs/verifier/reward.' + name, 'w').write('1')\\n"
)
FORGED += " except OSError: pass\\nos.kill(os.getppid(), signal.SIGKILL)\\n"
ATTEMPTS = (
    Attempt("git-regression", "names the commit, repairs nothing", BAD_COMMIT),
    Attempt(
        "git-regression",
        "goes back to the old release, and loses what was learned since",
        f"{BAD_COMMIT}; cd tally && git checkout -q v1.0 -- tally && git rm -q tally/billing.py && git commit -qm back",
    ),
    Attempt(
        "git-regression",
        "rewrites history",
        f"{BAD_COMMIT}; cd /home/agent/tally && git reset -q --soft HEAD~2 && git commit -qm squashed",
        solved=True,
    ),
    Attempt(
        "git-regression",
        "lets the program write the reward and end the tests",
        f'{BAD_COMMIT}; cd tally && printf "{FORGED}" > tally/__init__.py && git commit -qam forged',
    ),
    Attempt(
        "permissions", "one mode for all", "cd share && find . -type d -exec chmod 2750 {} + ; chmod -R u+rwX,g-w,o= ."
    ),
    Attempt("permissions", "keeps everything", "cd /home/agent/share && find . -printf '%P\\n' > KEEP"),
    Attempt("permissions", "follows a link out of the share", "chmod 640 /home/agent/elsewhere/drive.txt", solved=True),
    Attempt(
        "permissions",
        "leaves the tool to the umask",
        edit("/home/agent/share/bin/new-project", "umask 027", "umask 022")
        + " && sed -i '/^chmod/d' /home/agent/share/bin/new-project",
        solved=True,
    ),
    Attempt(
        "backup-restore",
        "unpacks everything over one another, by name",
        "mkdir all && for f in backup/*.tar*; do tar xf $f -C all; done; mkdir restored && cp -a all/books restored/"
        " && echo office-k.tar.gz > newest.txt",
    ),
    Attempt(
        "backup-restore", "names the newest that unpacks", "echo office-h.tar.gz > /home/agent/newest.txt", solved=True
    ),
    Attempt(
        "backup-restore", "restores more than was asked for", "cp -a /tmp/all/mail /home/agent/restored/", solved=True
    ),
    Attempt("crontab", "an empty list", "printf 'SHELL=/bin/bash\\n' > /home/agent/cron/crontab"),
    Attempt(
        "crontab",
        "changes the wishes",
        "cd /home/agent/cron && echo '# What runs when' > wishes.md && sed -i '/^[^#A-Z]/d' crontab",
    ),
    Attempt(
        "crontab",
        "day of month or day of week",
        edit("/home/agent/cron/crontab", "5 0 1 * *", "5 0 1 * 0-6"),
        solved=True,
    ),
    Attempt("crontab", "a bare percent sign", edit("/home/agent/cron/crontab", "\\%F", "%F"), solved=True),
    Attempt(
        "crontab",
        "one step for ninety minutes",
        "sed -i '/tide/d; $a */90 * * * * /srv/jobs/tide.py' /home/agent/cron/crontab",
        solved=True,
    ),
    Attempt(
        "crontab",
        "lets the command look at the clock",
        "sed -i '/rotate/d; $a 5 0 * * * [ $(date +\\\\%d) = 01 ] && /srv/jobs/rotate.sh' /home/agent/cron/crontab",
        solved=True,
    ),
    Attempt(
        "c-build", "empties its own test", "cd /home/agent/shelf && printf 'all check clean:\\n\\t@true\\n' > Makefile"
    ),
    Attempt(
        "c-build",
        "drops leave their gap",
        edit("/home/agent/shelf/src/table.c", "table->entries[i].key; i = (i + 1)", "0; i = (i + 1)"),
        solved=True,
    ),
    Attempt(
        "c-build",
        "one byte too few",
        edit("/home/agent/shelf/src/table.c", "strlen(text) + 1", "strlen(text)"),
        solved=True,
    ),
    Attempt(
        "c-build",
        "lets the build write the reward",
        "cd /home/agent/shelf && printf 'all:\\n\\techo 1 > /logs/verifier/reward.json; kill -9 $$PPID\\n' > Makefile",
    ),
    Attempt(
        "stock-service",
        "takes the copy for the state",
        "cd /home/agent/stock && cp stock-2023-05-01.json stock.json",
        solved=True,
    ),
    Attempt(
        "stock-service",
        "writes over the file",
        edit(
            "/home/agent/stock/server.py",
            'os.replace(STATE + ".new", STATE)',
            'open(STATE, "w").write(open(STATE + ".new").read())',
        ),
        solved=True,
    ),
    Attempt(
        "stock-service",
        "keeps nothing",
        edit("/home/agent/stock/server.py", "    save(state)\n    return 200", "    return 200"),
        solved=True,
    ),
    Attempt("supervisor", "does nothing, and well", "echo 'print(\"stopping\")' > /home/agent/keeper/keeper.py"),
    Attempt(
        "supervisor",
        "starts again at once",
        edit("/home/agent/keeper/keeper.py", "(0.2, 0.4, 0.8, 1.6)", "(0.0,)"),
        solved=True,
    ),
    Attempt(
        "supervisor",
        "tells the programs, not their groups",
        edit(
            "/home/agent/keeper/keeper.py", "os.killpg(self.process.pid, number)", "os.kill(self.process.pid, number)"
        ),
        solved=True,
    ),
)


async def play(task: Task, *commands: str) -> float | None:
    """The reward after some commands, each of which has to succeed."""
    async with open_terminal_env(task, backend_or_skip(), TerminalConfig(command_timeout_s=120)) as env:
        await env.reset()
        for command in commands:
            step = await env.step(ToolCall("bash", {"command": command}))
            said = "".join(message.text for message in step.messages)
            assert "[exit code" not in said and not step.timed_out, said
        return await env.score()


async def all_at_once(plays: dict[str, tuple[Task, tuple[str, ...]]]) -> dict[str, float | None]:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(task: Task, commands: tuple[str, ...]) -> float | None:
        async with gate:
            return await play(task, *commands)

    return dict(zip(plays, await asyncio.gather(*(one(*each) for each in plays.values())), strict=True))


def solve(task: Task) -> str:
    return task.solution["solve.sh"].content.decode()


async def test_each_solution_earns_the_whole_reward() -> None:
    backend_or_skip()
    rewards = await all_at_once({name: (task, (solve(task),)) for name, task in TASKS.items()})
    assert rewards == dict.fromkeys(TASKS, 1.0)


async def test_an_untouched_world_is_a_valid_failure() -> None:
    backend_or_skip()
    rewards = await all_at_once({name: (task, ()) for name, task in TASKS.items()})
    assert rewards == dict.fromkeys(TASKS, 0.0)


async def test_half_a_solution_or_a_forged_one_earns_nothing() -> None:
    backend_or_skip()
    plays = {
        f"{attempt.task}: {attempt.what}": (
            TASKS[attempt.task],
            (*([f"({solve(TASKS[attempt.task])}\n)"] if attempt.solved else []), attempt.command),
        )
        for attempt in ATTEMPTS
        if attempt.task in TASKS  # not where this machine has no git or gcc
    }
    assert await all_at_once(plays) == dict.fromkeys(plays, 0.0)


def test_what_there_is_to_choose_from() -> None:
    assert set(TASKS) <= set(NAMES) and len(NAMES) == 12
    folder = Path(__file__).parents[2] / "src/backtalk/assets/tasks/workbench"
    assert sorted(path.name for path in folder.iterdir()) == NAMES
    assert all(task.instruction.strip() and "solve.sh" in task.solution for task in TASKS.values())
    assert all(task == replace(task) and task.metadata.get("needs") for task in TASKS.values())


def test_what_stands_in_several_places_is_the_same() -> None:
    folder = Path(__file__).parents[2] / "src/backtalk/assets/tasks/workbench"
    fences = {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*/tests/fence.py")}
    assert len(fences) == 1
    for path in folder.glob("*/tests/make_world.py"):
        assert path.read_bytes() == (path.parent.parent / "environment/make_world.py").read_bytes()


def test_nothing_of_the_tests_stands_in_the_world() -> None:
    for task in TASKS.values():
        contents = {file.content for path, file in task.files.items() if not path.endswith("/make_world.py")}
        hidden = {file.content for path, file in task.tests.items() if path in ("check.py", "test.sh", "judge.c")}
        assert not contents & hidden and not contents & {file.content for file in task.solution.values()}
