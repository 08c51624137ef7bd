"""Scenarios in a process of their own: ``python -m backtalk.envs.awm.child WHERE``.

Requests and answers are JSON lines over its standard input and output. The process has this user's rights and none of
this process's memory or variables: a program that crashes, leaks or hangs takes its own process down and no trainer.
It is no sandbox.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from itertools import count
from typing import Any

from backtalk.envs.awm.library import Library, open_library
from backtalk.envs.awm.session import Answer, LocalSession
from backtalk.envs.base import ToolSpec
from backtalk.errors import BacktalkError, InfrastructureError

LINE_BYTES = 64 * 2**20  # of one answer
GRACE_S = 5.0  # beyond a call's own time, until a process that does not answer is ended
KEPT = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV")  # of this process's variables


class ChildLibrary:
    """A process with the scenarios of a source, started when first needed and again after it ended."""

    def __init__(self, where: str, call_timeout_s: float) -> None:
        self._where, self._timeout_s = where, call_timeout_s
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._starting = asyncio.Lock()

    async def ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """One request and its answer.

        Raises:
            InfrastructureError: the process ended, does not answer, or could not do it.
        """
        process = await self._running()
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"number": number, "do": operation, **arguments}).encode() + b"\n")
            await process.stdin.drain()
            async with asyncio.timeout(self._timeout_s + GRACE_S):
                found = await answer
        except TimeoutError:
            await self.close()
            raise InfrastructureError(
                f"the process of {self._where} gave no answer to {operation} within {self._timeout_s + GRACE_S:g} s "
                "and was ended, with every episode in it"
            ) from None
        except (ConnectionError, BrokenPipeError) as error:
            raise InfrastructureError(f"the process of {self._where} has ended ({error})") from error
        finally:
            self._waiting.pop(number, None)
        if "failed" in found:
            raise InfrastructureError(found["failed"])
        return found

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await _end(process)
        if self._reader is not None:
            await self._reader
            self._reader = None

    async def _running(self) -> asyncio.subprocess.Process:
        async with self._starting:
            if self._process is None or self._process.returncode is not None:
                await self.close()
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "backtalk.envs.awm.child", self._where),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    env={name: os.environ[name] for name in KEPT if name in os.environ},
                    limit=LINE_BYTES,
                )
                self._reader = asyncio.create_task(self._read(self._process))
            return self._process

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        with suppress(ValueError):  # a line beyond the limit, or no JSON: nothing after it can be read
            while line := await process.stdout.readline():
                answer = json.loads(line)
                if waiting := self._waiting.pop(answer["number"], None):
                    waiting.set_result(answer)
        status = await _end(process, GRACE_S)
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(InfrastructureError(f"the process of {self._where} ended with status {status}"))
        self._waiting.clear()


async def _end(process: asyncio.subprocess.Process, patience_s: float = 0.0) -> int:
    """Its exit status, after killing it where it does not end by itself.

    Not by ``process.kill``: that looks whether it still lives, and so takes the status away from who waits for it.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(patience_s):
            return await process.wait()
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    return await process.wait()


class ChildSession:
    """An episode in that process (a ``Session``)."""

    def __init__(self, library: ChildLibrary, episode: int, arguments: Mapping[str, Any]) -> None:
        self._library, self._episode, self._arguments = library, episode, arguments
        self.tools: tuple[ToolSpec, ...] = ()

    async def start(self) -> Answer:
        found = await self._library.ask("start", episode=self._episode, arguments=dict(self._arguments))
        self.tools = tuple(ToolSpec(**tool) for tool in found["tools"])
        return Answer(**found["answer"])

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> Answer:
        found = await self._library.ask("call", episode=self._episode, tool=tool, arguments=dict(arguments))
        return Answer(**found["answer"])

    async def close(self) -> None:
        with suppress(InfrastructureError):
            await self._library.ask("release", episode=self._episode)


async def _serve(library: Library, answers: Any) -> None:
    """Answer requests until the input ends. Those of one episode come one after another; episodes run side by side."""
    reader = asyncio.StreamReader(limit=LINE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    episodes: dict[int, LocalSession] = {}
    async with asyncio.TaskGroup() as tasks:
        while line := await reader.readline():
            tasks.create_task(_answer(library, episodes, json.loads(line), answers))


async def _answer(library: Library, episodes: dict[int, LocalSession], request: dict[str, Any], answers: Any) -> None:
    try:
        found = await _carry_out(library, episodes, request)
    except BacktalkError as error:
        found = {"failed": str(error)}
    answers.write(json.dumps({"number": request["number"], **found}) + "\n")
    answers.flush()


async def _carry_out(library: Library, episodes: dict[int, LocalSession], request: dict[str, Any]) -> dict[str, Any]:
    number = request["episode"]
    match request["do"]:
        case "start":
            session = episodes[number] = library.session(**request["arguments"])
            answer = await session.start()
            tools = [{"name": t.name, "description": t.description, "parameters": t.parameters} for t in session.tools]
            return {"tools": tools, "answer": _packed(answer)}
        case "call":
            if number not in episodes:
                raise InfrastructureError("the process was started anew since this episode began, which is lost")
            return {"answer": _packed(await episodes[number].call(request["tool"], request["arguments"]))}
        case _:
            if number in episodes:
                episodes.pop(number).release()
            return {}


def _packed(answer: Answer) -> dict[str, Any]:
    return {"observation": answer.observation, "reward": answer.reward, "done": answer.done}


def main() -> None:
    # What programs print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    asyncio.run(_serve(open_library(sys.argv[1]), answers))


if __name__ == "__main__":
    main()
