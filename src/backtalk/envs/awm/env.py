"""An episode of the Agent World Model: tools over a database, and a verifier that looks at it before and after.

Who said each stretch is recorded here: what a tool gave, its error and the verdict are ENV_OUTPUT; ``warning`` and what
we say ourselves are WARNING; scenario and task are the prompt, CONTEXT.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from backtalk.envs.awm.config import AwmConfig
from backtalk.envs.awm.session import Answer, Session
from backtalk.envs.base import Step
from backtalk.errors import InfrastructureError, TaskError, VerifierError
from backtalk.messages import Message, Part, ToolCall, ToolSpec, truncate_text
from backtalk.tasks.task import Task
from backtalk.trajectory import TokenRole

DONE = ToolSpec(
    "done",
    "Finish the task.",
    {
        "type": "object",
        "properties": {"answer": {"type": "string", "description": "the answer; empty where none is asked for"}},
        "required": ["answer"],
    },
)
HIDDEN = ("verify", "__list_scenarios__")  # calls of the environment that are not an agent's to make
NO_REWARD = ("judge_error", "no_verifier", "server_error", "invalid_args", "episode_already_done")


class AwmError(InfrastructureError):
    """A scenario could not be started, or its world broke."""


class AwmEnv:
    """One episode of one task (an ``Env``). The agent ends it with ``done``, whose answer the verifier gets.

    Raises:
        AwmError: from ``reset``, where the scenario cannot be started.
        TaskError: from ``reset``, where the scenario has a tool called done.
    """

    def __init__(self, task: Task, session: Session, config: AwmConfig) -> None:
        self.task, self.config = task, config
        self._session = session
        self._verdict: Answer | None = None
        self._about: Mapping[str, Any] = {}
        self._steps: list[dict[str, Any]] = []

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        return (*self._session.tools, DONE)

    async def reset(self) -> tuple[Message, ...]:
        answer = await self._session.start()
        self._about = answer.observation
        if answer.reward_type != "reset_ok":
            said = answer.observation.get("error") or answer.observation.get("warning") or dict(answer.observation)
            raise AwmError(f"task {self.task.id!r} cannot be started: {answer.reward_type or 'no reward_type'}: {said}")
        if any(tool.name == DONE.name for tool in self._session.tools):
            raise TaskError(f"task {self.task.id!r} is in a world with a tool called done, which ends our episodes")
        system = self.task.metadata.get("description") or "Call tools to do the task, then call done."
        texts = (("system", system), ("user", self.task.instruction.strip()))
        return tuple(Message(role, (Part(text, TokenRole.CONTEXT),)) for role, text in texts)

    async def step(self, call: ToolCall) -> Step:
        """Carry out one call; an error is an observation."""
        if self._verdict is not None:
            raise RuntimeError(f"task {self.task.id!r} is done; there is no step after that")
        if call.tool == DONE.name:
            return await self._finish(str(call.arguments.get("answer", "")))
        if call.tool in HIDDEN:
            return Step((_said(call.tool, (Part(f"[unknown tool {call.tool}]", TokenRole.WARNING),)),))
        answer = await self._session.call(call.tool, call.arguments)
        self._record(call.tool, call.arguments, answer)
        parts, truncated = observed(answer.observation, self.config.max_result_chars)
        timed_out = answer.reward_type == "timeout"
        return Step((_said(call.tool, parts),), done=answer.done, timed_out=timed_out, truncated=truncated)

    async def score(self) -> float | None:
        """The verifier's reward. None for a task that is ``world_model_only``. Releases the session.

        Raises:
            VerifierError: the verifier crashed, there is none, or a judge failed: no reward, never a reward of 0.
        """
        if self.task.world_model_only:
            await self._session.call("done", {})
            return None
        answer = self._verdict or await self._verify(None)
        ended = await self._session.call("done", {})
        scored = answer if self.config.reward_at == "verify" else ended
        if answer.reward_type in NO_REWARD or scored.reward is None:
            verdict = answer.observation.get("verify_result") or answer.observation.get("error") or ""
            raise VerifierError(
                f"task {self.task.id!r} has no reward: {self.config.verifier} verifier, {scored.reward_type}: {verdict}"
            )
        return scored.reward

    @property
    def episode(self) -> dict[str, Any]:
        """What was done and said, as OpenEnv captures episodes of this environment; importers read it."""
        return {
            "scenario": self._about.get("scenario"),
            "task": self.task.instruction,
            "task_idx": self._about.get("task_idx"),
            "tools": [tool.name for tool in self._session.tools],
            "steps": list(self._steps),
            "reward": self._verdict.reward if self._verdict else None,
        }

    async def _finish(self, answer: str) -> Step:
        if self.task.world_model_only:
            self._verdict = Answer({})
            return Step((), done=True, submitted=True)
        verdict = await self._verify(answer)
        if verdict.reward_type in NO_REWARD or not self.config.show_verdict:  # score says what is wrong
            return Step((), done=True, submitted=True)
        parts, truncated = observed(verdict.observation, self.config.max_result_chars)
        return Step((_said(DONE.name, parts),), done=True, submitted=True, truncated=truncated)

    async def _verify(self, answer: str | None) -> Answer:
        arguments = {"verifier_mode": self.config.verifier}
        if answer is not None:
            arguments["final_answer"] = answer
        self._verdict = await self._session.call("verify", arguments)
        self._record("verify", arguments, self._verdict)
        return self._verdict

    def _record(self, tool: str, arguments: Mapping[str, Any], answer: Answer) -> None:
        action = {"tool_name": tool, "arguments": dict(arguments)}
        self._steps.append({"action": action, "observation": {"done": answer.done, **answer.observation}})


def observed(observation: Mapping[str, Any], max_chars: int) -> tuple[tuple[Part, ...], bool]:
    """The parts of an observation, and whether some of it was left out."""
    said = observation.get("tool_result")
    if said is None and observation.get("verify_result") is not None:
        said = {name: observation[name] for name in ("verify_result", "reward_type") if name in observation}
    elif said is None:
        said = {"error": observation["error"]} if observation.get("error") is not None else ""
    text = said if isinstance(said, str) else json.dumps(said, sort_keys=True, ensure_ascii=False)
    warning = observation.get("warning")
    parts = [Part(f"{warning}\n", TokenRole.WARNING)] if warning else []
    parts += truncate_text(text, max_chars, TokenRole.ENV_OUTPUT) or [Part("[no output]", TokenRole.WARNING)]
    return tuple(parts), len(text) > max_chars


def _said(tool: str, parts: tuple[Part, ...]) -> Message:
    return Message("tool", parts, tool=tool)
