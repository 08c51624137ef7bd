"""Sampler over a server: each action is a request of its own, and the server batches whatever is there.

So a rollout that waits for a command holds no other. Random numbers depend on (seed, session key, call) alone; rounding
depends on what shares a batch, which is a matter of time.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx2

from backtalk.errors import SamplerError, SamplerFault
from backtalk.rollout.completions import SHOWN, Server, completion_request, read_body, sampled_tokens
from backtalk.rollout.sampler import Completion, SamplingParams, request_seed


class ServerSampler:
    """A ``Sampler`` of the policy at one version.

    ``prepare`` returns the server, and the model's name there, once it has the weights of that version.
    """

    batches_continuously = True

    def __init__(
        self,
        prepare: Callable[[], Awaitable[tuple[Server, str]]],
        *,
        params: SamplingParams,
        stop_token_ids: Collection[int],
        policy_version: int,
    ) -> None:
        self._prepare = prepare
        self.params, self.stop_token_ids, self.policy_version = params, stop_token_ids, policy_version

    async def prepare(self) -> None:
        """Bring the server to this version, before any rollout begins.

        Raises:
            SamplerFault: it cannot be, or is not by its own log-probabilities.
        """
        await self._prepare()

    @asynccontextmanager
    async def session(self, key: str) -> AsyncIterator[ServerSession]:
        """Open a session, a rollout's connections to the server."""
        server, model = await self._prepare()
        async with server.client() as client:
            yield ServerSession(self, server, client, model, key)


class ServerSession:
    """A rollout at the server, which may keep the cache of a prompt's prefix; nothing else lasts."""

    def __init__(
        self, sampler: ServerSampler, server: Server, client: httpx2.AsyncClient, model: str, key: str
    ) -> None:
        self._sampler, self._server, self._client = sampler, server, client
        self._model, self._key, self._call = model, key, 0

    async def sample(self, token_ids: Sequence[int], max_tokens: int | None = None) -> Completion:
        """Sample the action that follows a history.

        Raises:
            SamplerError: the server refused, or gave no tokens with log-probabilities that continue the history.
            SamplerFault: the server is gone.
        """
        return await self._complete(self._request(token_ids, max_tokens), token_ids)

    async def sample_watched(
        self, token_ids: Sequence[int], max_tokens: int | None, is_over: Callable[[int], bool]
    ) -> Completion:
        """Do as ``sample`` does, and hang up after the first token for which ``is_over`` is true.

        An answer that breaks off is asked for again, as a whole and with the same seed.
        """
        body = self._request(token_ids, max_tokens)
        address = self._server.address("completions")
        with suppress(httpx2.HTTPError):
            async with self._client.stream("POST", address, json=body | {"stream": True}) as response:
                if response.status_code == 200:
                    answer = await _watch(response, is_over, self._sampler.stop_token_ids)
                    if answer is not None:
                        return self._read(200, answer, token_ids)
        return await self._complete(body, token_ids)

    async def _complete(self, body: dict[str, Any], token_ids: Sequence[int]) -> Completion:
        """Ask for a whole answer; where there is none, find out whether the server is gone or fails at this one."""
        server = self._server
        try:
            status, answer = await server.ask(self._client, "completions", body)
        except SamplerError as error:
            if await is_healthy(server, self._client):
                raise
            raise SamplerFault(
                f"the sampler is gone: {error} The step it was sampling for is not counted; start the server again, "
                "and continue with --resume"
            ) from error
        return self._read(status, answer, token_ids)

    def _request(self, token_ids: Sequence[int], max_tokens: int | None) -> dict[str, Any]:
        params = self._sampler.params
        limit = params.max_tokens if max_tokens is None else min(max_tokens, params.max_tokens)
        seed = request_seed(params.seed, self._key, self._call)
        self._call += 1
        asked = completion_request(
            self._model,
            token_ids,
            max_tokens=limit,
            temperature=params.temperature,
            stop_token_ids=self._sampler.stop_token_ids,
        )
        # Only our stop tokens end an action: the model's own may be others.
        return asked | {"seed": seed, "ignore_eos": True}

    def _read(self, status: int, answer: Any, token_ids: Sequence[int]) -> Completion:
        server, stop_ids = self._server, self._sampler.stop_token_ids
        if status != 200:
            raise server.refusal(status, answer, self._model)
        completion = sampled_tokens(answer, server.first_choice(answer), token_ids, stop_ids, own_prompt=True)
        if completion is None:
            raise SamplerError(
                f"{server.url} gave back no token ids with log-probabilities that continue ours "
                f"({str(answer)[:SHOWN]}); it has to know return_token_ids, as vLLM 0.11 and SGLang of July 2026 do"
            )
        return completion


async def is_healthy(server: Server, client: httpx2.AsyncClient) -> bool:
    """Return whether a server says that it is well, or at least that it knows no such question."""
    try:
        return (await client.get(server.address("/health"))).status_code < 500
    except httpx2.HTTPError:
        return False


async def _watch(
    response: httpx2.Response, is_over: Callable[[int], bool], stop_token_ids: Collection[int]
) -> dict[str, Any] | None:
    """Return a streamed answer as a whole one, up to the token that ends it; None where it broke off."""
    ids: list[int] = []
    logprobs: list[float] = []
    reason: str | None = None
    async for line in response.aiter_lines():
        part = read_body(line.removeprefix("data:").strip()) if line.startswith("data:") else None
        choices = part.get("choices") if isinstance(part, dict) else None
        for choice in choices or ():
            told = (choice.get("logprobs") or {}).get("token_logprobs") or []
            reason = choice.get("finish_reason") or reason
            for token, logprob in zip(choice.get("token_ids") or (), told, strict=False):
                ids.append(token)
                logprobs.append(logprob)
                if is_over(token):
                    return _whole(ids, logprobs, "stop" if token in stop_token_ids else "length")
    return None if reason is None else _whole(ids, logprobs, reason)


def _whole(ids: list[int], logprobs: list[float], reason: str) -> dict[str, Any]:
    return {"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": logprobs}, "finish_reason": reason}]}
