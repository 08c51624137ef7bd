"""The Foundry service over its SDK, azure-ai-finetuningsessions: a session is a base model with adapters.

A method of the SDK sends a request, asks for its result until it is there (after 1 s, then with pauses that double to
30 s), and returns it. ``Patience`` says what is sent again.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from importlib import import_module
from importlib.metadata import version
from typing import Any, TypeVar
from urllib.parse import urlsplit

from backtalk.engines.foundry.config import FoundryConfig
from backtalk.engines.remote.service import AdamStep, Datum, LossName, ServiceError
from backtalk.errors import ConfigError, SamplerError
from backtalk.rollout.sampler import Completion

try:
    azure: Any = import_module("azure.ai.finetuningsessions")
    models: Any = import_module("azure.ai.finetuningsessions.models")
    identity: Any = import_module("azure.identity")
    exceptions: Any = import_module("azure.core.exceptions")
    transport: Any = import_module("azure.core.pipeline.transport")
    requests: Any = import_module("requests")
    from backtalk.engines.foundry.patience import Patience
except ImportError as error:
    raise ConfigError(
        f"engine.kind=foundry needs the SDK of Foundry's training sessions ({error}); pip install 'backtalk[foundry]'"
    ) from error

CONNECTIONS = 256  # that are kept open; more are opened as needed
PACKAGE, KNOWN = "azure-ai-finetuningsessions", "1.0.0b1"
SCOPE = "https://ai.azure.com/.default"
LOGIN = "type `az login`, or set AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET"
T = TypeVar("T")
log = logging.getLogger(__name__)


def connect(config: FoundryConfig, *, seed: int = 0, credential: Any = None) -> FoundryService:
    """Connect to the project that ``config`` names, with Azure's default chain of credentials unless one is given.

    Raises:
        ConfigError: an SDK of a version that is not known, no project, or no credential that gives a token.
    """
    if version(PACKAGE) != KNOWN:
        raise ConfigError(
            f"{PACKAGE} {version(PACKAGE)} is installed, a preview whose calls may have changed; {KNOWN} is known to "
            "work: pip install 'backtalk[foundry]'"
        )
    endpoint = config.endpoint or os.environ.get("AZURE_AI_PROJECT_ENDPOINT")
    if endpoint is None:
        raise ConfigError(
            "the Foundry engine needs a project; set engine.endpoint, or AZURE_AI_PROJECT_ENDPOINT, to "
            "https://ACCOUNT.services.ai.azure.com/api/projects/PROJECT"
        )
    chain = _default_credential() if credential is None else credential
    try:
        client = azure.FineTuningSessionClient(
            endpoint,
            chain,
            credential_scopes=[SCOPE],
            allow_insecure_http=urlsplit(endpoint).scheme == "http",
            per_call_policies=[Patience(config.timeout_s)],
            transport=_transport(),
        )
    except ValueError as error:  # http to another machine
        raise ConfigError(f"engine.endpoint={endpoint!r} is refused by the SDK: {error}; use https") from error
    return FoundryService(config, endpoint, client, seed)


def _transport() -> Any:
    """Return the SDK's way to send requests, with a connection for each of many rollouts that sample at once."""
    session = requests.Session()
    session.mount(prefix="https://", adapter=requests.adapters.HTTPAdapter(pool_maxsize=CONNECTIONS))
    return transport.RequestsTransport(session=session)


def _default_credential() -> Any:
    """Return Azure's default chain of credentials, which has a token.

    Raises:
        ConfigError: none of them gives one.
    """
    logging.getLogger("azure.identity").setLevel(logging.ERROR)  # it would print its chain's failures over many lines
    credential = identity.DefaultAzureCredential()
    try:
        credential.get_token(SCOPE)
    except exceptions.ClientAuthenticationError as error:
        tried = re.findall(r"^\s+(\w+): ([^\n]+)", error.message, flags=re.MULTILINE)
        refused = [f"{name}: {text}" for name, text in tried if "AADSTS" in text]  # an error of Entra ID
        reason = refused[0] if refused else f"none of {', '.join(name for name, _ in tried)} has a token"
        raise ConfigError(f"no Azure credential for Foundry: {reason}; {LOGIN}") from error
    return credential


