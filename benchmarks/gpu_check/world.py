"""A shell in this process, for machines without a sandbox: a few commands over files that exist in memory only."""

from __future__ import annotations

import random
import shlex
from collections.abc import Sequence

from backtalk.envs.python import PythonEnv, PythonWorld
from backtalk.tasks.task import Task

LEVELS = ("INFO", "WARN", "ERROR")


class Shell(PythonEnv):
    """One rollout: `ls`, `cat FILE`, `wc -l FILE` and `grep -c WORD FILE`, and an answer."""

    system = "You work in a Linux shell. Run commands with bash, and finish with submit."
    answer: str | None = None

    def bash(self, command: str) -> str:
        """Run a command and see what it prints."""
        files: dict[str, str] = self.task.metadata["files"]
        try:
            words = shlex.split(command)
        except ValueError:
            return "bash: unexpected end of line"
        match words:
            case ["ls", *_]:
                return "\n".join(sorted(files))
            case ["cat" | "head" | "tail", *_, name] if name in files:
                return files[name]
            case ["wc", "-l", name] if name in files:
                return f"{files[name].count(chr(10))} {name}"
            case ["grep", "-c", word, name] if name in files:
                return str(sum(word in line for line in files[name].splitlines()))
            case ["cat" | "head" | "tail" | "wc" | "grep", *_, name]:
                return f"{words[0]}: {name}: No such file or directory"
            case [program, *_]:
                return f"bash: line 1: {program}: command not found"
            case _:
                return ""

    def submit(self, answer: str) -> str:
        """Give the answer and finish."""
        self.answer, self.done = answer, True
        return "submitted"

    def reward(self) -> float:
        return float(self.answer is not None and self.answer.strip() == self.task.metadata["answer"])


class ShellWorld(PythonWorld):
    """Questions about how often a level occurs in a log."""

    env = Shell

    def all_tasks(self) -> Sequence[Task]:
        return [make_task(number) for number in range(200)]


def make_task(number: int) -> Task:
    """Return a task whose log and question follow from its number."""
    noise = random.Random(number)
    seconds = range(noise.randint(3, 12))
    lines = [f"2026-01-01 00:00:{second:02d} {noise.choice(LEVELS)} job {second}" for second in seconds]
    level = noise.choice(LEVELS)
    return Task(
        id=f"log/{number}",
        instruction=f"How many lines of app.log hold {level}? Submit the number.",
        metadata={"files": {"app.log": "\n".join(lines) + "\n"}, "answer": str(sum(level in line for line in lines))},
    )
