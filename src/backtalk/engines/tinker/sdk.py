"""The Tinker service over its SDK. The SDK repeats what failed for a moment (408, 409, 429, 5xx, lost connections) with
back-off, for five minutes; here its answers are waited for, and its errors get a name and an advice.
"""

from __future__ import annotations

import asyncio
import os
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

from backtalk.engines.remote.service import AdamStep, Datum, LossName, ServiceError
from backtalk.engines.tinker.config import TinkerConfig
from backtalk.errors import ConfigError, SamplerError
from backtalk.rollout.sampler import Completion

try:
    import httpx

    tinker: Any = import_module("tinker")
    RetryConfig: Any = import_module("tinker.lib.retry_handler").RetryConfig
except ImportError as error:
    raise ConfigError(f"engine.kind=tinker needs the Tinker SDK ({error}); pip install 'backtalk[tinker]'") from error

OLDEST, NEWEST = (0, 25), (0, 38)  # tested
_ANSWER_S = 20.0
_LOOK_S = 60.0  # between looks at a server that owes an answer; the SDK would ask one that is gone until the time is up
_NO_KEY = "tml-none"  # what the SDK sends to a server of one's own, which asks for none


def connect(config: TinkerConfig, *, seed: int = 0) -> TinkerService:
    """Open a session with the service that ``config`` names.

    Raises:
        ConfigError: an SDK of a version that is not known, no key, or a model that the service does not have.
        ServiceError: no service answers.
    """
    if not OLDEST <= _release(version("tinker")) <= NEWEST:
        raise ConfigError(
            f"tinker {version('tinker')} is installed, and {'.'.join(map(str, OLDEST))} to "
            f"{'.'.join(map(str, NEWEST))} are known to work; pip install 'backtalk[tinker]'"
        )
    url = config.base_url or os.environ.get("TINKER_BASE_URL")
    key = os.environ.get("TINKER_API_KEY") or (_NO_KEY if url else None)
    if key is None:
        raise ConfigError("hosted Tinker needs a key; set TINKER_API_KEY, or engine.base_url to a server of your own")
    if url is not None:
        _check_answer(url)
    return TinkerService(config, url, key, seed)


def _check_answer(url: str) -> None:
    """Raise ServiceError if nothing answers; the SDK would try again for five minutes."""
    try:
        httpx.get(_health(url), timeout=_ANSWER_S)
    except httpx.HTTPError as error:
        raise ServiceError(
            f"no server answers at {url} ({type(error).__name__}: {error}); start it, or set engine.base_url"
        ) from error


def _health(url: str) -> str:
    return f"{url.rstrip('/')}/api/v1/healthz"


def _release(text: str) -> tuple[int, int]:
    major, minor, *_ = text.split(".")
    return int(major), int(minor)


class TinkerService:
    """A session of the SDK."""

    def __init__(self, config: TinkerConfig, url: str | None, key: str, seed: int) -> None:
        self._config, self._seed = config, seed
        self._url, self._where = url, url or "hosted Tinker"
        self._client = self._ask("a session", lambda: tinker.ServiceClient(base_url=url, api_key=key))
        with warnings.catch_warnings():  # newer SDKs have another client for this question, which older ones lack
            warnings.simplefilter("ignore", FutureWarning)
            capabilities = self._ask("its models", self._client.get_server_capabilities)
        names = [model.model_name for model in capabilities.supported_models]
        if config.model not in names:
            raise ConfigError(
                f"{self._where} has no model {config.model!r}; set engine.model to one of {', '.join(map(str, names))}"
            )

    def open_model(self, state: str | None = None) -> SdkModel:
        """Return a model with fresh adapters, or with what was saved at a path, optimizer included."""
        client, config = self._client, self._config
        if state is None:
            model = self._ask(
                "a model",
                lambda: client.create_lora_training_client(config.model, rank=config.lora_rank, seed=self._seed),
            )
        else:
            model = self._ask(
                f"the model saved at {state}", lambda: client.create_training_client_from_state_with_optimizer(state)
            )
        return SdkModel(model, self._ask, lambda: _Patience(self._url, config.timeout_s))

    def close(self) -> None:
        """End the session; an older SDK has no call for it, and the service ends it by itself."""
        if hasattr(self._client, "close"):
            self._ask("the end of the session", lambda: self._client.close("success"))

    def _ask(self, what: str, call: Callable[[], Any]) -> Any:
        """Return the answer to a call of the SDK, waited for where it is a future; ServiceError where there is none."""
        try:
            answer, patience = call(), _Patience(self._url, self._config.timeout_s)
            while hasattr(answer, "result"):
                try:
                    return answer.result(patience.next_s())
                except TimeoutError:
                    patience.look()
            return answer
        except Exception as error:  # the SDK raises its own, httpx's and plain ones
            raise ServiceError(f"{self._where} did not give {what}: {_explain(error)}") from error


class _Patience:
    """The wait for one answer. The SDK would ask a server that is gone until the time is up, so it is looked at."""

    def __init__(self, url: str | None, timeout_s: float) -> None:
        self._url, self._deadline, self._gone = url, time.monotonic() + timeout_s, False
        self._until = 0.0  # when the server is looked at next

    def next_s(self) -> float:
        """Return the seconds to wait before ``look``."""
        self._until = min(time.monotonic() + _LOOK_S, self._deadline)
        return max(self._until - time.monotonic(), 0.0)

    def look(self) -> None:
        """Raise TimeoutError when the time is up, or early: the SDK's own; ConnectError if two looks find no server."""
        if not self._until <= time.monotonic() < self._deadline:
            raise TimeoutError
        if self._url is None:
            return
        try:
            httpx.get(_health(self._url), timeout=_ANSWER_S)
            self._gone = False
        except httpx.ConnectError:
            if self._gone:
                raise
            self._gone = True
        except httpx.HTTPError:  # it is there, and busy
            self._gone = False