class FoundryService:
    """A connection to a project, with one session at a time. It is unloaded at the end of the process at the latest."""

    def __init__(self, config: FoundryConfig, endpoint: str, client: Any, seed: int) -> None:
        self._config, self._endpoint, self._client, self._seed = config, endpoint, client, seed
        self._session: Any = None
        atexit.register(self.close)

    def open_model(self, state: str | None = None) -> FoundryModel:
        """Return a model with fresh adapters, or with what was saved, optimizer included; ends the session before."""
        self._end_session()
        config, source = self._config, None
        if state is not None:
            session_id, _, checkpoint_id = state.partition("/")
            source = models.FromCheckpoint(source_session_id=session_id, checkpoint_id=checkpoint_id)
        self._session = self.ask(
            "a session" if state is None else f"a session from the state saved at {state}",
            lambda: azure.FineTuningSession.create(
                self._client,
                base_model=config.model,
                lora_config=models.LoRAConfig(rank=config.lora_rank, seed=self._seed),
                from_checkpoint=source,
                timeout_sec=config.timeout_s,
                training_type=config.training_type,
            ),
        )
        return FoundryModel(self._session, self.ask)

    def close(self) -> None:
        """Unload the session, which keeps its saved states, and close the connection."""
        atexit.unregister(self.close)
        self._end_session()
        self._client.close()

    def _end_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            try:
                session.close()
            except Exception as error:  # it may be gone already
                log.warning("the session %s was not unloaded: %s", session.session_id, _explain(error))

    def ask(self, what: str, call: Callable[[], T]) -> T:
        """Return the answer to a call of the SDK; ServiceError where there is none."""
        try:
            return call()
        except Exception as error:  # the SDK raises its own, azure.core's and plain ones
            raise ServiceError(f"{self._endpoint} did not give {what}: {_explain(error)}") from error


class FoundryModel:
    """A session of the SDK."""

    def __init__(self, session: Any, ask: Callable[[str, Callable[[], Any]], Any]) -> None:
        self._session, self._ask = session, ask
        self._saved = 0  # times the weights were saved for sampling

    def run(self, data: Sequence[Datum], loss: LossName, *, backward: bool) -> list[list[float]]:
        """Run the rows, and return the log-probability of each token after the first."""
        call = self._session.forward_backward if backward else self._session.forward
        result = self._ask("a forward pass", lambda: call([_datum(row) for row in data], loss_fn=loss))
        outputs = result.loss_fn_outputs
        tensors = [one["logprobs"] for one in outputs] if outputs else result.per_datum_logprobs or ()
        found = [list(map(float, tensor["data"])) for tensor in tensors]
        if [len(row) for row in found] != [len(row.token_ids) - 1 for row in data]:
            raise ServiceError("the service returned log-probabilities of other tokens than it was sent")
        return found

    def step(self, adam: AdamStep) -> dict[str, float]:
        """Take an optimizer step, and return the service's metrics."""
        params = models.AdamParams(
            learning_rate=adam.learning_rate,
            beta1=adam.betas[0],
            beta2=adam.betas[1],
            eps=adam.eps,
            weight_decay=adam.weight_decay,
        )
        result = self._ask("an optimizer step", lambda: self._session.optim_step(params))
        norm = {"grad_norm": result.grad_norm} if result.grad_norm else {}  # the SDK's 0 is none
        return norm | dict(result.metrics or {})

    def save(self, name: str) -> str:
        """Save adapters and optimizer on the service, and return their path."""
        result = self._ask("a saved state", lambda: self._session.save_weights(name))
        return f"{self._session.session_id}/{result.checkpoint_id}"

    def sampling_weights(self) -> FoundryWeights:
        """Return the current weights for sampling, which the service keeps in memory."""
        self._saved += 1
        number = self._saved
        result = self._ask(
            "weights to sample from",
            lambda: self._session.save_weights_for_sampler(seq_id=number, sampling_session_seq_id=0),
        )
        return FoundryWeights(self._session, result.checkpoint_id, number)


