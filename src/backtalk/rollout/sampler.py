"""Token in, token out: how a rollout asks a policy for its next action."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How actions are drawn. ``temperature`` 0 is greedy."""

    temperature: float = 1.0
    max_tokens: int = 256  # of one action
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.max_tokens < 1:
            raise ValueError(f"temperature={self.temperature} and max_tokens={self.max_tokens}: need >= 0 and >= 1")


@dataclass(frozen=True, slots=True)
class Completion:
    """An action: ids and, for each, its log-probability in nats at the sampling temperature.

    ``logprobs`` is None where no policy sampled it (see ``Segment``). The stop token is part of it; ``stopped`` is
    False where the token limit cut it.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    stopped: bool


class SamplerSession(Protocol):
    """One rollout's place at the sampler; a sampler may keep its KV cache between turns."""

    async def sample(self, token_ids: Sequence[int], max_tokens: int | None = None) -> Completion:
        """Continue a history. ``max_tokens`` lowers the sampler's own limit, never raises it."""
        ...


class Sampler(Protocol):
    """A policy at one version."""

    @property
    def policy_version(self) -> int: ...

    def session(self, key: str) -> AbstractAsyncContextManager[SamplerSession]:
        """Open a rollout. ``key`` names it among its siblings, and with the seed fixes its random numbers."""
        ...


class ScriptedSampler:
    """A policy that says what it was told to say: for tests, explorers and oracles.

    ``replies`` is a fixed list of texts, the same in every session, or a function from the session's key
    to one. ``encode`` turns a text into ids (usually ``renderer.encode_action``, stop token included).
    After the last reply it repeats the last one. ``logprob`` is given for every token, in nats; without it the actions
    are unsampled.
    """

    policy_version = 0

    def __init__(
        self,
        replies: Sequence[str] | Callable[[str], Sequence[str]],
        encode: Callable[[str], Sequence[int]],
        logprob: float | None = None,
    ) -> None:
        self._replies = replies if callable(replies) else (lambda key: replies)
        self._encode = encode
        self._logprob = logprob

    def session(self, key: str) -> _ScriptedSession:
        return _ScriptedSession(list(self._replies(key)), self._encode, self._logprob)


class _ScriptedSession:
    def __init__(self, replies: list[str], encode: Callable[[str], Sequence[int]], logprob: float | None) -> None:
        if not replies:
            raise ValueError("a scripted policy needs at least one reply, got none")
        self._replies = replies
        self._encode = encode
        self._logprob = logprob
        self._turn = 0

    async def __aenter__(self) -> _ScriptedSession:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    async def sample(self, token_ids: Sequence[int], max_tokens: int | None = None) -> Completion:
        ids = tuple(self._encode(self._replies[min(self._turn, len(self._replies) - 1)]))
        self._turn += 1
        stopped = max_tokens is None or len(ids) <= max_tokens
        ids = ids if stopped else ids[:max_tokens]
        return Completion(ids, None if self._logprob is None else (self._logprob,) * len(ids), stopped)
