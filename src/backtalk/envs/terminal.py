"""Give the agent a shell in a sandbox: it runs commands and submits an answer, and the task's script scores the files.

Each part of an observation gets its token role here, where its text is made: a command's output is ENV_OUTPUT,
unchanged, and all that the harness adds around it is WARNING.
"""

from __future__ import annotations

import json
import math
import posixpath
import secrets
import shlex
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

from backtalk.envs.base import Step, WorldReport, text_tool, warning_step
from backtalk.envs.screen import shown_text
from backtalk.errors import ConfigError, SandboxError, TaskError, VerifierError
from backtalk.messages import Message, Part, ToolCall, ToolSpec, truncate_text
from backtalk.sandboxes.base import DEFAULT_PATH, HOME, ExecResult, Sandbox, SandboxBackend, SandboxFile, SandboxLimits
from backtalk.sandboxes.images.users import PASSWD
from backtalk.settings import check_choices
from backtalk.tasks.task import Split, Task
from backtalk.trajectory import TokenRole

ANSWER = "/logs/agent/answer.txt"
REWARD_FILES = ("/logs/verifier/reward.json", "/logs/verifier/reward.txt")  # the first that is there counts
SETUP_TIMEOUT_S = 120.0
NEW_SHELL = "[the shell ended; a new one has its folder and exported variables, no other variables, functions, options]"

BASH = text_tool(
    "bash",
    "Run a bash command. The shell lives on between calls: its folder, variables and background jobs persist.",
    *("command", "the command"),
)
SUBMIT = text_tool("submit", "Finish the task with an answer.", "answer", "the answer; empty where none is asked for")

# Tests start from this and the task's own variables; nothing that the agent exported reaches them.
# PYTHONNOUSERSITE: Python would run a sitecustomize module that the agent left in its home.
_TEST_ENV = {
    "PATH": DEFAULT_PATH,
    "HOME": HOME,
    "USER": "agent",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONNOUSERSITE": "1",
}

# Run in the fresh process namespace, before the tests. The agent may have made any of these places a link, a
# file, or a folder that cannot be removed as it is. pytest reads settings from the folders above its tests.
# Nothing else is cleared: any other folder, /solution too, may hold what the agent was asked to write.
_CLEAR = """\
cd /
if [ -L /logs ] || [ ! -d /logs ]; then rm -rf /logs; elif [ ! -w /logs ] || [ ! -x /logs ]; then chmod u+rwx /logs; fi
set -- /tests /logs/verifier /logs/agent
set -- "$@" /conftest.py /pytest.ini /.pytest.ini /pyproject.toml /tox.ini /setup.cfg
rm -rf "$@" 2>/dev/null || { chmod -fR u+rwX "$@"; rm -rf "$@"; }
mkdir -p /logs/verifier
"""


TOOLS: Mapping[str, ToolSpec] = {tool.name: tool for tool in (BASH, SUBMIT)}
LoadTasks = Callable[[Split, int, int], Sequence[Task]]  # by split, count and seed


@dataclass(frozen=True, kw_only=True, slots=True)
class TerminalConfig:
    """Settings of the terminal that the agent gets."""

    system_prompt: str = "You work in a Linux shell. Run commands with bash, and finish with submit."
    """System message, before the task."""
    tools: tuple[str, ...] = ("bash", "submit")
    """[bash, submit] or [bash]; without submit only a budget ends a rollout, and no answer is given."""
    command_timeout_s: float = 30.0
    """Seconds for one command."""
    max_output_chars: int = 8000
    """Of the output of one command."""
    truncate: Literal["both", "head", "tail"] = "both"
    """What stays of a longer output."""
    output: Literal["shown", "raw"] = "shown"
    """shown: what a terminal would show, of a progress bar its last frame; raw: all that was written."""
    root: str | None = None
    """Root file system to start from: a folder, `docker export`'s tar, a Dockerfile; null is our own."""
    sandbox: SandboxLimits = field(default_factory=SandboxLimits)

    def __post_init__(self) -> None:
        if self.command_timeout_s <= 0 or self.max_output_chars < 2:
            raise ConfigError(
                f"command_timeout_s={self.command_timeout_s} and max_output_chars={self.max_output_chars}: "
                "need more than 0 seconds and at least 2 characters"
            )
        check_choices(self)
        if "bash" not in self.tools or len(set(self.tools)) < len(self.tools) or not TOOLS.keys() >= {*self.tools}:
            raise ConfigError(f"terminal.tools={list(self.tools)} is no terminal; use [bash, submit], or [bash]")
        if "submit" not in self.tools and "submit" in self.system_prompt:
            raise ConfigError(
                f"system_prompt={self.system_prompt!r} speaks of submit, which is not among tools={list(self.tools)}; "
                "write one that says what ends the work"
            )


