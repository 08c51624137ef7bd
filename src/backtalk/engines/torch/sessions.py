"""Sessions of the embedded samplers: they check a rollout's calls, number them, and hand them on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from backtalk.errors import ConfigError
from backtalk.rollout.sampler import Completion, SamplingParams


@dataclass(slots=True, eq=False)
class Request:
    """A session's call for its next action: one row of a batch."""

    session: Session
    call: int  # in its session, from 0
    token_ids: tuple[int, ...]
    limit: int
    is_over: Callable[[int], bool] | None  # told each token, says whether it is the last
    answer: asyncio.Future[Completion]
    is_cancelled: bool = field(default=False, init=False)  # its rollout waits no more

    def goes_on(self, length: int, token: int, stop_ids: frozenset[int]) -> bool:
        """Return whether the action goes on after ``token``, its ``length``-th."""
        if length >= self.limit or token in stop_ids:
            return False
        return self.is_over is None or not self.is_over(token)


class SessionOwner(Protocol):
    """A sampler, as its sessions know it."""

    params: SamplingParams
    open_sessions: dict[str, Session]

    def ask(self, request: Request) -> None:
        """Take a call, which is answered by the request's future."""
        ...

    def withdraw(self, request: Request) -> None:
        """Forget a call whose rollout was cancelled."""
        ...

    async def close(self, session: Session) -> None:
        """Take note that a session, none of the open ones any more, has closed."""
        ...


class Session:
    """A ``SamplerSession`` of an embedded sampler; as an object it is also the owner of a row in the KV cache."""

    def __init__(self, sampler: SessionOwner, key: str) -> None:
        self.key = key
        self._sampler = sampler
        self._calls = 0
        self._is_open = False
        self._request: Request | None = None  # that waits for its answer

    async def __aenter__(self) -> Session:
        if self.key in self._sampler.open_sessions:
            raise ConfigError(
                f"session {self.key!r} is already open, and a second one would draw the same random numbers; "
                "give every rollout a key of its own"
            )
        self._sampler.open_sessions[self.key] = self
        self._is_open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_open = False
        del self._sampler.open_sessions[self.key]
        if self._request is not None:  # its task goes on outside the session
            self._cancel(self._request)
            self._request.answer.cancel()
        await self._sampler.close(self)

    async def sample(self, token_ids: Sequence[int], max_tokens: int | None = None) -> Completion:
        """Return this session's next action; ConfigError for a call that cannot be answered."""
        return await self._sample(token_ids, max_tokens, None)

    async def sample_watched(
        self, token_ids: Sequence[int], max_tokens: int | None, is_over: Callable[[int], bool]
    ) -> Completion:
        """Do as ``sample`` does, and stop after the first token for which ``is_over`` is true."""
        return await self._sample(token_ids, max_tokens, is_over)

    async def _sample(
        self, token_ids: Sequence[int], max_tokens: int | None, is_over: Callable[[int], bool] | None
    ) -> Completion:
        if not self._is_open or self._request is not None:
            state = "already waits for an action" if self._is_open else "is not open"
            raise ConfigError(
                f"session {self.key!r} {state}; use `async with sampler.session(key)` and await one sample at a time"
            )
        if not token_ids or (max_tokens is not None and max_tokens < 1):
            raise ConfigError(
                f"cannot continue {len(token_ids)} tokens by at most {max_tokens}; "
                "give at least one token and room for one more"
            )
        limit = min(self._sampler.params.max_tokens, max_tokens or self._sampler.params.max_tokens)
        answer: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        request = Request(self, self._calls, tuple(token_ids), limit, is_over, answer)
        self._calls, self._request = self._calls + 1, request
        self._sampler.ask(request)
        try:
            return await answer
        except asyncio.CancelledError:
            self._cancel(request)
            raise
        finally:
            self._request = None

    def _cancel(self, request: Request) -> None:
        request.is_cancelled = True
        self._sampler.withdraw(request)
