"""Plays untrusted scenarios: their programs and verifiers run in sandboxes, never in this process.

Each sandbox runs one Python process (``child``), started in the sandbox's shell and asked by shell commands, so that
whatever a sandbox backend isolates and limits holds here too. Python and its packages are mounted read-only.
"""

from __future__ import annotations

import asyncio
import json
import math
import shlex
import sys
from collections.abc import Coroutine, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

from backtalk.envs.awm.child import RESPONSES_FD
from backtalk.envs.awm.config import AwmConfig
from backtalk.envs.awm.files import Scenario
from backtalk.envs.awm.program import missing_package
from backtalk.envs.awm.session import Result
from backtalk.errors import ConfigError, DataError, InfrastructureError, SandboxError, SandboxUnavailable
from backtalk.messages import ToolSpec
from backtalk.sandboxes import Sandbox, SandboxBackend, SandboxFile, local_sandbox
from backtalk.sandboxes.machine.probe import run_trial

T = TypeVar("T")

NUM_CHILDREN = 4  # one that hangs or dies fails the rollouts of a quarter of a source's scenarios
START_TIMEOUT_S = 60.0  # to start Python and import the packages, which is slow on a busy machine
GRACE_S = 5.0  # beyond a call's own time limit, until a child that does not answer is ended
RESPONSE_BYTES = 2**20  # the tools of a large scenario take some 100,000
PACKAGES = ("fastapi", "sqlalchemy")
ALWAYS_READABLE = ("/usr/", "/bin/", "/lib/", "/lib64/")  # in every sandbox

# CHILD keeps the process id and pipes, because bash unsets PROCESS when the process ends.
_START = """\
{{ coproc PROCESS {{ exec env PYTHONPATH={paths} PYTHONDONTWRITEBYTECODE=1 {python} -S -s -m backtalk.envs.awm.child
}} 2>/dev/null; }} {responses}>&1
CHILD=("$PROCESS_PID" "${{PROCESS[@]}}")
"""
_ASK = """\
printf '%s\\n' {request} >&"${{CHILD[2]}}" && IFS= read -r -u "${{CHILD[1]}}" ||
{{ wait "${{CHILD[0]}}"; echo "ended with status $?"; false; }}
"""


class IsolatedScenarios:
    """The scenarios of one source, played in child processes; a scenario always has the same child.

    Raises:
        ConfigError: FastAPI or SQLAlchemy is not installed.
        SandboxUnavailable: no sandbox on this machine can run them; the message says what to type.
    """

    def __init__(self, location: str, scenarios: Mapping[str, Scenario], config: AwmConfig) -> None:
        self._scenarios, self._config = scenarios, config
        self._children: dict[int, Child] = {}
        self._starting = asyncio.Lock()
        if missing := [name for name in PACKAGES if find_spec(name) is None]:
            raise ConfigError(missing_package(missing[0]))
        try:
            self.backend = local_sandbox(config.sandbox, readable=readable_folders())
            run_trial(self._start_once)
        except SandboxUnavailable as error:
            raise SandboxUnavailable(
                f"the programs in {location} are untrusted and run in a sandbox only, which cannot be had here: "
                f"{error}\nA sandbox shows {', '.join(readable_folders()) or sys.base_prefix}, which its user has to "
                "be able to read. Else play on a server in a container (awm:http://HOST:PORT), or, for programs that "
                "you would run yourself, set options: {sandbox: unsafe}"
            ) from error

    def session(self, scenario: str, *, task_idx: int | None = None, seed: int | None = None) -> IsolatedSession:
        """Return a rollout of a task that is not started yet; a folder's tasks have no seed."""
        if task_idx is None:
            raise DataError(f"a rollout of {scenario} needs a task_idx, got seed={seed}")
        return IsolatedSession(self, self._scenarios[scenario], task_idx, self._config.call_timeout_s)

    async def child(self, scenario: str) -> Child:
        """Return the child that plays a scenario; start it if it does not run."""
        number = crc32(scenario.encode()) % NUM_CHILDREN
        async with self._starting:
            child = self._children.get(number)
            if child is None or child.failure:
                child = self._children[number] = Child(self._config)
                await child.start(self.backend)
            return child

    async def close(self) -> None:
        for child in self._children.values():
            await child.close()

    async def _start_once(self) -> None:
        child = Child(self._config)
        try:
            await child.start(self.backend)
        finally:
            await child.close()


