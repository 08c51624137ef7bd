"""Interface between a rollout and whatever samples its actions: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Parameters of sampling. ``temperature`` 0 is greedy."""

    temperature: float = 1.0
    max_tokens: int = 256  # of one action
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.max_tokens < 1:
            raise ValueError(f"temperature={self.temperature} and max_tokens={self.max_tokens}: need >= 0 and >= 1")


@dataclass(frozen=True, slots=True)
class Completion:
    """An action: token ids, stop token included, and the log-probability of each in nats at the sampling temperature.

    ``logprobs`` is None if no policy sampled it (see ``Segment``); ``stopped`` is False if the token limit cut it.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    stopped: bool


class SamplerSession(Protocol):
    """A rollout's connection to the sampler, which may keep the KV cache of its history between turns."""

    async def sample(self, token_ids: Sequence[int], max_tokens: int | None = None) -> Completion:
        """Sample the action that follows a history. ``max_tokens`` lowers the sampler's own limit, never raises it."""
        ...


class Sampler(Protocol):
    """A policy at one version, which its completions are of."""

    @property
    def policy_version(self) -> int: ...

    def session(self, key: str) -> AbstractAsyncContextManager[SamplerSession]:
        """Open a session for a rollout. Its ``key`` and the seed fix its random numbers."""
        ...


class ScriptedSampler:
    """A sampler that returns replies written in advance: for tests, explorers and oracles.

    ``replies`` is a list of texts, the same in every session, or a function from the session's key to one; the last is
    repeated. ``encode`` turns a text into token ids (usually ``renderer.encode_text``, stop token included).
    ``logprob`` is that of every token, in nats; without it the actions are unsampled.
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

    @asynccontextmanager
    async def session(self, key: str) -> AsyncIterator[SamplerSession]:
        """Open a session that returns the replies for its key."""
        if not (replies := self._replies(key)):
            raise ValueError("a scripted policy needs at least one reply, got none")
        yield _ScriptedSession(chain(replies, repeat(replies[-1])), self._encode, self._logprob)


@dataclass(frozen=True, slots=True)
class _ScriptedSession:
    replies: Iterator[str]
    encode: Callable[[str], Sequence[int]]
    logprob: float | None

    async def sample(self, token_ids: Sequence[int], max_tokens: int | None = None) -> Completion:
        whole = tuple(self.encode(next(self.replies)))
        ids = whole[:max_tokens]
        return Completion(ids, None if self.logprob is None else (self.logprob,) * len(ids), ids == whole)
