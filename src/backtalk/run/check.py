"""Check task folders: that each can be read, starts, is not solved untouched, and is solved by its solution."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path

from backtalk.envs.terminal import ANSWER, TerminalConfig, TerminalEnv
from backtalk.errors import BacktalkError, TaskError, VerifierError
from backtalk.messages import ToolCall
from backtalk.sandboxes.base import SandboxBackend
from backtalk.sandboxes.root import Root
from backtalk.tasks.folder import read_harbor_task
from backtalk.tasks.load import reason_kind
from backtalk.tasks.needs import missing_tools
from backtalk.tasks.task import Task

_TAIL = 600  # characters of output in a finding
_NOT_COLLECTED = re.compile(
    r"errors? during collection|ERROR collecting|ImportError while importing test module|No module named '?pytest"
    r"|pytest: command not found|ModuleNotFoundError: No module named"
)
_NO_MODULE = re.compile(r"No module named '?(\w+)")


class Verdict(StrEnum):
    """What is wrong with a task, or that nothing is."""

    SOUND = "sound"
    REFUSED = "refused"
    SERVICE = "tests look for a running service"
    NEEDS = "needs what is not here"
    SAME_ID = "has the id of another task"
    CANNOT_START = "cannot start"
    NO_REWARD = "tests leave no reward"
    NOT_COLLECTED = "tests cannot be collected"
    UNTOUCHED = "untouched already earns 1"
    UNSOLVED = "solution does not earn 1"


@dataclass(frozen=True, slots=True)
class Finding:
    """The verdict on one task folder. ``kind`` is what reasons of one kind share, ``reason`` says where and why."""

    folder: str
    verdict: Verdict
    reason: str = ""
    kind: str = ""
    state: str = ""  # a hash of the folder's files, sizes and times


def read_for_check(
    folders: Sequence[Path], *, host_packages: bool, root: Root | None
) -> tuple[list[Finding], dict[Path, Task]]:
    """Read task folders; return findings on those that need no sandbox to be found unsound, and the other tasks."""
    findings: list[Finding] = []
    tasks: dict[Path, Task] = {}
    ids: dict[str, Path] = {}
    for folder in folders:
        try:
            task = read_harbor_task(folder, host_packages=host_packages)
            missing = missing_tools(task, root)
        except TaskError as error:
            verdict = Verdict.SERVICE if "looks for a running service" in str(error) else Verdict.REFUSED
            findings.append(Finding(str(folder), verdict, str(error), reason_kind(str(error), folder)))
            continue
        if missing:
            findings.append(
                Finding(str(folder), Verdict.NEEDS, f"{folder}: lacks {', '.join(missing)}", ", ".join(missing))
            )
        elif task.id in ids:
            findings.append(Finding(str(folder), Verdict.SAME_ID, f"{folder}: {task.id!r} is the id of {ids[task.id]}"))
        else:
            ids[task.id], tasks[folder] = folder, task
    return findings, tasks


async def check_tasks(
    tasks: dict[Path, Task],
    backend: SandboxBackend,
    config: TerminalConfig,
    *,
    num_concurrent: int,
    timeout_s: float,
    on_finding: Callable[[Finding], None],
) -> None:
    """Start every task, score it untouched and with its solution; ``on_finding`` is called as each is done.

    ``timeout_s`` bounds a run of the tests, and of a solution.
    """
    waiting = iter(tasks.items())

    async def work() -> None:
        for folder, task in waiting:
            verdict, reason = await _check(task, backend, config, timeout_s)
            kind = "" if verdict is Verdict.SOUND else verdict.value
            on_finding(
                Finding(str(folder), verdict, f"{folder}: {reason}" if reason else "", kind, folder_state(folder))
            )

    async with asyncio.TaskGroup() as group:
        for _ in range(num_concurrent):
            group.create_task(work())


async def _check(task: Task, backend: SandboxBackend, config: TerminalConfig, timeout_s: float) -> tuple[Verdict, str]:
    """Return the verdict on one task, and the reason."""
    task = replace(task, verifier_timeout_s=min(task.verifier_timeout_s, timeout_s))
    try:
        reward, output = await _play(task, backend, config, None)
        if reward is None:  # not scored
            return Verdict.SOUND, ""
        if reward >= 1:
            return Verdict.UNTOUCHED, f"an untouched sandbox earns {reward:g}"
        if "solve.sh" not in task.solution:
            module = _NO_MODULE.search(output)
            is_own = module is not None and re.search(rf"\b{module.group(1)}\b", task.instruction)
            if _NOT_COLLECTED.search(output) and not is_own:
                return Verdict.NOT_COLLECTED, output[-_TAIL:]
            return Verdict.SOUND, ""
        reward, output = await _play(task, backend, config, timeout_s)
        if reward is not None and reward >= 1:
            return Verdict.SOUND, ""
        verdict = Verdict.NOT_COLLECTED if _NOT_COLLECTED.search(output) else Verdict.UNSOLVED
        return verdict, f"its solution earns {reward:g}; {output[-_TAIL:]}"
    except VerifierError as error:
        return Verdict.NO_REWARD, str(error)
    except BacktalkError as error:
        return Verdict.CANNOT_START, str(error)


async def _play(
    task: Task, backend: SandboxBackend, config: TerminalConfig, solve_timeout_s: float | None
) -> tuple[float | None, str]:
    """Start a task, run its solution where a time for it is given, and return the reward and what was printed."""
    async with backend.open(config.sandbox) as sandbox:
        env = TerminalEnv(task, sandbox, config)
        await env.reset()
        printed = ""
        if solve_timeout_s is not None:
            places = {f"/solution/{path}": file for path, file in task.solution.items()}
            await sandbox.put(places)
            solved = await sandbox.exec("bash /solution/solve.sh", timeout_s=solve_timeout_s)
            if solved.timed_out or solved.exit_code:
                printed = f"solve.sh ended with exit code {solved.exit_code}: {solved.output[-_TAIL:]}\n"
            if (answer := await sandbox.get(ANSWER)) is not None:  # a file there does not outlast the scoring
                await env.step(ToolCall("submit", {"answer": answer.decode("utf-8", "replace")}))
        reward = await env.score()
        return reward, printed + env.test_output


def folder_state(folder: Path) -> str:
    """Return a hash of the names, sizes and times of a folder's files, by which a changed task is told."""
    states = [(str(p.relative_to(folder)), p.lstat().st_size, p.lstat().st_mtime_ns) for p in sorted(folder.rglob("*"))]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:32]


def read_record(path: Path) -> dict[str, Finding]:
    """Return the findings that an interrupted check has left, by folder, of folders that have not changed since."""
    found: dict[str, Finding] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            fields = json.loads(line)
            finding = Finding(**{**fields, "verdict": Verdict(fields["verdict"])})
        except (ValueError, TypeError, KeyError):
            continue  # the line that was being written
        if Path(finding.folder).is_dir() and folder_state(Path(finding.folder)) == finding.state:
            found[finding.folder] = finding
    return found


def record_line(finding: Finding) -> str:
    """Return a finding as a line of JSON."""
    return json.dumps(asdict(finding)) + "\n"
