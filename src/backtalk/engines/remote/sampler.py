"""Sampler over a service: each action is a request of its own, and the service batches what comes at once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from backtalk.engines.remote.service import SamplingWeights
from backtalk.rollout.sampler import Completion, SamplerSession, SamplingParams, request_seed


@dataclass(slots=True)
class Usage:
    """Tokens that the service worked on since the last step: what it bills."""

    prefill_tokens: int = 0  # of prompts, and of forward passes
    sampled_tokens: int = 0
    trained_tokens: int = 0


class RemoteSampler:
    """The policy at one version. ``weights`` returns it, saved for sampling when it is first asked for."""

    def __init__(
        self,
        weights: Callable[[], Awaitable[SamplingWeights]],
        *,
        params: SamplingParams,
        stop_token_ids: Sequence[int],
        policy_version: int,
        usage: Usage,
    ) -> None:
        self._weights, self.params, self.stop_token_ids, self.usage = weights, params, stop_token_ids, usage
        self.policy_version = policy_version

    @asynccontextmanager
    async def session(self, key: str) -> AsyncIterator[SamplerSession]:
        """Open a session; its key, the seed and the number of the turn fix the seed of each request."""
        yield _Session(self, await self._weights(), key)


class _Session:
    """A rollout at the sampler. The service may keep the cache of a prompt's prefix; nothing else lasts."""

    def __init__(self, sampler: RemoteSampler, weights: SamplingWeights, key: str) -> None:
        self._sampler, self._weights, self._key, self._turn = sampler, weights, key, 0

    async def sample(self, token_ids: Sequence[int], max_tokens: int | None = None) -> Completion:
        """Sample the action that follows a history."""
        params, usage = self._sampler.params, self._sampler.usage
        limit = params.max_tokens if max_tokens is None else min(max_tokens, params.max_tokens)
        seed = request_seed(params.seed, self._key, self._turn)
        self._turn += 1
        completion = await self._weights.sample(
            token_ids,
            max_tokens=limit,
            temperature=params.temperature,
            seed=seed,
            stop=self._sampler.stop_token_ids,
        )
        usage.prefill_tokens += len(token_ids)
        usage.sampled_tokens += len(completion.token_ids)
        return completion
