"""SkyRL's inference engines as a sampler: token ids in, token ids and log-probabilities out, nothing re-tokenized."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp  # pyright: ignore[reportMissingImports]  # comes with SkyRL, whose client raises its errors

from backtalk.errors import ConfigError, SamplerError
from backtalk.rollout.sampler import Completion, SamplerSession

_ENDED = ("stop", "length")  # reasons of an engine that are an action's end


class ClientSampler:
    """A sampler over SkyRL's inference client (``InferenceEngineInterface``) at one version of the policy.

    ``params`` are the sampling parameters that SkyRL passes to a generator. The sessions of a rollout reach the same
    engine, which keeps its prefix.
    """

    def __init__(
        self,
        client: Any,
        params: Mapping[str, Any],
        *,
        stop_token_ids: Collection[int],
        policy_version: int = 0,
        model: str | None = None,
    ) -> None:
        self._client, self._model = client, model
        self._params = {**params, "stop_token_ids": sorted(stop_token_ids)}
        self.policy_version = policy_version

    @asynccontextmanager
    async def session(self, key: str) -> AsyncIterator[SamplerSession]:
        """Open a session; SkyRL seeds its engines itself, so ``key`` only names it."""
        try:
            yield _ClientSession(self._client, self._params, key, self._model)
        finally:
            await self._client.finish_session(key)


@dataclass(frozen=True, slots=True)
class _ClientSession:
    client: Any
    params: Mapping[str, Any]
    key: str
    model: str | None

    async def sample(self, token_ids: Sequence[int], max_tokens: int | None = None) -> Completion:
        """Sample the action that follows a history.

        Raises:
            SamplerError: the engine cannot be reached, refuses, or returns something that is no action.
            ConfigError: it returns no log-probabilities.
        """
        limit = min(x for x in (self.params.get("max_tokens"), max_tokens) if x is not None)
        request = {
            "prompt_token_ids": [list(token_ids)],
            "sampling_params": {**self.params, "max_tokens": limit},
            "session_ids": [self.key],
        }
        try:
            output = await self.client.generate(request, model=self.model)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise SamplerError(
                f"SkyRL's inference engine did not answer for a history of {len(token_ids)} tokens: "
                f"{type(error).__name__}: {error}; its log is under trainer.log_path"
            ) from error
        if output.get("response_logprobs") is None or output["response_logprobs"][0] is None:
            raise ConfigError(
                "SkyRL's inference engine returned no log-probabilities; set generator.sampling_params.logprobs=1"
            )
        ids, logprobs = output["response_ids"][0], output["response_logprobs"][0]
        reason = output["stop_reasons"][0]
        if reason not in _ENDED or not ids or len(ids) != len(logprobs):
            raise SamplerError(
                f"SkyRL's inference engine returned {len(ids)} tokens with {len(logprobs)} log-probabilities, ended by "
                f"{reason!r}; an action has one a token, and ends by {' or '.join(_ENDED)}"
            )
        return Completion(tuple(ids), tuple(logprobs), ids[-1] in self.params["stop_token_ids"])
