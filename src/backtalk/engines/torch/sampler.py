"""Batched sampler over any causal language model of transformers, which keeps the KV cache across turns.

Rollouts wait for each other: when every open session has asked for its next action, one *wave* samples all of them in a
worker thread, so the asyncio loop stays free. Which rows share a wave depends on the rollouts alone and not on time, so
a run is repeatable. Random numbers depend on (seed, session key, call) and never on the batch, so another batch changes
results by rounding only.

Legend: N rows of the wave, M of them still decoding, L most tokens any of them may sample, V vocabulary.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import torch
from torch import Tensor, nn

from backtalk.engines.torch.kv import History, KVCache, KVStats, open_kv_cache
from backtalk.errors import ConfigError, SamplerError
from backtalk.rollout.sampler import Completion, SamplingParams
from backtalk.spans import timed

SHRINK_BELOW = 0.7  # finished rows are dropped when the share of unfinished ones falls below this

log = logging.getLogger(__name__)


@dataclass(slots=True)
class SamplerStats:
    """Running counts of a sampler."""

    kv: KVStats
    waves: int = 0
    calls: int = 0
    action_tokens: int = 0
    decode_steps: int = 0  # forward passes of one token a row
    decode_rows: int = 0  # rows in those passes, finished ones included


@dataclass(frozen=True, slots=True)
class _Request:
    """A session's call for its next action: one row of a wave."""

    session: _Session
    call: int  # in its session, from 0
    token_ids: tuple[int, ...]
    limit: int
    is_over: Callable[[int], bool] | None = field(compare=False)  # told each token, says whether it is the last
    answer: asyncio.Future[Completion] = field(compare=False)


class TorchSampler:
    """A ``Sampler`` of a policy at one version, which samples in waves.

    ``persistent_cache=False`` runs whole histories again in every wave, as models with sliding-window, hybrid or linear
    attention always do. The weights must not change while the sampler is in use: make a new one for each policy
    version.
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
        persistent_cache: bool = True,
    ) -> None:
        device = torch.device(device) if device is not None else next(model.parameters()).device
        cache, reason = open_kv_cache(model, pad_token_id, device, persistent_cache)
        if reason is not None:
            log.warning("%s runs whole histories again on every turn: %s", type(model).__name__, reason)
        self.policy_version = policy_version
        self.params = params
        self._worker = _Worker(model, params, frozenset(stop_token_ids), device, cache)
        threads = torch.get_num_threads()  # a new thread would start with the default number of its own
        self._executor = ThreadPoolExecutor(1, "backtalk-sampler", torch.set_num_threads, (threads,))
        self._open: dict[str, _Session] = {}
        self._waiting: dict[str, _Request] = {}
        self._wave: list[_Request] = []
        self._check_scheduled = False

    @property
    def stats(self) -> SamplerStats:
        """Return the counts so far."""
        return self._worker.stats

    def session(self, key: str) -> _Session:
        """Return a rollout's session, for ``async with sampler.session(key) as session``."""
        return _Session(self, key)

    async def _ask(
        self,
        session: _Session,
        call: int,
        token_ids: tuple[int, ...],
        limit: int,
        is_over: Callable[[int], bool] | None,
    ) -> Completion:
        """Put a call into the next wave and wait for its completion."""
        request = _Request(session, call, token_ids, limit, is_over, asyncio.get_running_loop().create_future())
        self._waiting[session.key] = request
        self._check_soon()
        try:
            return await request.answer
        finally:
            if self._waiting.get(session.key) is request:  # cancelled before its wave
                del self._waiting[session.key]
                self._check_soon()

    def _check_soon(self) -> None:
        """Run ``_check`` after every task that is ready, since some of them may open a session or ask."""
        if not self._check_scheduled:
            self._check_scheduled = True
            asyncio.get_running_loop().call_soon(self._check)

    def _check(self) -> None:
        """Sample for all open sessions in the worker thread, if every one of them waits."""
        self._check_scheduled = False
        if self._wave:
            return
        if not self._open:
            self._worker.cache.clear()
        elif len(self._waiting) == len(self._open):
            self._wave = [self._waiting.pop(key) for key in sorted(self._waiting)]
            loop = asyncio.get_running_loop()
            loop.run_in_executor(self._executor, self._worker.run, self._wave).add_done_callback(self._finish)

    def _finish(self, done: asyncio.Future[list[Completion]]) -> None:
        """Hand the completions of a wave, or its error, to the sessions."""
        wave, self._wave = self._wave, []
        self._check_soon()
        error = asyncio.CancelledError() if done.cancelled() else done.exception()
        for i, request in enumerate(wave):
            if request.answer.done():  # its rollout was cancelled meanwhile
                continue
            if error is None:
                request.answer.set_result(done.result()[i])
            else:
                failure = SamplerError(f"sampling {len(wave)} rows failed: {type(error).__name__}: {error}")
                failure.__cause__ = error
                request.answer.set_exception(failure)


