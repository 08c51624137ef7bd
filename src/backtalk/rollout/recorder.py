"""Recorder of a running rollout: the trajectory that it becomes is only ever appended to."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from backtalk.language.history import History
from backtalk.language.renderer import Renderer
from backtalk.messages import Message, ParsedAction, clean_text
from backtalk.rollout.sampler import Completion
from backtalk.spans import timed
from backtalk.tasks.task import Task
from backtalk.trajectory import Failure, Segment, StopReason, TokenRole, Trajectory

MAX_TRACEBACK_CHARS = 8_000  # kept of a failure's traceback: its end
_OBSERVATION_ROLES = (TokenRole.ENV_OUTPUT, TokenRole.WARNING)
_SECONDS = {"reset": "reset_seconds", "sample": "sample_seconds", "step": "env_seconds", "score": "score_seconds"}
_COUNTS = (
    "invalid_calls",  # turns without a valid call
    "unclean_turns",  # turns with a parse error or a format warning
    "role_confusions",  # turns in which the policy wrote the format of observations
    "cut_after_call",  # turns in which the policy went on after its calls
    "drifts",  # histories that had to be rewritten
    "command_timeouts",
    "truncated_observations",
    "retries",  # environments that broke before this one
)


@dataclass(slots=True)
class Recorder:
    """Record of a rollout so far: tokens, messages for people to read, statistics, and how it ended.

    ``history`` holds the tokens that the policy continues. ``phase`` is the one that a failure is recorded with: reset,
    sample, step, score, or close.
    """

    history: History = field(default_factory=History)
    segments: list[Segment] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    stats: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*_COUNTS, *_SECONDS.values()), 0.0))
    phase: str = "reset"
    stop_reason: StopReason = StopReason.MAX_TURNS
    reward: float | None = None
    failure: Failure | None = None

    @contextmanager
    def in_phase(self, phase: str) -> Iterator[None]:
        """Enter a phase, and add the seconds inside to those of the phase."""
        self.phase, start = phase, time.perf_counter()
        try:
            with timed(phase):
                yield
        finally:
            self.stats[_SECONDS[phase]] += time.perf_counter() - start

    @property
    def token_ids(self) -> list[int]:
        """Return the token ids of the current branch."""
        return self.history.token_ids

    def append_prompt(self, messages: Sequence[Message], renderer: Renderer) -> None:
        """Append the prompt."""
        self.segments += self.history.begin(messages, renderer)
        self._append_messages(messages)

    def append_action(self, completion: Completion, action: ParsedAction, turn: int) -> None:
        """Append an action, unchanged; one without a token is a turn too."""
        ids, branch = completion.token_ids, self.history.branch
        self.segments.append(Segment(TokenRole.ACTION, ids, completion.logprobs, turn=turn, branch=branch))
        self.history.act(ids)
        self.stats["cut_after_call"] += bool(completion.dropped)
        self.messages.append({"role": "assistant", "content": action.text})

    def append_observation(self, messages: Sequence[Message], renderer: Renderer, max_tokens: int) -> int:
        """Append an observation, cut so that the history has at most ``max_tokens``.

        A history that the chat template does not allow to be extended is rewritten, which begins a new branch. Return
        the number of ENV_OUTPUT and WARNING tokens that were cut off.
        """
        branch, tokens_left = self.history.branch, max_tokens - len(self.token_ids)
        segments = self.history.observe(messages, renderer)
        if self.history.branch > branch:
            self.stats["drifts"] += 1
            tokens_left = max_tokens
        del self.token_ids[max_tokens:]
        dropped = 0
        for segment in segments:
            kept = replace(segment, token_ids=segment.token_ids[: max(0, tokens_left)])
            self.segments += [kept] if len(kept) else []
            tokens_left -= len(kept)
            dropped += len(segment) - len(kept) if segment.role in _OBSERVATION_ROLES else 0
        self._append_messages(messages)
        return dropped

    def _append_messages(self, messages: Sequence[Message]) -> None:
        for message in messages:
            tool = {} if message.tool is None else {"tool": message.tool}
            self.messages.append({"role": message.role, "content": clean_text(message.text), **tool})

    def fail(self, error: Exception) -> None:
        """Record that the environment, the sampler or the verifier broke: no reward, and everything so far is kept."""
        self.stop_reason, self.reward = StopReason.FAILED, None
        told = "".join(traceback.format_exception(error))
        self.failure = Failure(self.phase, type(error).__name__, str(error), told[-MAX_TRACEBACK_CHARS:])

    @property
    def has_acted(self) -> bool:
        """Return whether the policy has acted."""
        return any(segment.role is TokenRole.ACTION for segment in self.segments)

    @property
    def may_be_retried(self) -> bool:
        """Return whether it failed before the policy's first action, so that a retry loses and selects nothing."""
        return self.failure is not None and self.failure.phase != "score" and not self.has_acted

    def trajectory(self, task: Task, sample_index: int, policy_version: int) -> Trajectory:
        """Return the trajectory of the finished rollout."""
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
        tokens = {"action_tokens": TokenRole.ACTION, "env_output_tokens": TokenRole.ENV_OUTPUT}
        counts = {"num_turns": trajectory.num_turns} | {name: trajectory.count(role) for name, role in tokens.items()}
        return replace(trajectory, stats={name: float(value) for name, value in (counts | self.stats).items()})
