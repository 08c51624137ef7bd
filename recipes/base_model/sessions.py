"""Script the explorers: ordinary shell sessions, and mediocre rollouts of triage tasks.

A session is a task with an explorer's commands and answer. Explorers know the files of their task, so the commands are
written down before they run; their output is real.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from random import Random

from backtalk.sandboxes.base import SandboxFile
from backtalk.tasks.task import Task
from backtalk.tasks.triage import triage_task
from backtalk.tasks.triage.machine import HOSTS, KEYS, SERVICES

WORDS = (
    "apple river stone bread window garden paper music winter summer yellow green letter market bridge orange silver "
    "candle forest mountain island kitchen butter pencil ticket engine doctor teacher travel simple basket rabbit "
    "pepper coffee sugar lemon cotton leather copper marble copy list done todo call buy read write plan meet fix "
    "send check paint clean cook walk visit order open close first second third left right small large old new"
).split()
FOLDERS = "notes work src data docs mail photos recipes drafts letters homework music".split()
NAMES = "anna bert carl dora emil fred greta hans ida jon karin lena max nina otto paula".split()
EXTENSIONS = "txt md csv py log cfg".split()


@dataclass(frozen=True, slots=True)
class Session:
    """A task, the explorer's commands, its answer, and whether that is right. ``ordinary`` sessions are not triage."""

    task: Task
    commands: tuple[str, ...]
    answer: str
    ordinary: bool
    right: bool


def ordinary_session(seed: int) -> Session:
    """Make a session in a home folder: a small task, and a few commands that look around."""
    random = Random(f"ordinary/{seed}")
    files = _home(random)
    path = random.choice(sorted(files))
    lines = files[path].content.decode().splitlines()
    word = random.choice(" ".join(lines).replace(",", " ").split())
    wish, command, answer = random.choice(
        (
            (f"Count the lines of {path}.", f"wc -l {path}", str(len(lines))),
            (f"Count lines with {word} in {path}.", f"grep -c '{word}' {path}", str(sum(word in x for x in lines))),
            (f"Show the first line of {path}.", f"head -n 1 {path}", lines[0]),
            (f"Show the last line of {path}.", f"tail -n 1 {path}", lines[-1]),
            (f"Find {path.rsplit('/', 1)[1]}.", f"find /home/agent -name {path.rsplit('/', 1)[1]}", path),
            ("Look around.", f"ls {path.rsplit('/', 1)[0]}", "done"),
            (f"Sort {path} and show what comes last.", f"sort {path} | tail -n 1", sorted(lines)[-1]),
        )
    )
    commands = [_look_around(random, sorted(files)) for _ in range(random.randint(1, 5))]
    commands.insert(random.randint(0, len(commands)), command)
    check = f'[ "$(cat /logs/agent/answer.txt)" = {shlex.quote(answer)} ]; echo $((! $?)) > /logs/verifier/reward.txt\n'
    tests = {"test.sh": SandboxFile(check.encode(), mode=0o755)}
    task = Task(id=f"ordinary-{seed}", instruction=wish, files=files, tests=tests)
    return Session(task, tuple(commands), answer, ordinary=True, right=True)


def triage_session(seed: int, level: int, skill: float) -> Session:
    """Make a session of a triage task: with probability ``skill`` the right commands, otherwise a guess."""
    task = triage_task(seed, level)
    random = Random(f"explorer/{level}/{seed}")
    commands: list[str] = list(task.metadata["commands"])
    answer: str = task.metadata["answer"]
    if random.random() >= skill:
        paths = sorted(task.files)
        style = random.randrange(3)
        if style == 0:  # the right look, the wrong conclusion
            answer = _guess(random, answer)
        elif style == 1:  # looks elsewhere
            commands = [_look_around(random, paths) for _ in range(random.randint(1, 3))]
            answer = _guess(random, answer)
        else:  # looks elsewhere first, then gives up half way
            commands = [_look_around(random, paths), commands[0]][: random.randint(1, 2)]
            answer = _guess(random, answer)
    return Session(task, tuple(commands), answer, ordinary=False, right=answer == task.metadata["answer"])


def _guess(random: Random, answer: str) -> str:
    """Return an answer of the right kind, seldom the right one."""
    if ":" in answer:
        return f"{random.randrange(24):02}:{random.randrange(60):02}"
    if "." in answer:
        return f"10.{random.randrange(100)}.{random.randrange(100)}.{random.randrange(255)}"
    if answer.isdigit():
        return str(random.randrange(10 ** random.randint(1, 4)))
    for kind in (HOSTS, SERVICES, KEYS):
        if answer in kind:
            return random.choice(kind)
    return "done"


def _look_around(random: Random, paths: list[str]) -> str:
    """Return a command that looks around."""
    path = random.choice(paths)
    folder = path.rsplit("/", 1)[0]
    return random.choice(
        (
            f"ls {folder}",
            f"ls -l {folder}",
            f"cat {path}",
            f"cat {path}",
            f"head -n {random.randint(1, 4)} {path}",
            f"tail -n {random.randint(1, 4)} {path}",
            f"wc -l {path}",
            f"wc {path}",
            f"sort {path}",
            f"stat -c %s {path}",
            f"find {folder} -type f",
            f"cat {path}x",
            f"grep -n {random.choice('aeiou')} {path}",
            f"cut -d ' ' -f 1 {path}",
            "pwd",
            f"cd {folder}",
            f"sort {path} | uniq -c",
        )
    )


def _home(random: Random) -> dict[str, SandboxFile]:
    files: dict[str, SandboxFile] = {}
    for folder in random.sample(FOLDERS, random.randint(1, 3)):
        for _ in range(random.randint(1, 3)):
            extension = random.choice(EXTENSIONS)
            stem = random.choice((random.choice(WORDS), f"{random.choice(NAMES)}{random.randint(1, 99)}"))
            content = "".join(line + "\n" for line in _content(random, extension))
            mtime = 1_767_225_600 + random.randrange(200 * 86_400)
            files[f"/home/agent/{folder}/{stem}.{extension}"] = SandboxFile(content.encode(), mtime=mtime)
    return files


def _content(random: Random, extension: str) -> list[str]:
    count = random.randint(2, 10)
    match extension:
        case "csv":
            rows = (f"{random.choice(NAMES)},{random.randrange(100)},{random.randrange(3000)}" for _ in range(count))
            return ["name,age,score", *rows]
        case "py":
            names = random.sample(WORDS, count)
            return [
                f"def {name}(x):  # {random.choice(WORDS)}\n    return x + {random.randrange(100)}" for name in names
            ]
        case "cfg":
            return [f"{random.choice(WORDS)}: {random.randrange(10_000)}" for _ in range(count)]
        case "log":
            return [
                f"{random.randrange(24):02}:{random.randrange(60):02} {random.choice(NAMES)} {random.choice(WORDS)}"
                for _ in range(count)
            ]
        case _:
            return [" ".join(random.choices(WORDS, k=random.randint(2, 6))) for _ in range(count)]
