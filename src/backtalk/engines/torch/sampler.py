"""Batched sampler over any causal language model of transformers, which keeps the KV cache across turns.

Rollouts wait for each other: when every open session has asked for its next action, one *wave* samples all of them in a
worker thread, so the asyncio loop stays free. Which rows share a wave depends on the rollouts alone and not on time, so
a run is repeatable. Random numbers depend on (seed, session key, call) and never on the batch, so another batch changes
results by rounding only.

Legend: N rows of the wave, M of them still decoding, L most tokens any of them may sample, V vocabulary.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from backtalk.engines.torch.draws import cdf_dtype, sample_tokens, start_reading, uniform_numbers
from backtalk.engines.torch.kv import History, KVCache, KVStats, open_kv_cache
from backtalk.engines.torch.sessions import Request, Session
from backtalk.errors import SamplerError
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


def open_worker_thread() -> ThreadPoolExecutor:
    """Return an executor of one thread, which has as many PyTorch threads as this one."""
    threads = torch.get_num_threads()  # a new thread would start with the default number of its own
    return ThreadPoolExecutor(1, "backtalk-sampler", torch.set_num_threads, (threads,))


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
        self._executor = open_worker_thread()
        self.open_sessions: dict[str, Session] = {}
        self._waiting: dict[str, Request] = {}
        self._wave: list[Request] = []
        self._run: asyncio.Future[list[Completion]] | None = None  # the last wave in the worker thread
        self._check_scheduled = False

    @property
    def stats(self) -> SamplerStats:
        """Return the counts so far."""
        return self._worker.stats

    def session(self, key: str) -> Session:
        """Return a rollout's session, for ``async with sampler.session(key) as session``."""
        return Session(self, key)

    def ask(self, request: Request) -> None:
        """Put a call into the next wave."""
        self._waiting[request.session.key] = request
        self._check_soon()

    def withdraw(self, request: Request) -> None:
        """Take a call out of the next wave, if it is not in a wave already."""
        if self._waiting.get(request.session.key) is request:
            del self._waiting[request.session.key]
            self._check_soon()

    async def close(self, session: Session) -> None:
        """Wait for a session no more; after the last one, wait for the model to be at rest."""
        self._check_soon()
        if not self.open_sessions and self._run is not None:
            await asyncio.wait((self._run,))

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
        if not self.open_sessions:
            self._worker.cache.clear()
        elif len(self._waiting) == len(self.open_sessions):
            self._wave = [self._waiting.pop(key) for key in sorted(self._waiting)]
            self._run = asyncio.get_running_loop().run_in_executor(self._executor, self._worker.run, self._wave)
            self._run.add_done_callback(self._finish)

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


class _Worker:
    """The part of a sampler that runs in its worker thread, one wave at a time."""

    def __init__(
        self, model: nn.Module, params: SamplingParams, stop_ids: frozenset[int], device: torch.device, cache: KVCache
    ) -> None:
        self.cache = cache
        self.stats = SamplerStats(kv=cache.stats)
        self._model, self._params, self._stop_ids, self._device = model, params, stop_ids, device
        self._runs_ahead = device.type == "cuda"

    def run(self, wave: Sequence[Request]) -> list[Completion]:
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

    def _decode(self, wave: Sequence[Request]) -> tuple[list[list[int]], list[list[float]]]:
        """Return the sampled ids and their log-probabilities of each request, in the order of ``wave``.

        A token is looked at here once, to see which rows go on. A GPU is then at work on the next one already: it runs
        once more for rows that have ended, in place of waiting after every token.
        """
        active, logits_MV = self.cache.begin([History(r.session, r.token_ids) for r in wave])  # the request in each row
        width = max(request.limit for request in wave)
        seed = self._params.seed
        uniforms = np.stack([uniform_numbers(seed, r.session.key, r.call, width) for r in wave])
        uniforms_NL = torch.from_numpy(uniforms).to(self._device, cdf_dtype(self._device))
        active_M = torch.tensor(active, device=self._device)
        alive, lengths = [True] * len(active), [0] * len(wave)
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        for t in range(width):
            ids_M, logprobs_M = sample_tokens(logits_MV, uniforms_NL[active_M, t], self._params.temperature)
            steps.append((active_M, ids_M, logprobs_M))
            read = start_reading(ids_M)
            if self._runs_ahead and t + 1 < width:
                logits_MV = self._step(ids_M)
            for row, (i, token) in enumerate(zip(active, read()[0], strict=True)):
                lengths[i] += alive[row]
                alive[row] = alive[row] and not wave[i].is_cancelled and wave[i].goes_on(t + 1, token, self._stop_ids)
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