class TerminalEnv:
    """A rollout of one task in one sandbox (an ``Env``).

    Raises:
        TaskError: the task has no tests/test.sh, so nothing could score it.
    """

    def __init__(self, task: Task, sandbox: Sandbox, config: TerminalConfig) -> None:
        if "test.sh" not in task.tests and not task.world_model_only:
            raise TaskError(
                f"task {task.id!r} has no tests/test.sh, so nothing can score it; add one, or world_model_only = true "
                "to its [metadata]"
            )
        self.task = task
        self.config = config
        self._sandbox = sandbox
        self._answer: str | None = None
        self.metrics: Mapping[str, float] = {}  # of the verifier beside the reward, once it has scored
        self.test_output = ""  # what the tests printed, once they ran

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        return tuple(TOOLS[name] for name in self.config.tools)

    async def reset(self) -> tuple[Message, ...]:
        """Put the files, run the setup, and return the system message and the instruction.

        Raises:
            SandboxError: the sandbox broke, or a setup command failed.
        """
        await set_up_task(self._sandbox, self.task)
        system = Message("system", (Part(self.config.system_prompt, TokenRole.CONTEXT),))
        user = Message("user", (Part(self.task.instruction.strip(), TokenRole.CONTEXT),))
        return (system, user)

    async def step(self, call: ToolCall) -> Step:
        """Run a command, or take the answer. A call that cannot be carried out is answered with a WARNING."""
        if self._answer is not None:
            raise RuntimeError(f"task {self.task.id!r} was submitted; there is no step after that")
        if call.tool not in self.config.tools:
            known = "the tools are bash and submit" if len(self.config.tools) > 1 else "the tool is bash"
            return warning_step(call, f"[unknown tool {call.tool}; {known}]")
        argument = "command" if call.tool == "bash" else "answer"
        text = call.arguments.get(argument)
        if not isinstance(text, str):
            return warning_step(call, f"[{call.tool} needs the argument {argument}, a text]")
        if call.tool == "submit":
            self._answer = text  # kept here until the agent's processes are gone, so that none of them can change it
            return Step((), done=True, submitted=True)
        result = await self._sandbox.exec(text, timeout_s=self.config.command_timeout_s)
        parts, truncated = _observation(result, self.config)
        return Step((Message("tool", parts, tool=call.tool),), timed_out=result.timed_out, truncated=truncated)

    async def score(self) -> float | None:
        """Run the tests over the files as the agent left them, in a fresh process namespace, and return their reward.

        None for a task that is ``world_model_only``.

        Raises:
            VerifierError: the tests left no finite reward: the rollout has none, which is never a reward of 0.
            SandboxError: the sandbox broke.
        """
        task = self.task
        if task.world_model_only:
            return None
        await self._sandbox.restart()
        # The agent knew /tests and could have prepared it (a link, a conftest.py), but not this name.
        stage = f"/.tests-{secrets.token_hex(16)}"
        files = {f"{stage}/tests/{path}": file for path, file in task.tests.items()}
        if self._answer is not None:
            files[f"{stage}/agent/answer.txt"] = SandboxFile(self._answer.encode("utf-8", "replace"))
        await self._sandbox.put(files)
        command = _test_command(task, stage, answered=self._answer is not None)
        result = await self._sandbox.exec(command, timeout_s=task.verifier_timeout_s)
        self.test_output = result.output
        output = f"; their output ended:\n{result.output[-1000:]}" if result.output else ""
        if result.timed_out:
            raise VerifierError(
                f"the tests of task {task.id!r} did not end within {task.verifier_timeout_s:g} s; "
                f"give them more ([verifier] timeout_sec), or make them faster{output}"
            )
        for path in REWARD_FILES:
            content = await self._sandbox.get(path)
            if content is None:
                continue
            if (parsed := _parse_reward(path, content)) is not None:
                reward, self.metrics = parsed
                return reward
            found = repr(content[:200].decode("utf-8", "replace")) if content.strip() else "nothing"
            raise VerifierError(
                f"the tests of task {task.id!r} left {found} in {posixpath.basename(path)}, which is no finite reward; "
                f'write one number, or in reward.json numbers by name such as {{"reward": 1.0}}{output}'
            )
        raise VerifierError(
            f"the tests of task {task.id!r} wrote neither {REWARD_FILES[1]} nor reward.json "
            f"(exit code {result.exit_code}); tests/test.sh has to write one{output}"
        )


