"""Continuous sampler over any causal language model of transformers with full attention alone.

A rollout whose command has returned joins the batch between two tokens, and leaves it at the end of its action; none
waits for another. Random numbers are those of the wave sampler, of (seed, session key, call), so when a rollout joins,
and beside which others, changes its numbers by rounding only. That is a matter of time: a run repeats but for rounding.

transformers has a batcher of its own. It draws all rows from one generator, forgets a request's cache at its end, and
changes the model's attention, which is the trainer's too; so it is not used here.

Legend: M rows that decode, V vocabulary.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from backtalk.engines.torch.draws import cdf_dtype, sample_tokens, start_reading, uniform_numbers
from backtalk.engines.torch.kv import History, persistence_obstacle
from backtalk.engines.torch.kv_slots import SlotKVCache
from backtalk.engines.torch.sampler import SamplerStats, open_worker_thread
from backtalk.engines.torch.sessions import Request, Session
from backtalk.errors import ConfigError, SamplerError
from backtalk.rollout.sampler import Completion, SamplingParams
from backtalk.spans import timed


def check_continuous(model: nn.Module) -> None:
    """Raise ConfigError for a model that cannot be sampled from continuously."""
    if (reason := persistence_obstacle(model)) is not None:
        raise ConfigError(
            f"engine.batching='continuous' needs a cache of which rows can join and leave, and {type(model).__name__} "
            f"cannot have it: {reason}; use engine.batching='wave'"
        )


class ContinuousTorchSampler:
    """A ``ContinuousSampler`` of a policy at one version.

    The weights must not change while a session is open. When the last one has closed, the model is at rest.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        params: SamplingParams,
        stop_token_ids: Collection[int],
        pad_token_id: int,
        policy_version: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        check_continuous(model)
        device = torch.device(device) if device is not None else next(model.parameters()).device
        self.policy_version = policy_version
        self.params = params
        self.open_sessions: dict[str, Session] = {}
        cache = SlotKVCache(model, pad_token_id, device)
        self._decoder = _Decoder(model, params, frozenset(stop_token_ids), device, cache)
        self._executor = open_worker_thread()
        self._run: asyncio.Future[None] | None = None  # of the decoder in its thread

    @property
    def stats(self) -> SamplerStats:
        """Return the counts so far."""
        return self._decoder.stats

    async def prepare(self) -> None:
        """Do nothing: the policy is at its version."""

    def session(self, key: str) -> Session:
        """Return a rollout's session, for ``async with sampler.session(key) as session``."""
        return Session(self, key)

    def ask(self, request: Request) -> None:
        """Let a call join the batch at the next token."""
        self._tell(request)

    def withdraw(self, request: Request) -> None:
        """Do nothing: the decoder sees for itself that the call is cancelled."""

    async def close(self, session: Session) -> None:
        """Give a session's row back; after the last session, wait for the model to be at rest."""
        self._tell(session)
        if not self.open_sessions and self._run is not None:
            await asyncio.shield(self._run)

    def _tell(self, news: Request | Session) -> None:
        """Tell the decoder that a call is there, or that a session has closed, and wake it if it is at rest."""
        if self._decoder.tell(news):
            self._run = asyncio.get_running_loop().run_in_executor(self._executor, self._decoder.run)


@dataclass(slots=True, eq=False)
class _Row:
    """A call that decodes."""

    request: Request
    uniforms: np.ndarray
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def history(self) -> History:
        """Return the tokens of this row that the cache holds: all but the last, which was sampled and not yet run."""
        return History(self.request.session, self.request.token_ids + tuple(self.ids[:-1]))