class Child:
    """One Python process in a sandbox of its own. ``failure`` says why it ended; it is empty while the process runs.

    Raises:
        InfrastructureError: from any method, where the process has ended or gives a malformed response.
    """

    def __init__(self, config: AwmConfig) -> None:
        self._limits = replace(config.limits, output_bytes=RESPONSE_BYTES)
        self._timeout_s = config.call_timeout_s + GRACE_S
        self._stack = AsyncExitStack()
        self._sandbox: Sandbox  # from `start` on
        self._files: dict[str, str] = {}  # in the sandbox, by the scenario that each holds
        self._pending: set[asyncio.Task[Any]] = set()
        self._request_numbers, self.session_numbers = count(), count()
        self.failure = ""

    async def start(self, backend: SandboxBackend) -> None:
        """Open the sandbox, start the process and wait for its first response."""
        try:
            self._sandbox = await self._stack.enter_async_context(backend.open(self._limits))
            python = getattr(sys, "_base_executable", sys.executable)  # not that of a virtual environment
            names = {"python": shlex.quote(python), "paths": shlex.quote(":".join(search_path()))}
            await self._sandbox.exec(_START.format(responses=RESPONSES_FD, **names), timeout_s=START_TIMEOUT_S)
            await self.ask({"do": "hello"})
        except BaseException:
            await self.close()
            raise

    async def put(self, scenario: Scenario) -> str:
        """Return the path of a scenario's file in the sandbox, which is written at its first use."""
        if scenario.name not in self._files:
            file = f"scenarios/{len(self._files)}.json"  # relative: an unsafe sandbox has its home elsewhere
            self._files[scenario.name] = file
            content = SandboxFile(json.dumps(asdict(scenario)).encode())
            await asyncio.shield(self._spawn(self._sandbox.put({f"/home/agent/{file}": content})))
        return self._files[scenario.name]

    async def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request and return its response."""
        return await asyncio.shield(self.send(request))

    def send(self, request: Mapping[str, Any]) -> asyncio.Task[dict[str, Any]]:
        """Send one request and return the task that waits for its response."""
        return self._spawn(self._exchange(request))

    async def close(self) -> None:
        self.failure = self.failure or "its process was ended"
        await self._stack.aclose()

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run ``work`` in a task that outlives its caller: half a command would break the child for all rollouts."""

        async def run() -> T:
            try:
                return await work
            except SandboxError as error:
                raise await self._fail(str(error)) from error

        task = asyncio.ensure_future(run())
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may be waiting for it
        return task

    async def _exchange(self, request: Mapping[str, Any]) -> dict[str, Any]:
        number = next(self._request_numbers)
        timeout_s = START_TIMEOUT_S if request["do"] == "hello" else self._timeout_s
        command = _ASK.format(request=shlex.quote(json.dumps({"number": number, **request})))
        result = await self._sandbox.exec(command, timeout_s=timeout_s)
        if result.timed_out:
            raise await self._fail(f"it gave no answer to {request['do']} within {timeout_s:g} s")
        if result.exit_code != 0:
            raise await self._fail(f"it {result.output[-300:].strip() or 'was ended'}")
        if result.dropped_bytes:
            raise InfrastructureError(f"a scenario answered more than {RESPONSE_BYTES:,} bytes, the most that is read")
        try:
            response = json.loads(result.output)
        except (ValueError, RecursionError) as error:
            raise await self._fail(f"it answered what is no JSON: {result.output[:200]!r}") from error
        if not isinstance(response, dict) or response.get("number") != number:  # later responses may be off by one
            raise await self._fail(f"it answered something else than was asked: {result.output[:200]!r}")
        if "failed" in response:
            raise InfrastructureError(str(response["failed"])[:2000])
        return response

    async def _fail(self, reason: str) -> InfrastructureError:
        self.failure = self.failure or reason
        await self.close()
        return InfrastructureError(f"the process of this scenario is lost, with every rollout in it: {self.failure}")


class IsolatedSession:
    """A rollout in a child process (a ``Session``)."""

    def __init__(self, scenarios: IsolatedScenarios, scenario: Scenario, task_idx: int, call_timeout_s: float) -> None:
        self._scenarios, self._scenario, self._task_idx = scenarios, scenario, task_idx
        self._timeout_s = call_timeout_s
        self._child: Child | None = None
        self._number = -1
        self.tools: tuple[ToolSpec, ...] = ()

    async def start(self) -> Result:
        self._child = child = await self._scenarios.child(self._scenario.name)
        self._number = next(child.session_numbers)
        file = await child.put(self._scenario)
        response = await self._ask("start", file=file, task_idx=self._task_idx, call_timeout_s=self._timeout_s)
        self.tools = tuple(_tool(tool) for tool in response.get("tools", ()))
        return read_result(response)

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> Result:
        return read_result(await self._ask("call", tool=tool, arguments=dict(arguments)))

    async def close(self) -> None:
        if self._child is not None and not self._child.failure:
            self._child.send({"do": "release", "session": self._number})  # not awaited: the child may be busy

    async def _ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        if self._child is None:
            raise InfrastructureError("the rollout was not started; call start first")
        return await self._child.ask({"do": do, "session": self._number, **arguments})


def search_path() -> list[str]:
    """Return the folders that Backtalk and the packages of scenarios are imported from."""
    names = ("backtalk", "httpx2", *PACKAGES)
    origins = [spec.origin for name in names if (spec := find_spec(name)) and spec.origin]
    return list(dict.fromkeys(str(Path(origin).parent.parent) for origin in origins))


def readable_folders() -> list[str]:
    """Return the folders of Python that a sandbox does not show by itself, none inside another.

    Of Backtalk only the package and of Python's prefix only parts: a checkout or a home may lie around them.
    """
    package = Path(__file__).parents[2]
    python = [Path(sys.base_prefix, name) for name in ("bin", "lib", "lib64")]
    wanted = [*(str(path) for path in python if path.is_dir() and not path.is_symlink()), str(package)]
    wanted += [path for path in search_path() if path != str(package.parent)]
    covered = (*ALWAYS_READABLE, *(f"{path}/" for path in wanted))
    return [
        path for path in dict.fromkeys(wanted) if f"{path}/" not in ALWAYS_READABLE and not path.startswith(covered)
    ]


def _tool(tool: Any) -> ToolSpec:
    match tool:
        case {"name": str(name), "description": str(description), "parameters": dict(parameters)}:
            return ToolSpec(name, description, parameters)
    raise InfrastructureError(f"a scenario has a tool without name, description or parameters: {str(tool)[:200]}")


def read_result(response: Mapping[str, Any]) -> Result:
    """Return the result in a child's response; raises InfrastructureError where it is malformed."""
    with suppress(OverflowError):  # an integer too large for a float
        match response:
            case {"observation": dict(observation), "reward": None, "done": bool(done)}:
                return Result(observation, None, done)
            case {"observation": dict(observation), "reward": int() | float() as reward, "done": bool(done)}:
                if math.isfinite(reward):
                    return Result(observation, float(reward), done)
    raise InfrastructureError(f"a scenario answered no observation with a finite reward: {str(response)[:200]}")