class SdkModel:
    """A training client of the SDK."""

    def __init__(
        self, client: Any, ask: Callable[[str, Callable[[], Any]], Any], patience: Callable[[], _Patience]
    ) -> None:
        self._client, self._ask, self._patience = client, ask, patience

    def run(self, data: Sequence[Datum], loss: LossName, *, backward: bool) -> list[list[float]]:
        """Run the rows, and return the log-probability of each token after the first."""
        call = self._client.forward_backward if backward else self._client.forward
        output = self._ask("a forward pass", lambda: call([_datum(row) for row in data], loss))
        rows = [list(one["logprobs"].data) for one in output.loss_fn_outputs]
        if [len(row) for row in rows] != [len(one.token_ids) - 1 for one in data]:
            raise ServiceError("the service returned log-probabilities of other tokens than it was sent")
        return rows

    def step(self, adam: AdamStep) -> dict[str, float]:
        """Take an optimizer step, and return the service's metrics."""
        params = tinker.AdamParams(
            learning_rate=adam.learning_rate,
            beta1=adam.betas[0],
            beta2=adam.betas[1],
            eps=adam.eps,
            weight_decay=adam.weight_decay,
            grad_clip_norm=adam.grad_clip_norm,
        )
        return dict(self._ask("an optimizer step", lambda: self._client.optim_step(params)).metrics or {})

    def save(self, name: str) -> str:
        """Save adapters and optimizer on the service, and return their path."""
        return self._ask("a saved state", lambda: self._client.save_state(name)).path

    def sampling_weights(self) -> SdkWeights:
        """Return the current weights for sampling."""
        retry = RetryConfig(enable_stuck_detection=False)  # the wait for each action has an end of its own
        client = self._ask(
            "weights to sample from", lambda: self._client.save_weights_and_get_sampling_client(retry_config=retry)
        )
        return SdkWeights(client, self._patience)


class SdkWeights:
    """A sampling client of the SDK."""

    def __init__(self, client: Any, patience: Callable[[], _Patience]) -> None:
        self._client, self._patience = client, patience

    async def sample(
        self, token_ids: Sequence[int], *, max_tokens: int, temperature: float, seed: int, stop: Sequence[int]
    ) -> Completion:
        """Sample what follows a prompt, the stop token included."""
        params = tinker.SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, stop=list(stop))
        prompt = tinker.ModelInput.from_ints(list(token_ids))
        try:
            answer = self._client.sample(prompt=prompt, num_samples=1, sampling_params=params)
            future = answer.result_async() if hasattr(answer, "result_async") else asyncio.wrap_future(answer)
            sequence = (await _waited(asyncio.ensure_future(future), self._patience())).sequences[0]
        except Exception as error:
            raise SamplerError(f"the Tinker service did not sample: {_explain(error)}") from error
        ids, logprobs = tuple(sequence.tokens), sequence.logprobs
        stopped = bool(ids) and ids[-1] in stop
        if logprobs is None or len(logprobs) != len(ids) or (sequence.stop_reason == "stop" and not stopped):
            raise SamplerError(
                f"the Tinker service sampled {len(ids)} tokens with {len(logprobs or ())} log-probabilities, ended by "
                f"{sequence.stop_reason!r}; an action needs the log-probability of each, its stop token included"
            )
        return Completion(ids, tuple(logprobs), stopped)


async def _waited(answer: asyncio.Future[Any], patience: _Patience) -> Any:
    """Return an answer, waited for as long as there is patience."""
    try:
        while not (await asyncio.wait([answer], timeout=patience.next_s()))[0]:
            await asyncio.to_thread(patience.look)
        return answer.result()
    finally:
        answer.cancel()


def _datum(row: Datum) -> Any:
    """Return a row as the SDK has it: position t of the inputs is that of token t + 1."""
    inputs: dict[str, Any] = {name: list(values) for name, values in row.inputs.items()}
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(list(row.token_ids[:-1])),
        loss_fn_inputs={"target_tokens": list(row.token_ids[1:]), **inputs},
    )


def _explain(error: Exception) -> str:
    """Return an error of the SDK as text, with what to do about it."""
    text = " ".join(str(error).split()) or type(error).__name__
    match getattr(error, "status_code", None):
        case 401 | 402 | 403:
            advice = "check TINKER_API_KEY and the account"
        case 404:
            advice = "check engine.base_url: is it the root address of a server of the Tinker API?"
        case int(status) if status == 422 or status >= 500:
            advice = (
                "the server failed, and its log says why; or it speaks an older protocol than tinker "
                f"{version('tinker')}: SkyRL 0.4 is made for 0.25, so pip install 'tinker==0.25.*'"
            )
        case _ if isinstance(error, tinker.APIConnectionError | httpx.ConnectError):
            advice = "the server is gone; start it again at engine.base_url, and look into its log for why it stopped"
        case _ if isinstance(error, TimeoutError):
            text = "no answer"
            advice = (
                "the server is busy, or answers with errors that the SDK keeps repeating the request for; its log says "
                "which. Raise engine.timeout_s if it is busy"
            )
        case _:
            advice = ""
    return f"{type(error).__name__}: {text[:500]}" + (f"; {advice}" if advice else "")