class FoundryWeights:
    """A sampler checkpoint of a session."""

    def __init__(self, session: Any, checkpoint_id: str, number: int) -> None:
        self._session, self._checkpoint_id, self._number = session, checkpoint_id, number

    async def sample(
        self, token_ids: Sequence[int], *, max_tokens: int, temperature: float, seed: int, stop: Sequence[int]
    ) -> Completion:
        """Sample what follows a prompt, the stop token included."""
        params = models.SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=1.0,
            top_k=-1,
            seed=seed,
            stop_criteria=list(stop) or None,
        )
        key = {"checkpoint_id": self._checkpoint_id, "seq_id": self._number}
        try:
            sequence = (await _in_thread(lambda: self._session.sample(list(token_ids), params, **key))).sequences[0]
        except Exception as error:
            raise SamplerError(f"Foundry did not sample: {_explain(error)}") from error
        ids, logprobs = tuple(sequence.tokens), sequence.logprobs
        stopped = bool(ids) and ids[-1] in stop
        if logprobs is None or len(logprobs) != len(ids) or not (stopped or len(ids) == max_tokens):
            raise SamplerError(
                f"Foundry sampled {len(ids)} tokens of at most {max_tokens}, with {len(logprobs or ())} "
                "log-probabilities; an action needs the log-probability of each, its stop token included"
            )
        return Completion(ids, tuple(logprobs), stopped)


async def _in_thread(call: Callable[[], T]) -> T:
    """Run a function in a thread of its own: any number at once, and none holds up the end of the process."""
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, name="backtalk-foundry", daemon=True).start()
    return await asyncio.shield(asyncio.wrap_future(answer))


def _datum(row: Datum) -> Any:
    """Return a row as the SDK has it: position t of the inputs is that of token t + 1; weights are always there."""
    inputs = {"weights": [1.0] * (len(row.token_ids) - 1), **row.inputs}
    tensors = {name: models.TensorData(data=list(values)) for name, values in inputs.items()}
    return models.Datum(
        model_input=models.ModelInput(chunks=[models.ModelInputChunk(tokens=list(row.token_ids[:-1]))]),
        loss_fn_inputs=models.LossFnInputs(target_tokens=models.TensorData(data=list(row.token_ids[1:])), **tensors),
    )


def _explain(error: Exception) -> str:
    """Return an error of the SDK as text, with what to do about it."""
    text = " ".join(str(getattr(error, "message", None) or error).split()) or type(error).__name__
    match error:
        case azure.TrainingEngineError():
            advice = "the session is lost; continue from the last checkpoint, with `backtalk train --resume`"
        case azure.BatchTooLargeError():
            advice = "use shorter sequences, or split requests by AZURE_AI_FINETUNING_MAX_CHUNK_BYTES=1000000"
        case exceptions.ClientAuthenticationError():
            advice = LOGIN
        case exceptions.ServiceRequestError() | exceptions.ServiceResponseError():
            advice = "check engine.endpoint and the network"
        case TimeoutError():
            advice = "it is busy or gone; raise engine.timeout_s if it is busy"
        case _:
            advice = _ADVICE.get(getattr(error, "status_code", None) or 0, "")
    return f"{type(error).__name__}: {text[:500]}" + (f"; {advice}" if advice else "")


_ADVICE = {
    401: LOGIN,
    403: "your identity needs the role Foundry User on the project, and the project access to interactive training",
    404: "the session has expired, or engine.endpoint is no Foundry project; continue with `backtalk train --resume`",
}
