"""A trajectory in the making: what is appended while a rollout runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

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

    ``token_ids`` are those of the current branch, which the policy goes on from; ``conversation`` is what was said, an
    action as its ids, and ``messages`` the same for people to read.
    ``where`` is the phase that a failure would carry: reset, sample, step, score, or close when all is done.
    """

    token_ids: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    branch: int = 0
    conversation: list[Message | Sequence[int]] = field(default_factory=list)
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

    def add(self, segments: Sequence[Segment], max_tokens: int | None = None) -> int:
        """Append to the branch what fits into ``max_tokens``; returns how many observation-body tokens did not."""
        dropped = 0
        for segment in segments:
            room = len(segment) if max_tokens is None else max(0, max_tokens - len(self.token_ids))
            kept = replace(segment, token_ids=segment.token_ids[:room], branch=self.branch)
            if len(kept) or segment.role is TokenRole.ACTION:  # an action of no token is still a turn
                self.segments.append(kept)
            self.token_ids += kept.token_ids
            dropped += len(segment) - len(kept) if segment.role in _BODY else 0
        return dropped

    def act(self, completion: Completion, action: ParsedAction, turn: int) -> None:
        """Append an action, unchanged."""
        self.add([Segment(TokenRole.ACTION, completion.token_ids, completion.logprobs, turn=turn)])
        self.conversation.append(completion.token_ids)
        self.messages.append({"role": "assistant", "content": action.text})

    def observe(self, messages: Sequence[Message], renderer: Renderer, turn: int, max_tokens: int) -> int:
        """Append what the policy sees next; returns how many observation-body tokens did not fit.

        Where the history cannot be extended as it is, it is rewritten, and a new branch begins with it.
        """
        if not renderer.extends_turn(self.conversation, messages):
            segments = renderer.render_history(self.conversation, messages, turn=turn, branch=self.branch + 1)
            self.branch, self.token_ids = self.branch + 1, []
            self.stats["drifts"] += 1
        else:
            closed = self.token_ids[-1:] == [renderer.end_of_turn_id]
            segments = renderer.render_observation(messages, turn=turn, closed=closed)
        self.say(messages)
        return self.add(segments, max_tokens)

    def say(self, messages: Sequence[Message]) -> None:
        """Keep what was said to the policy."""
        self.conversation += messages
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
        return self.failure is not None and self.failure.where != "score" and not spoke

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
