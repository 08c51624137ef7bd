"""Plays scenarios that somebody else wrote: their programs and verifiers run in sandboxes, never in this process.

Each sandbox holds one Python process (``child``), started in the sandbox's shell and asked by commands in it, so that
whatever a sandbox backend isolates and limits holds here too. Python and its packages are shown there read-only.
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

from backtalk.envs.awm.child import ANSWERS_FD
from backtalk.envs.awm.config import AwmConfig
from backtalk.envs.awm.files import Scenario
from backtalk.envs.awm.program import missing_package
from backtalk.envs.awm.session import Answer
from backtalk.errors import ConfigError, InfrastructureError, SandboxError, SandboxUnavailable
from backtalk.messages import ToolSpec
from backtalk.sandboxes import Sandbox, SandboxBackend, SandboxFile, local_sandbox
from backtalk.sandboxes.machine.probe import tried

T = TypeVar("T")

NUM_CHILDREN = 4  # one that hangs or dies costs the rollouts of a quarter of a source's scenarios
START_TIMEOUT_S = 60.0  # for Python and the packages, which a busy machine reads slowly
GRACE_S = 5.0  # beyond a call's own time, until a child that does not answer is ended
ANSWER_BYTES = 2**20  # tools of a large scenario are some 100,000
PACKAGES = ("fastapi", "sqlalchemy")
SHOWN = ("/usr/", "/bin/", "/lib/", "/lib64/")  # programs of this machine, which every sandbox shows

# Kept in CHILD are its process id and pipes, for bash forgets PROCESS when that ends.
_START = """\
{{ coproc PROCESS {{ exec env PYTHONPATH={paths} PYTHONDONTWRITEBYTECODE=1 {python} -S -s -m backtalk.envs.awm.child
}} 2>/dev/null; }} {answers}>&1
CHILD=("$PROCESS_PID" "${{PROCESS[@]}}")
"""
_ASK = """\
printf '%s\\n' {request} >&"${{CHILD[2]}}" && IFS= read -r -u "${{CHILD[1]}}" ||
{{ wait "${{CHILD[0]}}"; echo "ended with status $?"; false; }}
"""


class Isolation:
    """Children that play the scenarios of one source, each scenario always in the same one.

    Raises:
        ConfigError: FastAPI or SQLAlchemy is not installed.
        SandboxUnavailable: no sandbox on this machine can run them; the message says what to type.
    """

    def __init__(self, where: str, scenarios: Mapping[str, Scenario], config: AwmConfig) -> None:
        self._scenarios, self._config = scenarios, config
        self._children: dict[int, Child] = {}
        self._starting = asyncio.Lock()
        if missing := [name for name in PACKAGES if find_spec(name) is None]:
            raise ConfigError(missing_package(missing[0]))
        try:
            self._backend = local_sandbox(config.sandbox, readable=readable_folders())
            tried(self._try_one)
        except SandboxUnavailable as error:
            raise SandboxUnavailable(
                f"the programs in {where} are somebody else's and run in a sandbox only, which cannot be had here: "
                f"{error}\nA sandbox shows {', '.join(readable_folders()) or sys.base_prefix}, which its user has to "
                "be able to read. Else play on a server in a container (awm:http://HOST:PORT), or, for programs that "
                "you would run yourself, set options: {sandbox: unsafe}"
            ) from error

    @property
    def backend(self) -> SandboxBackend:
        return self._backend

    def session(self, name: str, task_idx: int) -> IsolatedSession:
        """Return an episode of a task that is not begun yet."""
        return IsolatedSession(self, self._scenarios[name], task_idx, self._config.call_timeout_s)

    async def child(self, name: str) -> Child:
        """Return the child that plays a scenario, started anew where it was lost."""
        number = crc32(name.encode()) % NUM_CHILDREN
        async with self._starting:
            child = self._children.get(number)
            if child is None or child.lost:
                child = self._children[number] = Child(self._config)
                await child.start(self._backend)
            return child

    async def close(self) -> None:
        for child in self._children.values():
            await child.close()

    async def _try_one(self) -> None:
        child = Child(self._config)
        try:
            await child.start(self._backend)
        finally:
            await child.close()


class Child:
    """One Python process in a sandbox of its own. Once ``lost`` (that says why), it answers nothing more.

    Raises:
        InfrastructureError: from any method, where the process is lost or answers what it should not.
    """

    def __init__(self, config: AwmConfig) -> None:
        self._limits = replace(config.limits, output_bytes=ANSWER_BYTES)
        self._timeout_s = config.call_timeout_s + GRACE_S
        self._stack = AsyncExitStack()
        self._sandbox: Sandbox  # from `start` on
        self._files: dict[str, str] = {}  # that hold scenarios in the sandbox, by scenario
        self._asking: set[asyncio.Task[Any]] = set()
        self._numbers, self.episodes = count(), count()
        self.lost = ""

    async def start(self, backend: SandboxBackend) -> None:
        """Open the sandbox and see the process answer."""
        try:
            self._sandbox = await self._stack.enter_async_context(backend.open(self._limits))
            python = getattr(sys, "_base_executable", sys.executable)  # not that of a virtual environment
            named = {"python": shlex.quote(python), "paths": shlex.quote(":".join(search_path()))}
            command = _START.format(answers=ANSWERS_FD, **named)
            await self._sandbox.exec(command, timeout_s=START_TIMEOUT_S)
            await self.ask({"do": "hello"})
        except BaseException:
            await self.close()
            raise

    async def give(self, scenario: Scenario) -> str:
        """Return the file in the sandbox that holds a scenario, written where it is not there yet."""
        if scenario.name not in self._files:
            file = f"scenarios/{len(self._files)}.json"  # in its home, whose path is another in an unsafe sandbox
            self._files[scenario.name] = file
            content = SandboxFile(json.dumps(asdict(scenario)).encode())
            await asyncio.shield(self._begin(self._sandbox.put({f"/home/agent/{file}": content})))
        return self._files[scenario.name]

    async def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request and return its answer."""
        return await asyncio.shield(self.tell(request))

    def tell(self, request: Mapping[str, Any]) -> asyncio.Task[dict[str, Any]]:
        """Send one request, whose answer nobody has to wait for."""
        return self._begin(self._ask(request))

    async def close(self) -> None:
        self.lost = self.lost or "its process was ended"
        await self._stack.aclose()

    def _begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin what goes on where its caller is cancelled: half a command would cost all the others the child."""

        async def until_lost() -> T:
            try:
                return await work
            except SandboxError as error:
                raise await self._lose(str(error)) from error

        task = asyncio.ensure_future(until_lost())
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # its caller may be gone
        return task

    async def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        timeout_s = START_TIMEOUT_S if request["do"] == "hello" else self._timeout_s
        command = _ASK.format(request=shlex.quote(json.dumps({"number": number, **request})))
        result = await self._sandbox.exec(command, timeout_s=timeout_s)
        if result.timed_out:
            raise await self._lose(f"it gave no answer to {request['do']} within {timeout_s:g} s")
        if result.exit_code != 0:
            raise await self._lose(f"it {result.output[-300:].strip() or 'was ended'}")
        if result.dropped_bytes:
            raise InfrastructureError(f"a scenario answered more than {ANSWER_BYTES:,} bytes, the most that is read")
        try:
            found = json.loads(result.output)
        except (ValueError, RecursionError) as error:
            raise await self._lose(f"it answered what is no JSON: {result.output[:200]!r}") from error
        if not isinstance(found, dict) or found.get("number") != number:  # what comes next may be anything
            raise await self._lose(f"it answered something else than was asked: {result.output[:200]!r}")
        if "failed" in found:
            raise InfrastructureError(str(found["failed"])[:2000])
        return found

    async def _lose(self, why: str) -> InfrastructureError:
        self.lost = self.lost or why
        await self.close()
        return InfrastructureError(f"the process of this scenario is lost, with every rollout in it: {self.lost}")


class IsolatedSession:
    """An episode in a child (a ``Session``)."""

    def __init__(self, isolation: Isolation, scenario: Scenario, task_idx: int, call_timeout_s: float) -> None:
        self._isolation, self._scenario, self._task_idx = isolation, scenario, task_idx
        self._timeout_s = call_timeout_s
        self._child: Child | None = None
        self._episode = -1
        self.tools: tuple[ToolSpec, ...] = ()

    async def start(self) -> Answer:
        self._child = child = await self._isolation.child(self._scenario.name)
        self._episode = next(child.episodes)
        given = {"file": await child.give(self._scenario), "task_idx": self._task_idx}
        found = await self._ask("start", call_timeout_s=self._timeout_s, **given)
        self.tools = tuple(_tool(tool) for tool in found.get("tools", ()))
        return _answer(found)

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> Answer:
        return _answer(await self._ask("call", tool=tool, arguments=dict(arguments)))

    async def close(self) -> None:
        if self._child is not None and not self._child.lost:
            self._child.tell({"do": "release", "episode": self._episode})  # it may be busy until a time limit

    async def _ask(self, do: str, **given: Any) -> dict[str, Any]:
        if self._child is None:
            raise InfrastructureError("the episode was not begun; call start first")
        return await self._child.ask({"do": do, "episode": self._episode, **given})


def search_path() -> list[str]:
    """Return the folders that Backtalk and the packages of scenarios are imported from."""
    origins = [spec.origin for name in ("backtalk", *PACKAGES) if (spec := find_spec(name)) and spec.origin]
    return list(dict.fromkeys(str(Path(origin).parent.parent) for origin in origins))


def readable_folders() -> list[str]:
    """Return the folders of Python that a sandbox does not show by itself, none inside another.

    Of Backtalk only the package, and of Python's prefix not all: around them may lie a checkout, or somebody's home.
    """
    package = Path(__file__).parents[2]
    python = [Path(sys.base_prefix, name) for name in ("bin", "lib", "lib64")]
    wanted = [*(str(path) for path in python if path.is_dir() and not path.is_symlink()), str(package)]
    wanted += [path for path in search_path() if path != str(package.parent)]
    seen = (*SHOWN, *(f"{path}/" for path in wanted))
    return [path for path in dict.fromkeys(wanted) if f"{path}/" not in SHOWN and not path.startswith(seen)]


def _tool(tool: Any) -> ToolSpec:
    match tool:
        case {"name": str(name), "description": str(description), "parameters": dict(parameters)}:
            return ToolSpec(name, description, parameters)
    raise InfrastructureError(f"a scenario has a tool without name, description or parameters: {str(tool)[:200]}")


def _answer(found: Mapping[str, Any]) -> Answer:
    with suppress(OverflowError):  # a whole number that no float can hold
        match found:
            case {"observation": dict(observation), "reward": None, "done": bool(done)}:
                return Answer(observation, None, done)
            case {"observation": dict(observation), "reward": int() | float() as reward, "done": bool(done)}:
                if math.isfinite(reward):
                    return Answer(observation, float(reward), done)
    raise InfrastructureError(f"a scenario answered no observation with a finite reward: {str(found)[:200]}")