class _Decoder:
    """The part of the sampler that runs in its worker thread, for as long as any call is there."""

    def __init__(
        self,
        model: nn.Module,
        params: SamplingParams,
        stop_ids: frozenset[int],
        device: torch.device,
        cache: SlotKVCache,
    ) -> None:
        self.cache = cache
        self.stats = SamplerStats(kv=cache.stats)
        self._model, self._params, self._stop_ids, self._device = model, params, stop_ids, device
        self._runs_ahead = device.type == "cuda"
        self._lock = threading.Lock()  # of the next two
        self._news: list[Request | Session] = []
        self._is_running = False
        self._rows: list[_Row] = []
        self._logits_MV = torch.empty(0)

    def tell(self, news: Request | Session) -> bool:
        """Take note of a call or a session that has closed; return whether ``run`` has to be called."""
        with self._lock:
            self._news.append(news)
            was_running, self._is_running = self._is_running, True
            return not was_running

    def run(self) -> None:
        """Decode until no call is left."""
        was_training = self._model.training
        self._model.eval()
        try:
            with timed("sampling", track="sampler"), torch.inference_mode():
                while (news := self._take_news()) is not None:
                    try:
                        self._take_in(news)
                        self._decode_token()
                    except Exception as error:
                        self._fail(error, news)
        finally:
            self._model.train(was_training)

    def _take_news(self) -> list[Request | Session] | None:
        """Return the news since the last token; None, and come to rest, where there is nothing to do."""
        with self._lock:
            news, self._news = self._news, []
            self._is_running = bool(news or self._rows)
            return news if self._is_running else None

    def _take_in(self, news: Sequence[Request | Session]) -> None:
        """Let cancelled calls leave and new ones join."""
        self._leave([not row.request.is_cancelled for row in self._rows])
        for session in news:
            if isinstance(session, Session):
                self.cache.free(session)
        calls = [request for request in news if isinstance(request, Request) and not request.is_cancelled]
        if not calls:
            return
        order, logits_NV = self.cache.join([History(call.session, call.token_ids) for call in calls])
        self._logits_MV = torch.cat([self._logits_MV, logits_NV]) if self._rows else logits_NV
        seed = self._params.seed
        for i in order:
            call = calls[i]
            self._rows.append(_Row(call, uniform_numbers(seed, call.session.key, call.call, call.limit)))
        self.stats.calls += len(calls)

    def _decode_token(self) -> None:
        """Sample one token of every row; a GPU is at work on the next one already while this one is looked at."""
        if not self._rows:
            return
        uniforms = np.array([row.uniforms[len(row.ids)] for row in self._rows])
        uniforms_M = torch.from_numpy(uniforms).to(self._device, cdf_dtype(self._device))
        ids_M, logprobs_M = sample_tokens(self._logits_MV, uniforms_M, self._params.temperature)
        read = start_reading(ids_M, logprobs_M)
        if self._runs_ahead:
            self._logits_MV = self._step(ids_M)
        alive = [self._append(row, token, logprob) for row, token, logprob in zip(self._rows, *read(), strict=True)]
        kept = self._leave(alive)
        if self._rows and not self._runs_ahead:
            self._logits_MV = self._step(ids_M if kept is None else ids_M[kept])

    def _append(self, row: _Row, token: int, logprob: float) -> bool:
        """Append a token to a row, and answer its call if that was the last; return whether it goes on."""
        row.ids.append(token)
        row.logprobs.append(logprob)
        self.stats.action_tokens += 1
        if not math.isfinite(logprob):
            _answer(row.request, SamplerError("the model's logits are not finite (NaN or infinite weights?)"))
            return False
        if row.request.goes_on(len(row.ids), token, self._stop_ids):
            return True
        _answer(row.request, Completion(tuple(row.ids), tuple(row.logprobs), token in self._stop_ids))
        return False

    def _leave(self, alive: Sequence[bool]) -> Tensor | None:
        """Take the rows that are not alive out of the batch; return which rows stay, None for all."""
        if all(alive):
            return None
        self.cache.end([row.history() for row, is_alive in zip(self._rows, alive, strict=True) if not is_alive])
        order = self.cache.keep(alive)
        self._rows = [self._rows[i] for i in order]
        kept = torch.tensor(order, dtype=torch.long, device=self._device)
        self._logits_MV = self._logits_MV[kept]
        return kept

    def _step(self, ids_M: Tensor) -> Tensor:
        self.stats.decode_steps += 1
        self.stats.decode_rows += len(ids_M)
        return self.cache.step(ids_M)

    def _fail(self, error: Exception, news: Sequence[Request | Session]) -> None:
        """Answer all calls that are there with an error, and forget the cache, whose state is unknown now."""
        calls = {id(row.request): row.request for row in self._rows}
        calls |= {id(call): call for call in news if isinstance(call, Request)}
        for call in calls.values():
            failure = SamplerError(f"sampling {len(calls)} rows failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            _answer(call, failure)
        self._rows = []
        self.cache.clear()


def _answer(request: Request, result: Completion | SamplerError) -> None:
    """Give a call its answer, in the event loop that waits for it."""

    def answer() -> None:
        if request.answer.done():  # its rollout was cancelled meanwhile
            return
        if isinstance(result, Completion):
            request.answer.set_result(result)
        else:
            request.answer.set_exception(result)

    with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
        request.answer.get_loop().call_soon_threadsafe(answer)
