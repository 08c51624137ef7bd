"""One episode of a scenario, as OpenEnv's Agent World Model environment answers: in this process, or on a server.

An answer is that environment's observation, without the keys that hold nothing. What a tool said is under
``tool_result`` or ``error``, what the environment says of it under ``reward_type``; ``verify`` and ``done`` are calls
that no agent is told of.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from backtalk.envs.awm.database import as_files, new_database
from backtalk.envs.awm.files import Contents
from backtalk.envs.awm.program import Program
from backtalk.envs.awm.verifier import run_verifier
from backtalk.errors import VerifierError
from backtalk.messages import ToolSpec

# What a reward type earns; any other earns 0. The numbers are the published environment's.
REWARDS = {"complete": 1.0, "incomplete": 0.1, "tool_not_found": -1.0, "invalid_args": -1.0}


@dataclass(frozen=True, slots=True)
class Answer:
    """An observation of the environment, with its reward and whether the episode is over."""

    observation: Mapping[str, Any]
    reward: float | None = None
    done: bool = False

    @property
    def reward_type(self) -> str:
        return str(self.observation.get("reward_type", ""))


class Session(Protocol):
    """An episode. Every method but ``close`` raises InfrastructureError where the world breaks."""

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        """Known once it has started."""
        ...

    async def start(self) -> Answer: ...

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> Answer: ...

    async def close(self) -> None:
        """Give back what it holds, however it ended; never raises."""
        ...


class LocalSession:
    """An episode in this process (a ``Session``)."""

    def __init__(self, program: Program, contents: Contents, *, call_timeout_s: float = 30.0) -> None:
        self.program, self.contents, self._timeout_s = program, contents, call_timeout_s
        self._image = program.image(contents)
        self._database: Any = None
        self.steps = 0

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        return self.program.tools

    async def start(self) -> Answer:
        self._database = new_database(self._image)
        modes = {mode: mode in self.contents.verifiers for mode in ("sql", "code")}
        return self._answer("reset_ok", None, has_verifier=modes, num_tools=len(self.tools), **self._about())

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> Answer:
        if self._database is None:
            error = "the episode is over, or has not begun; reset the environment"
            return self._answer("episode_already_done", None, done=True, error=error)
        self.steps += 1
        match tool:
            case "verify":
                return self._verify(arguments)
            case "done":
                await self.close()
                return self._answer("episode_done", 0.0, done=True, steps_taken=self.steps, **self._about())
            case _:
                return await self._call_tool(tool, arguments)

    async def close(self) -> None:
        self.release()

    def release(self) -> None:
        """Give back the database; nothing happens where that was done."""
        if self._database is not None:
            self._database.release()
            self._database = None

    async def _call_tool(self, tool: str, arguments: Mapping[str, Any]) -> Answer:
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await self.program.call(self._database, tool, arguments)
        except TimeoutError:
            return self._failed("timeout", tool, f"Tool call timed out after {self._timeout_s}s")
        if reply is None:
            return self._failed("tool_not_found", tool, f"Unknown tool: {tool}")
        if reply.status >= 400:
            kind = {422: "invalid_args"}.get(reply.status, "server_error" if reply.status >= 500 else "tool_error")
            said = f"Error calling {tool}. Status code: {reply.status}. Response: {reply.text}"
            return self._failed(kind, tool, said)
        return self._answer("tool_call_ok", 0.0, tool_name=tool, tool_result=_indented(reply.text))

    def _verify(self, arguments: Mapping[str, Any]) -> Answer:
        mode = arguments.get("verifier_mode", "code")
        if mode not in ("code", "sql"):
            return self._failed("invalid_args", "verify", f"verifier_mode {mode!r} is not known; use code or sql")
        source = self.contents.verifiers.get(mode)
        if source is None:
            return self._failed("no_verifier", "verify", f"this task has no {mode} verifier", **self._about())
        try:
            with as_files(self._image, self._database.serialize()) as (before, after):
                found = run_verifier(source, mode, before, after, arguments.get("final_answer"))
        except VerifierError as error:
            verdict = {"execution_status": "error", "error_message": str(error)}
            return self._answer("judge_error", 0.0, verify_result=verdict, steps_taken=self.steps, **self._about())
        if mode == "sql":  # what the database shows; whether that is enough is for a judge to say, and we have none
            return self._answer("judge_error", 0.0, verify_result=found, steps_taken=self.steps, **self._about())
        kind = found["result"]
        verdict = {"result": kind, "execution_status": "success", "raw_result": found}
        reward = REWARDS.get(kind, 0.0)
        return self._answer(kind, reward, verify_result=verdict, steps_taken=self.steps, **self._about())

    def _about(self) -> dict[str, Any]:
        contents = self.contents
        return {"scenario": self.program.scenario.name, "task": contents.task, "task_idx": contents.task_idx}

    def _failed(self, kind: str, tool: str, error: str, **more: Any) -> Answer:
        return self._answer(kind, REWARDS.get(kind, 0.0), tool_name=tool, error=error, **more)

    def _answer(self, kind: str, reward: float | None, *, done: bool = False, **said: Any) -> Answer:
        return Answer({"done": done, "metadata": {}, "reward_type": kind, **said}, reward, done)


def _indented(text: str) -> str:
    """JSON as tools of the Model Context Protocol show it; other text as it is."""
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except ValueError:
        return text