class _Session:
    """A ``SamplerSession`` of this sampler; as an object it is also the owner of a row in the KV cache."""

    def __init__(self, sampler: TorchSampler, key: str) -> None:
        self.key = key
        self._sampler = sampler
        self._calls = 0
        self._is_open = self._is_waiting = False

    async def __aenter__(self) -> _Session:
        if self.key in self._sampler._open:
            raise ConfigError(
                f"session {self.key!r} is already open, and a second one would draw the same random numbers; "
                "give every rollout a key of its own"
            )
        self._sampler._open[self.key] = self
        self._is_open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_open = False
        del self._sampler._open[self.key]
        self._sampler._check_soon()

    async def sample(self, token_ids: Sequence[int], max_tokens: int | None = None) -> Completion:
        """Wait for the next wave and return this session's action; ConfigError for a call that cannot be answered."""
        return await self._sample(token_ids, max_tokens, None)

    async def sample_watched(
        self, token_ids: Sequence[int], max_tokens: int | None, is_over: Callable[[int], bool]
    ) -> Completion:
        """Do as ``sample`` does, and stop after the first token for which ``is_over`` is true."""
        return await self._sample(token_ids, max_tokens, is_over)

    async def _sample(
        self, token_ids: Sequence[int], max_tokens: int | None, is_over: Callable[[int], bool] | None
    ) -> Completion:
        if not self._is_open or self._is_waiting:
            state = "already waits for an action" if self._is_waiting else "is not open"
            raise ConfigError(
                f"session {self.key!r} {state}; use `async with sampler.session(key)` and await one sample at a time"
            )
        if not token_ids or (max_tokens is not None and max_tokens < 1):
            raise ConfigError(
                f"cannot continue {len(token_ids)} tokens by at most {max_tokens}; "
                "give at least one token and room for one more"
            )
        call, self._calls, self._is_waiting = self._calls, self._calls + 1, True
        limit = min(self._sampler.params.max_tokens, max_tokens or self._sampler.params.max_tokens)
        try:
            return await self._sampler._ask(self, call, tuple(token_ids), limit, is_over)
        finally:
            self._is_waiting = False


class _Worker:
    """The part of a sampler that runs in its worker thread, one wave at a time."""

    def __init__(
        self, model: nn.Module, params: SamplingParams, stop_ids: frozenset[int], device: torch.device, cache: KVCache
    ) -> None:
        self.cache = cache
        self.stats = SamplerStats(kv=cache.stats)
        self._model, self._params, self._stop_ids, self._device = model, params, stop_ids, device
        self._runs_ahead = device.type == "cuda"

    def run(self, wave: Sequence[_Request]) -> list[Completion]:
        was_training = self._model.training
        self._model.eval()
        try:
            with timed("sampling", track="sampler"), torch.inference_mode():
                ids, logprobs = self._decode(wave)
            self.cache.end(
                # The last token was sampled and not yet run, so the cache does not hold it.
                [History(r.session, r.token_ids + tuple(new[:-1])) for r, new in zip(wave, ids, strict=True)]
            )
        except BaseException:
            self.cache.clear()  # its state is unknown now
            raise
        finally:
            self._model.train(was_training)
        self.stats.waves += 1
        self.stats.calls += len(wave)
        self.stats.action_tokens += sum(map(len, ids))
        return [
            Completion(tuple(new), tuple(lps), new[-1] in self._stop_ids)
            for new, lps in zip(ids, logprobs, strict=True)
        ]

    def _decode(self, wave: Sequence[_Request]) -> tuple[list[list[int]], list[list[float]]]:
        """Return the sampled ids and their log-probabilities of each request, in the order of ``wave``.

        A token is looked at here once, to see which rows go on. A GPU is then at work on the next one already: it runs
        once more for rows that have ended, in place of waiting after every token.
        """
        active, logits_MV = self.cache.begin([History(r.session, r.token_ids) for r in wave])  # the request in each row
        width = max(request.limit for request in wave)
        seed = self._params.seed
        uniforms = np.stack([uniform_numbers(seed, r.session.key, r.call, width) for r in wave])
        uniforms_NL = torch.from_numpy(uniforms).to(self._device, _cdf_dtype(self._device))
        active_M = torch.tensor(active, device=self._device)
        alive, lengths = [True] * len(active), [0] * len(wave)
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        for t in range(width):
            ids_M, logprobs_M = sample_tokens(logits_MV, uniforms_NL[active_M, t], self._params.temperature)
            steps.append((active_M, ids_M, logprobs_M))
            read_ids = _start_reading(ids_M)
            if self._runs_ahead and t + 1 < width:
                logits_MV = self._step(ids_M)
            for row, (i, token) in enumerate(zip(active, read_ids(), strict=True)):
                lengths[i] += alive[row]
                alive[row] = alive[row] and self._goes_on(wave[i], t + 1, token)
            if not any(alive):
                break
            if sum(alive) < SHRINK_BELOW * len(alive):
                kept = self.cache.keep(alive)
                kept_M = torch.tensor(kept, device=self._device)
                active_M, ids_M = active_M[kept_M], ids_M[kept_M]
                logits_MV = logits_MV[kept_M] if self._runs_ahead else logits_MV
                active, alive = [active[row] for row in kept], [True] * len(kept)
            if not self._runs_ahead:
                logits_MV = self._step(ids_M)
        return _gather(steps, torch.tensor(lengths, device=self._device))

    def _step(self, ids_M: Tensor) -> Tensor:
        self.stats.decode_steps += 1
        self.stats.decode_rows += len(ids_M)
        return self.cache.step(ids_M)

    def _goes_on(self, request: _Request, length: int, token: int) -> bool:
        """Return whether a request goes on after its ``length``-th token."""
        if length >= request.limit or token in self._stop_ids:
            return False
        return request.is_over is None or not request.is_over(token)


