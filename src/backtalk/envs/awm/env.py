"""One rollout's environment in the Agent World Model: tools over a database, and a verifier of what changed in it.

Token roles: a tool's result or error and the verdict are ENV_OUTPUT; ``warning`` and the harness's own notices are
WARNING; the scenario's description and the task, which are the prompt, are CONTEXT.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from backtalk.envs.awm.config import AwmConfig
from backtalk.envs.awm.session import Result, Session
from backtalk.envs.base import Step, text_tool, warning_step
from backtalk.errors import InfrastructureError, TaskError, VerifierError
from backtalk.messages import Message, Part, ToolCall, ToolSpec, truncate_text
from backtalk.tasks.task import Task
from backtalk.trajectory import TokenRole

DONE = text_tool("done", "Finish the task.", "answer", "the answer; empty where none is asked for")
HIDDEN_TOOLS = ("verify", "__list_scenarios__")  # calls of the harness, which an agent may not make
NO_REWARD = ("judge_error", "no_verifier", "server_error", "invalid_args", "episode_already_done")


class AwmError(InfrastructureError):
    """A scenario could not be started, or its environment broke."""


class AwmEnv:
    """The environment of one rollout (an ``Env``). The agent ends it with ``done``, whose answer the verifier gets.

    Raises:
        AwmError: from ``reset``, where the scenario cannot be started.
        TaskError: from ``reset``, where the scenario has a tool called done.
    """

    def __init__(self, task: Task, session: Session, config: AwmConfig) -> None:
        self.task, self.config = task, config
        self._session = session
        self._verdict: Result | None = None

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        return (*self._session.tools, DONE)

    async def reset(self) -> tuple[Message, ...]:
        result = await self._session.start()
        if result.reward_type != "reset_ok":
            reason = result.observation.get("error") or result.observation.get("warning") or dict(result.observation)
            kind = result.reward_type or "no reward_type"
            raise AwmError(f"task {self.task.id!r} cannot be started: {kind}: {reason}")
        if any(tool.name == DONE.name for tool in self._session.tools):
            raise TaskError(f"task {self.task.id!r} has a tool called done, which is the call that ends a rollout here")
        system = self.task.metadata.get("description") or "Call tools to do the task, then call done."
        texts = (("system", system), ("user", self.task.instruction.strip()))
        return tuple(Message(role, (Part(text, TokenRole.CONTEXT),)) for role, text in texts)

    async def step(self, call: ToolCall) -> Step:
        if self._verdict is not None:
            raise RuntimeError(f"task {self.task.id!r} is done; there is no step after that")
        if call.tool == DONE.name:
            return await self._finish(str(call.arguments.get("answer", "")))
        if call.tool in HIDDEN_TOOLS:
            return warning_step(call, f"[unknown tool {call.tool}]")
        result = await self._session.call(call.tool, call.arguments)
        parts, truncated = observation_parts(result.observation, self.config.max_result_chars)
        timed_out = result.reward_type == "timeout"
        message = Message("tool", parts, tool=call.tool)
        return Step((message,), done=result.done, timed_out=timed_out, truncated=truncated)

    async def score(self) -> float | None:
        """Return the verifier's reward, or None if the task is ``world_model_only``; ends the session's rollout.

        Raises:
            VerifierError: the verifier crashed, there is none, or a judge failed: no reward, never a reward of 0.
        """
        if self.task.world_model_only:
            await self._session.call("done", {})
            return None
        verdict = self._verdict or await self._verify(None)
        ended = await self._session.call("done", {})
        scored = verdict if self.config.reward_at == "verify" else ended
        if verdict.reward_type in NO_REWARD or scored.reward is None:
            reason = verdict.observation.get("verify_result") or verdict.observation.get("error") or ""
            raise VerifierError(
                f"task {self.task.id!r} has no reward: {self.config.verifier} verifier, {scored.reward_type}: {reason}"
            )
        return scored.reward

    async def _finish(self, answer: str) -> Step:
        if self.task.world_model_only:
            self._verdict = Result({})
            return Step((), done=True, submitted=True)
        verdict = await self._verify(answer)
        if verdict.reward_type in NO_REWARD or not self.config.show_verdict:  # `score` raises the error
            return Step((), done=True, submitted=True)
        parts, truncated = observation_parts(verdict.observation, self.config.max_result_chars)
        message = Message("tool", parts, tool=DONE.name)
        return Step((message,), done=True, submitted=True, truncated=truncated)

    async def _verify(self, answer: str | None) -> Result:
        arguments = {"verifier_mode": self.config.verifier}
        if answer is not None:
            arguments["final_answer"] = answer
        self._verdict = await self._session.call("verify", arguments)
        return self._verdict


def observation_parts(observation: Mapping[str, Any], max_chars: int) -> tuple[tuple[Part, ...], bool]:
    """Return an observation as parts with roles, and whether its text was cut to ``max_chars``."""
    result = observation.get("tool_result")
    if result is None and observation.get("verify_result") is not None:
        result = {name: observation[name] for name in ("verify_result", "reward_type") if name in observation}
    elif result is None:
        result = {"error": observation["error"]} if observation.get("error") is not None else ""
    text = result if isinstance(result, str) else json.dumps(result, sort_keys=True, ensure_ascii=False)
    warning = observation.get("warning")
    parts = [Part(f"{warning}\n", TokenRole.WARNING)] if warning else []
    parts += truncate_text(text, max_chars, TokenRole.ENV_OUTPUT) or [Part("[no output]", TokenRole.WARNING)]
    return tuple(parts), len(text) > max_chars
