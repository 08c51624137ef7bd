"""One rollout of a scenario, in the observations of OpenEnv's Agent World Model environment.

An observation holds a tool's result under ``tool_result`` or ``error``, and the kind of result under ``reward_type``;
keys without a value are left out. ``verify`` and ``done`` are calls of the harness that the agent is not offered.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from backtalk.envs.awm.files import ScenarioTask
from backtalk.envs.awm.program import Program, RolloutDatabase, new_database
from backtalk.errors import VerifierError
from backtalk.messages import ToolSpec

# Reward by reward type; any other type gives 0. The numbers are the published environment's.
REWARDS = {"complete": 1.0, "incomplete": 0.1, "tool_not_found": -1.0, "invalid_args": -1.0}
COMPLETE, OTHERS = "complete", "others"  # results of a code verifier


@dataclass(frozen=True, slots=True)
class Result:
    """An observation of the environment, its reward, and whether the rollout is over."""

    observation: Mapping[str, Any]
    reward: float | None = None
    done: bool = False

    @property
    def reward_type(self) -> str:
        """Return the kind of result, such as "tool_call_ok"; empty if there is none."""
        return str(self.observation.get("reward_type", ""))


class Session(Protocol):
    """One rollout. Every method but ``close`` raises InfrastructureError where the environment breaks."""

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        """Return the tools, which are known after ``start``."""
        ...

    async def start(self) -> Result:
        """Reset the environment."""
        ...

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> Result:
        """Carry out one call."""
        ...

    async def close(self) -> None:
        """Free what the rollout holds, however it ended; never raises."""
        ...


class LocalSession:
    """A rollout in this process (a ``Session``)."""

    def __init__(self, program: Program, task: ScenarioTask, *, call_timeout_s: float = 30.0) -> None:
        self.program, self.task, self._timeout_s = program, task, call_timeout_s
        self.tools = program.tools
        self._image = program.initial_image(task)
        self._database: RolloutDatabase | None = None
        self._steps = 0

    async def start(self) -> Result:
        self._database = new_database(self._image)
        modes = {mode: mode in self.task.verifiers for mode in ("sql", "code")}
        return self._result("reset_ok", None, has_verifier=modes, num_tools=len(self.tools), **self._about())

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> Result:
        if self._database is None:
            error = "the episode is over, or has not begun; reset the environment"
            return self._result("episode_already_done", None, done=True, error=error)
        self._steps += 1
        match tool:
            case "verify":
                return self._verify(self._database, arguments)
            case "done":
                self.release()
                return self._result("episode_done", 0.0, done=True, steps_taken=self._steps, **self._about())
            case _:
                return await self._call_tool(self._database, tool, arguments)

    async def close(self) -> None:
        self.release()

    def release(self) -> None:
        """Free the database; calling it again does nothing."""
        if self._database is not None:
            self._database.release()
            self._database = None

    async def _call_tool(self, database: RolloutDatabase, tool: str, arguments: Mapping[str, Any]) -> Result:
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await self.program.call(database, tool, arguments)
        except TimeoutError:
            return self._failed("timeout", tool, f"Tool call timed out after {self._timeout_s}s")
        if reply is None:
            return self._failed("tool_not_found", tool, f"Unknown tool: {tool}")
        if reply.status_code >= 400:
            status = reply.status_code
            kind = {422: "invalid_args"}.get(status, "server_error" if status >= 500 else "tool_error")
            error = f"Error calling {tool}. Status code: {status}. Response: {reply.text}"
            return self._failed(kind, tool, error)
        return self._result("tool_call_ok", 0.0, tool_name=tool, tool_result=_indented(reply.text))

    def _verify(self, database: RolloutDatabase, arguments: Mapping[str, Any]) -> Result:
        mode = arguments.get("verifier_mode", "code")
        if mode not in ("code", "sql"):
            return self._failed("invalid_args", "verify", f"verifier_mode {mode!r} is not known; use code or sql")
        source = self.task.verifiers.get(mode)
        if source is None:
            return self._failed("no_verifier", "verify", f"this task has no {mode} verifier", **self._about())
        kind, reward = "judge_error", 0.0  # in sql mode too: its facts need a judge, and there is none here
        try:
            verdict = run_verifier(source, mode, self._image, database.serialize(), arguments.get("final_answer"))
        except VerifierError as error:
            verdict = {"execution_status": "error", "error_message": str(error)}
        else:
            if mode == "code":
                kind = verdict["result"]
                reward = REWARDS.get(kind, 0.0)
                verdict = {"result": kind, "execution_status": "success", "raw_result": verdict}
        return self._result(kind, reward, verify_result=verdict, steps_taken=self._steps, **self._about())

    def _about(self) -> dict[str, Any]:
        task = self.task
        return {"scenario": self.program.scenario.name, "task": task.instruction, "task_idx": task.task_idx}

    def _failed(self, kind: str, tool: str, error: str, **more: Any) -> Result:
        return self._result(kind, REWARDS.get(kind, 0.0), tool_name=tool, error=error, **more)

    def _result(self, kind: str, reward: float | None, *, done: bool = False, **fields: Any) -> Result:
        return Result({"done": done, "metadata": {}, "reward_type": kind, **fields}, reward, done)


def run_verifier(source: str, mode: str, before: bytes, after: bytes, answer: str | None) -> dict[str, Any]:
    """Run a verifier: Python source that reads the databases (serialized here) before and after the rollout as files.

    Returns ``{"result": "complete" | "others"}`` in code mode, facts for a judge in sql mode. The function is the first
    whose name begins with ``verify_``; it is passed those of ``initial_db_path``, ``final_db_path`` and
    ``final_answer`` that it has as parameters. It runs with the rights of this process.

    Raises:
        VerifierError: it crashed, or returned something else. That is no reward at all, never a reward of 0.
    """
    names = re.findall(r"^def (verify_\w+)\(", source, re.MULTILINE)
    if not names:
        raise VerifierError("the verifier has no function verify_...; a task without one cannot be scored")
    namespace: dict[str, Any] = {}
    with TemporaryDirectory(prefix="backtalk-awm-") as folder:
        initial, final = Path(folder, "initial.db"), Path(folder, "final.db")
        initial.write_bytes(before)
        final.write_bytes(after)
        given = {"initial_db_path": str(initial), "final_db_path": str(final), "final_answer": answer or ""}
        try:
            exec("import json, os, re, sqlite3", namespace)  # published verifiers use these without importing them
            exec(compile(source, f"<{names[0]}>", "exec"), namespace)
            verify = namespace[names[0]]
            parameters = inspect.signature(verify).parameters
            found = verify(**{name: value for name, value in given.items() if name in parameters})
        except Exception as error:
            raise VerifierError(f"{names[0]} crashed: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict) or (mode == "code" and found.get("result") not in (COMPLETE, OTHERS)):
        raise VerifierError(f"{names[0]} gave {str(found)[:200]!r}, which is neither {COMPLETE!r} nor {OTHERS!r}")
    return found


def _indented(text: str) -> str:
    """Return JSON indented, as tools of the Model Context Protocol show it, and other text unchanged."""
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except ValueError:
        return text
