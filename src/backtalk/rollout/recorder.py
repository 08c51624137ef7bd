"""A trajectory in the making: what is appended while a rollout runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from backtalk.language.history import History
from backtalk.language.renderer import Renderer
from backtalk.messages import Message, ParsedAction, clean_text
from backtalk.rollout.sampler import Completion
from backtalk.tasks.task import Task
from backtalk.trajectory import Failure, Segment, StopReason, TokenRole, Trajectory

_BODY = (TokenRole.ENV_OUTPUT, TokenRole.WARNING)
_SECONDS = {"reset": "reset_seconds", "sample": "sample_seconds", "step": "env_seconds", "score": "score_seconds"}
_COUNTS = (
    "invalid_calls",  # turns without a valid call
    "unclean_turns",  # turns with a parse error or a format warning
    "role_confusions",  # turns whose action holds the format of observations
    "drifts",  # histories that had to be rewritten
    "command_timeouts",
    "truncated_observations",
    "retries",  # tries before this one, in worlds that broke
)


@dataclass(slots=True)
class Record:
    """What has happened in a rollout so far. Segments and messages are only ever appended.

    ``history`` is what the policy goes on from, and ``messages`` what was said for people to read.
    ``where`` is the phase that a failure would carry: reset, sample, step, score, or close when all is done.
    """

    history: History = field(default_factory=History)
    segments: list[Segment] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    stats: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*_COUNTS, *_SECONDS.values()), 0.0))
    where: str = "reset"
    stop_reason: StopReason = StopReason.MAX_TURNS
    reward: float | None = None
    failure: Failure | None = None

    @contextmanager
    def phase(self, where: str) -> Iterator[None]:
        """Seconds inside are counted for ``where``, and a failure inside carries its name."""
        self.where, start = where, time.perf_counter()
        try:
            yield
        finally:
            self.stats[_SECONDS[where]] += time.perf_counter() - start

    @property
    def token_ids(self) -> list[int]:
        """Ids of the current branch."""
        return self.history.token_ids

    def begin(self, messages: Sequence[Message], renderer: Renderer) -> None:
        """Append the prompt."""
        self.segments += self.history.begin(messages, renderer)
        self._say(messages)

    def act(self, completion: Completion, action: ParsedAction, turn: int) -> None:
        """Append an action, unchanged; one of no token is still a turn."""
        ids, branch = completion.token_ids, self.history.branch
        self.segments.append(Segment(TokenRole.ACTION, ids, completion.logprobs, turn=turn, branch=branch))
        self.history.act(ids)
        self.messages.append({"role": "assistant", "content": action.text})

    def observe(self, messages: Sequence[Message], renderer: Renderer, max_tokens: int) -> int:
        """Append what the policy sees next, up to ``max_tokens``; returns how many observation-body tokens did not fit.

        Where the history cannot be extended as it is, it is rewritten, and a new branch begins with it.
        """
        branch, room = self.history.branch, max_tokens - len(self.token_ids)
        segments = self.history.observe(messages, renderer)
        if self.history.branch > branch:
            self.stats["drifts"] += 1
            room = max_tokens
        del self.token_ids[max_tokens:]
        dropped = 0
        for segment in segments:
            kept = replace(segment, token_ids=segment.token_ids[: max(0, room)])
            self.segments += [kept] if len(kept) else []
            room -= len(kept)
            dropped += len(segment) - len(kept) if segment.role in _BODY else 0
        self._say(messages)
        return dropped

    def _say(self, messages: Sequence[Message]) -> None:
        for message in messages:
            named = {} if message.tool is None else {"tool": message.tool}
            self.messages.append({"role": message.role, "content": clean_text(message.text), **named})

    def fail(self, error: Exception) -> None:
        """The world broke: no reward, and everything so far stays."""
        self.stop_reason, self.reward = StopReason.FAILED, None
        self.failure = Failure(self.where, type(error).__name__, str(error))

    @property
    def may_be_retried(self) -> bool:
        """Whether the world broke before the policy said anything: nothing is lost then, and nothing selected by it."""
        spoke = any(segment.role is TokenRole.ACTION for segment in self.segments)
        return self.failure is not None and self.failure.phase != "score" and not spoke

    def trajectory(self, task: Task, sample_index: int, policy_version: int) -> Trajectory:
        trajectory = Trajectory(
            task_id=task.id,
            sample_index=sample_index,
            segments=tuple(self.segments),
            messages=tuple(self.messages),
            reward=self.reward,
            stop_reason=self.stop_reason,
            policy_version=policy_version,
            failure=self.failure,
        )
        counts = {
            "num_turns": float(trajectory.num_turns),
            "action_tokens": float(trajectory.count(TokenRole.ACTION)),
            "env_output_tokens": float(trajectory.count(TokenRole.ENV_OUTPUT)),
        }
        return replace(trajectory, stats={**counts, **self.stats})