@asynccontextmanager
async def open_terminal_env(task: Task, backend: SandboxBackend, config: TerminalConfig) -> AsyncIterator[TerminalEnv]:
    """Open a terminal for one task in a fresh sandbox, which is removed on exit."""
    async with backend.open(config.sandbox) as sandbox:
        yield TerminalEnv(task, sandbox, config)


class TerminalWorld:
    """Terminals for tasks, each in a fresh sandbox (a ``World``).

    ``load`` returns its tasks by split, count and seed; without one it has none of its own.
    """

    def __init__(self, backend: SandboxBackend, config: TerminalConfig, load: LoadTasks | None = None) -> None:
        self._backend, self._config, self._load = backend, config, load

    @property
    def report(self) -> WorldReport:
        return WorldReport(f"terminal in {self._backend.report.name}", self._backend.report.warnings)

    def tasks(self, split: Split, count: int, seed: int) -> Sequence[Task]:
        return () if self._load is None else self._load(split, count, seed)

    def open(self, task: Task) -> AbstractAsyncContextManager[TerminalEnv]:
        return open_terminal_env(task, self._backend, self._config)

    async def close(self) -> None:
        """Do nothing: the sandbox of a rollout is gone when the rollout ends."""


async def set_up_task(sandbox: Sandbox, task: Task) -> None:
    """Put a task's files into a fresh sandbox and run its setup there; the session stays where the task begins.

    Raises:
        SandboxError: the sandbox broke, or a setup command failed.
    """
    await sandbox.put(task.files)
    if PASSWD in task.files:
        await _take_over_users(sandbox)
    for number, command in enumerate(_setup_commands(task)):
        result = await sandbox.exec(command, timeout_s=SETUP_TIMEOUT_S)
        if result.timed_out or result.exit_code != 0:
            what = f"timed out after {SETUP_TIMEOUT_S:g} s" if result.timed_out else f"exited {result.exit_code}"
            raise SandboxError(
                f"setup command {number} of task {task.id!r} {what}, so the task cannot start; it runs "
                f"offline and as one ordinary user:\n{command[:500]}\n{result.output[-1000:]}"
            )


async def _take_over_users(sandbox: Sandbox) -> None:
    """Begin a new session, since one keeps the table of users that it began with; its variables and folder stay."""
    state = await sandbox.exec("export -p; printf 'cd %q\\n' \"$PWD\"", timeout_s=SETUP_TIMEOUT_S)
    await sandbox.restart()
    await sandbox.exec(state.output, timeout_s=SETUP_TIMEOUT_S)


