"""Interface between a rollout and whatever samples its actions: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Protocol, runtime_checkable

from backtalk.language.action_end import ActionEnd


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Parameters of sampling. ``temperature`` 0 is greedy."""

    temperature: float = 1.0
    max_tokens: int = 256  # of one action
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.max_tokens < 1:
            raise ValueError(f"temperature={self.temperature} and max_tokens={self.max_tokens}: need >= 0 and >= 1")


def request_seed(seed: int, key: str, call: int) -> int:
    """Return the seed of one request to a server, by the session's key and the number of the call: from 0 to 2^31-1."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}/{call}".encode()).digest()[:4], "big") >> 1


@dataclass(frozen=True, slots=True)
class Completion:
    """An action: token ids, stop token included, and the log-probability of each in nats at the sampling temperature.

    ``logprobs`` is None if no policy sampled it (see ``Segment``); ``stopped`` is False if the token limit cut it.
    ``dropped`` are ids that were sampled after it and are in no history (``sample_action``).
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    stopped: bool
    dropped: tuple[int, ...] = ()

    @property
    def sampled_ids(self) -> tuple[int, ...]:
        """Return all sampled token ids, kept or not."""
        return self.token_ids + self.dropped


class SamplerSession(Protocol):
    """A rollout's connection to the sampler, which may keep the KV cache of its history between turns."""

    async def sample(self, token_ids: Sequence[int], max_tokens: int | None = None) -> Completion:
        """Sample the action that follows a history. ``max_tokens`` lowers the sampler's own limit, never raises it."""
        ...


@runtime_checkable
class WatchedSession(Protocol):
    """A ``SamplerSession`` that can stop before the end of the turn. Any other one samples on, which is only slower."""

    async def sample_watched(
        self, token_ids: Sequence[int], max_tokens: int | None, is_over: Callable[[int], bool]
    ) -> Completion:
        """Sample as ``sample`` does; give each token to ``is_over`` and stop with the first for which it is true."""
        ...


async def sample_action(
    session: SamplerSession, token_ids: Sequence[int], max_tokens: int | None, action_end: ActionEnd | None
) -> Completion:
    """Sample the action that follows a history, and drop what the policy sampled after its calls.

    The action is the same whether the session stops there or not. ``action_end`` is that of the renderer.
    """
    if action_end is not None and isinstance(session, WatchedSession):
        completion = await session.sample_watched(token_ids, max_tokens, action_end.watch())
    else:
        completion = await session.sample(token_ids, max_tokens)
    return cut_after_calls(completion, action_end)


def cut_after_calls(completion: Completion, action_end: ActionEnd | None) -> Completion:
    """Return an action without what was sampled after its calls; what is kept is as it was sampled."""
    ids = completion.token_ids
    n = len(ids) if action_end is None else action_end.count_kept(ids)
    if n == len(ids):
        return completion
    return Completion(ids[:n], completion.logprobs and completion.logprobs[:n], stopped=True, dropped=ids[n:])


class Sampler(Protocol):
    """A policy at one version, which its completions are of."""

    @property
    def policy_version(self) -> int: ...

    def session(self, key: str) -> AbstractAsyncContextManager[SamplerSession]:
        """Open a session for a rollout. Its ``key`` and the seed fix its random numbers."""
        ...


@runtime_checkable
class ContinuousSampler(Protocol):
    """A ``Sampler`` that batches whatever requests it has, so that a rollout waiting for a command holds no other."""

    async def prepare(self) -> None:
        """Get ready to sample at this version, before any rollout begins.

        Raises:
            SamplerFault: it cannot.
        """
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
