"""Generate triage tasks: an alert fires, and the agent finds its cause in the files of a simulated machine.

Each task has a machine of its own, made from a seed: services with configs, unit files, logs, metrics, a process
table and backups. A question is answered with ordinary tools over those files; some also want a file changed. Levels:

1. one command over a file that is named
2. one pipeline, or two commands: the file has to be found, or the lines to be put in order
3. one file leads to the next, or a file has to be changed
4. only the alert is given: compare, repair, and name the cause
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from random import Random

from backtalk.errors import ConfigError
from backtalk.sandboxes.base import SandboxFile
from backtalk.tasks.task import Split, Task, split_of
from backtalk.tasks.triage.machine import EPOCH, build_machine
from backtalk.tasks.triage.questions import QUESTIONS

LEVELS = tuple(QUESTIONS)

_TEST = """\
# Reward 1 when the answer is right and the box is as it was asked to be.
reward=0
IFS= read -r answer < /logs/agent/answer.txt || true
answer="${{answer#"${{answer%%[![:space:]]*}}"}}"
answer="${{answer%"${{answer##*[![:space:]]}}"}}"
if [ "$answer" = '{answer}' ] && {{ {check}; }}; then reward=1; fi
echo "$reward" > /logs/verifier/reward.txt
"""

_SOLUTION = """\
mkdir -p /logs/agent
answer=$({solve})
echo "$answer" > /logs/agent/answer.txt
"""


@cache
def triage_task(seed: int, level: int) -> Task:
    """Generate the task of one seed at one level: the same one on every machine and every day.

    Raises:
        ConfigError: there is no such level.
    """
    if level not in QUESTIONS:
        raise ConfigError(f"triage level {level} does not exist; use levels {min(LEVELS)} to {max(LEVELS)}")
    random = Random(f"triage/{level}/{seed}")
    machine = build_machine(random, num_services=random.randint(2, 4) + (level > 2))
    builder = random.choice(QUESTIONS[level])
    question = builder(machine)
    return Task(
        id=task_id(seed, level),
        instruction=question.instruction,
        files=dict(sorted(machine.files.items())),
        tests={"test.sh": _script(_TEST.format(answer=question.answer, check=question.check))},
        solution={"solve.sh": _script(_SOLUTION.format(solve=question.solve))},
        verifier_timeout_s=20.0,
        metadata={
            "kind": builder.__name__,
            "level": level,
            "answer": question.answer,
            "commands": list(question.commands),
        },
    )


def triage_tasks(*, split: Split, levels: Sequence[int], count: int, seed: int = 0) -> list[Task]:
    """Generate ``count`` distinct tasks of one split, with the levels in turn.

    Raises:
        ConfigError: there is no level, or one that does not exist.
    """
    if not levels:
        raise ConfigError("triage without a level has no task; use levels such as [1, 2]")
    tasks: list[Task] = []
    numbers = itertools.count(seed * 1_000_003)
    while len(tasks) < count:
        number, level = next(numbers), levels[len(tasks) % len(levels)]
        if split_of(task_id(number, level)) is split:
            tasks.append(triage_task(number, level))
    return tasks


def task_id(seed: int, level: int) -> str:
    """Return the id of the task of one seed at one level."""
    return f"triage-{level}-{seed}"


def _script(text: str) -> SandboxFile:
    return SandboxFile(text.encode(), mode=0o755, mtime=EPOCH)
