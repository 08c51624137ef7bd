"""Client of an OpenAI-compatible server: requests with patience, and the sampled tokens in its answers."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from backtalk.errors import SamplerError
from backtalk.rollout.sampler import Completion

SHOWN = 300  # characters of a server's refusal

# What a server must not do to the distribution, whatever the model's generation_config.json asks for.
WHOLE_DISTRIBUTION = {
    "top_p": 1,
    "top_k": -1,
    "min_p": 0,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Address of a server, and the patience with it."""

    url: str  # up to and with the version, http://127.0.0.1:8000/v1
    timeout_s: float = 300.0  # of one request
    attempts: int = 6  # at one request, while the server is busy, broken or away
    first_wait_s: float = 1.0  # before the second; doubled each time
    key_variable: str = "BACKTALK_API_KEY"  # the environment variable that holds the key, if the server wants one

    def client(self) -> httpx2.AsyncClient:
        """Return a client whose connections are kept until it is closed."""
        key = os.environ.get(self.key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        secure = self.url.startswith("https")  # loading certificates takes longer than a local server's answer
        limits = httpx2.Limits(max_connections=None)
        return httpx2.AsyncClient(timeout=self.timeout_s, headers=headers, verify=secure, limits=limits)

    def address(self, path: str) -> str:
        """Return the address of a path; one that begins with / is beside the version, not below it."""
        base = self.url.rstrip("/")
        return f"{base.rpartition('/')[0]}{path}" if path.startswith("/") else f"{base}/{path}"

    async def ask(
        self, client: httpx2.AsyncClient, path: str, body: Mapping[str, Any] | None = None
    ) -> tuple[int, Any]:
        """Return status and answer of a POST, or without a body of a GET, after as many requests as are allowed.

        Raises:
            SamplerError: none of them was answered but by a status that may pass.
        """
        problem = ""
        for attempt in range(self.attempts):
            wait_s = self.first_wait_s * 2**attempt
            try:
                method = "GET" if body is None else "POST"
                response = await client.request(method, self.address(path), json=body)
                if not may_pass(response.status_code):
                    return response.status_code, read_body(response.text)
                problem = f"status {response.status_code}: {response.text[:SHOWN]}"
                wait_s = max(wait_s, _seconds(response.headers.get("retry-after")))
            except httpx2.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
            if attempt + 1 < self.attempts:
                await asyncio.sleep(wait_s)
        raise SamplerError(
            f"{self.url} did not answer after {self.attempts} attempts ({problem}); "
            "is the server running, and the URL right?"
        )

    def refusal(self, status: int, answer: Any, model: str) -> SamplerError:
        """Return the error of a request that was refused."""
        hint = ""
        if status in (401, 403):
            hint = f"; put the key in the environment variable {self.key_variable}"
        elif status == 404:
            hint = f"; is the URL right (it ends in /v1), and is a model {model!r} served there?"
        return SamplerError(f"{self.url} refused with status {status}: {str(answer)[:SHOWN]}{hint}")

    def first_choice(self, answer: Any) -> dict[str, Any]:
        """Return the first choice of an answer; SamplerError where there is none."""
        choices = answer.get("choices") if isinstance(answer, Mapping) else None
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
            raise SamplerError(f"{self.url} answered without a choice: {str(answer)[:SHOWN]}; is it the right URL?")
        return dict(choices[0])


def may_pass(status: int) -> bool:
    """Return whether a status is that of a server which may answer the same request a little later."""
    return status in (408, 409, 429) or status >= 500


def completion_request(
    model: str, prompt: Sequence[int], *, max_tokens: int, temperature: float, stop_token_ids: Collection[int]
) -> dict[str, Any]:
    """Return the body of a request for /completions: our ids in, sampled ids and their log-probabilities out."""
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": temperature,
        **WHOLE_DISTRIBUTION,
        "logprobs": 1,
        "return_token_ids": True,
        "skip_special_tokens": False,
        "stop_token_ids": sorted(stop_token_ids),
    }


def sampled_tokens(
    answer: Any, choice: Any, prompt: Sequence[int], stop_token_ids: Collection[int], *, own_prompt: bool = False
) -> Completion | None:
    """Return the sampled ids with their logprobs, where the server says them and they continue just these tokens.

    With ``own_prompt`` the prompt was given as ids, so that it need not be told again.
    """
    told = answer.get("prompt_token_ids") or choice.get("prompt_token_ids")
    ids, logprobs = choice.get("token_ids"), _logprobs(choice.get("logprobs"))
    if told != list(prompt) and not (told is None and own_prompt):
        return None
    if not isinstance(ids, list) or not ids or not all(type(token) is int and token >= 0 for token in ids):
        return None
    stopped = choice.get("finish_reason") != "length"
    if stopped and ids[-1] not in stop_token_ids:  # it ended in some way that our tokens do not show
        return None
    return None if logprobs is None or len(ids) != len(logprobs) else Completion(tuple(ids), logprobs, stopped)


def _logprobs(found: Any) -> tuple[float, ...] | None:
    """Return sampled tokens' logprobs, from /chat/completions (``content``) or /completions (``token_logprobs``)."""
    if not isinstance(found, Mapping):
        return None
    values: Any = found.get("token_logprobs")
    if isinstance(entries := found.get("content"), list):
        values = [entry.get("logprob") if isinstance(entry, Mapping) else None for entry in entries]
    known = isinstance(values, list) and all(isinstance(x, (int, float)) and math.isfinite(x) for x in values)
    return tuple(map(float, values)) if values and known else None


def read_body(text: str) -> Any:
    """Return an answer as data, or as it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _seconds(text: str | None) -> float:
    """Return Retry-After, where it is a number of seconds; a minute at most."""
    try:
        return min(max(float(text or 0), 0.0), 60.0)
    except ValueError:
        return 0.0