def _setup_commands(task: Task) -> list[str]:
    """Return the commands that the session runs before the agent; it stays where the task begins."""
    commands = []
    # The folders of dated files are dated too: `ls -l` would tell the hour of the run, and no run be repeatable.
    if dates := {path: file.mtime for path, file in task.files.items() if file.mtime is not None}:
        parents = {str(folder) for path in dates for folder in PurePosixPath(path).parents}
        folders = sorted((parents | {HOME, posixpath.dirname(HOME)}) - {"/"})
        commands.append(f"touch -c -d @{max(dates.values())} -- {shlex.join(folders)} 2>/dev/null || true")
    if task.workdir != HOME or task.env:
        workdir = shlex.quote(task.workdir)
        exports = "".join(f" && export {name}={shlex.quote(value)}" for name, value in task.env.items())
        commands.append(f"mkdir -p {workdir} && cd {workdir}{exports}")
    return commands + [f"bash -ec {shlex.quote(command)}" for command in task.setup]


def _test_command(task: Task, stage: str, *, answered: bool) -> str:
    """Return the command that moves tests and answer from the folder ``stage`` to their places and runs the tests."""
    env = " ".join(f"{name}={shlex.quote(value)}" for name, value in (_TEST_ENV | dict(task.env)).items())
    agent = f"mv {stage}/agent /logs/agent" if answered else "mkdir /logs/agent"
    workdir = shlex.quote(posixpath.normpath(task.workdir))
    # Nothing is cleared where commands see another tree than files are put in: that tree may be this machine's own.
    return (
        f"if [ ! -d {stage}/tests ]; then echo 'this sandbox shows commands another tree than files are put in'; else\n"
        f"{_CLEAR}mv {stage}/tests /tests && {agent} && rmdir {stage} && {{ cd {workdir} || cd /; }} && "
        f"env -i {env} bash /tests/test.sh\nfi"
    )


def _observation(result: ExecResult, config: TerminalConfig) -> tuple[tuple[Part, ...], bool]:
    halves, notices = [result.output[: result.dropped_at], result.output[result.dropped_at :]], []
    head, tail = map(shown_text, halves) if config.output == "shown" else halves
    output = head + tail
    parts = truncate_text(
        output,
        config.max_output_chars,
        TokenRole.ENV_OUTPUT,
        config.truncate,
        dropped_bytes=result.dropped_bytes,
        dropped_at=len(head),
    )
    if result.timed_out:
        notices.append(f"[timed out after {config.command_timeout_s:g} s; the command was stopped]")
    elif result.exit_code != 0:
        notices.append(f"[exit code {result.exit_code}]")
    elif not parts and not notices:
        notices.append("[no output]")
    if result.new_shell:
        notices.append(NEW_SHELL)
    if notices:
        own_line = "\n" if parts and not parts[-1].text.endswith("\n") else ""
        parts.append(Part(own_line + "\n".join(notices), TokenRole.WARNING))
    return tuple(parts), len(output) > config.max_output_chars or result.dropped_bytes > 0


def _parse_reward(path: str, content: bytes) -> tuple[float, dict[str, float]] | None:
    """Parse the reward, and metrics by name such as "verifier/style"; None if there is no finite reward.

    A text is one number. JSON is a number, or an object: its "reward" is the reward, and its other numbers, true and
    false are metrics; without a "reward" all have to be numbers, of which the mean is the reward.
    """
    try:
        value = (
            float(content.decode()) if path.endswith(".txt") else json.loads(content, parse_constant=_refuse_constant)
        )
    except (ValueError, OverflowError, RecursionError):
        return None
    fields = value if isinstance(value, dict) else {"reward": value}
    rewards = [fields["reward"]] if "reward" in fields else list(fields.values())
    if not rewards or not all(type(number) in (int, float) for number in rewards):
        return None
    others = {name: value for name, value in fields.items() if name != "reward" and isinstance(value, int | float)}
    try:
        reward = math.fsum(rewards) / len(rewards)
        metrics = {f"verifier/{name}": float(number) for name, number in others.items()}
    except OverflowError:
        return None
    return (reward, metrics) if math.isfinite(reward) else None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