def _start_reading(ids_M: Tensor) -> Callable[[], list[int]]:
    """Start to copy ids from their device, and return a function that waits for them alone."""
    if ids_M.device.type != "cuda":
        return ids_M.tolist
    host_M = torch.empty(ids_M.shape, dtype=ids_M.dtype, pin_memory=True)
    host_M.copy_(ids_M, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[int]:
        copied.synchronize()
        return host_M.tolist()

    return read


def _gather(
    steps: Sequence[tuple[Tensor, Tensor, Tensor]], lengths_N: Tensor
) -> tuple[list[list[int]], list[list[float]]]:
    """Turn the columns of a shrinking batch into rows of uneven length; FloatingPointError for NaN or infinity."""
    ids_NL = lengths_N.new_zeros((len(lengths_N), len(steps)))
    logprobs_NL = torch.zeros_like(ids_NL, dtype=torch.float32)
    for t, (active_M, ids_M, logprobs_M) in enumerate(steps):
        ids_NL[active_M, t] = ids_M
        logprobs_NL[active_M, t] = logprobs_M
    lengths = lengths_N.tolist()
    is_token_NL = torch.arange(len(steps), device=lengths_N.device) < lengths_N[:, None]
    if not bool(logprobs_NL[is_token_NL].isfinite().all()):
        raise FloatingPointError("the model's logits are not finite (NaN or infinite weights?)")
    ids = [row[:length] for row, length in zip(ids_NL.tolist(), lengths, strict=True)]
    return ids, [row[:length] for row, length in zip(logprobs_NL.tolist(), lengths, strict=True)]


def uniform_numbers(seed: int, key: str, call: int, count: int) -> np.ndarray:
    """Return ``count`` random numbers in [0, 1), which depend on seed, session key and call alone; float64."""
    digest = hashlib.sha256(f"{seed}/{call}/{key}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(count)


def sample_tokens(logits_MV: Tensor, uniforms_M: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sample ids by inverse CDF, and return them with their log-probabilities in nats at this temperature, [M] each.

    Temperature 0 takes the largest logit; its log-probability is that at temperature 1, since at temperature 0 every
    log-probability would be 0.
    """
    logprobs_MV = torch.log_softmax(logits_MV.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        ids_M = logprobs_MV.argmax(-1)
    else:
        # In float64, so that rare tokens of a large vocabulary keep their share.
        cdf_MV = logprobs_MV.exp().cumsum(-1, dtype=_cdf_dtype(logits_MV.device))
        threshold_M1 = (uniforms_M * cdf_MV[:, -1])[:, None]
        ids_M = torch.searchsorted(cdf_MV, threshold_M1, right=True)[:, 0].clamp(max=logits_MV.shape[-1] - 1)
    return ids_M, logprobs_MV.gather(-1, ids_M[:, None])[:, 0]


def _cdf_dtype(device: torch.device) -> torch.dtype:
    """Return the widest float type of a device."""
    return torch.float32 if device.type == "mps" else torch.float64  # Metal has no float64
