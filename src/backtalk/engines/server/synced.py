"""A server that is given an engine's weights after each update, and proves that it has them."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx2

from backtalk.engines.server.config import ServerConfig
from backtalk.engines.server.process import VllmProcess
from backtalk.engines.server.proof import SyncProof, mean_gap
from backtalk.engines.server.weights import load_weights
from backtalk.errors import SamplerError, SamplerFault
from backtalk.rollout.completions import Server, completion_request, sampled_tokens
from backtalk.rollout.sampler import SamplingParams
from backtalk.trajectory import Segment, TokenRole, Trajectory

PROMPT = "The quick brown fox jumps over the lazy dog. "
PROBE_ROWS, PROBE_TOKENS = 4, 64  # sampled by the server itself after the prompt
GAP_FLOAT32, GAP = 0.001, 0.05  # nats a token


@dataclass(frozen=True, slots=True)
class Trainer:
    """What an engine gives: its weights in a folder, and the log-probabilities of each token at a temperature."""

    location: str  # of the model that it began with
    dtype: str  # of PyTorch's
    device: str  # cpu or cuda
    tokenizer: Any
    write: Callable[[Path], None]
    score: Callable[[Sequence[Trajectory], float], list[list[float]]]  # 0.0 for the first token

    def scores(self, rows: Sequence[Sequence[int]], temperature: float = 1.0) -> list[list[float]]:
        """Return the log-probabilities of the tokens of some rows, without those of the first."""
        given = [
            Trajectory(task_id="", sample_index=0, segments=(Segment(TokenRole.CONTEXT, tuple(row)),)) for row in rows
        ]
        return [row[1:] for row in self.score(given, temperature)]


class SyncedServer:
    """The server of one engine, used from the engine's worker thread."""

    def __init__(self, config: Literal["vllm"] | ServerConfig, trainer: Trainer) -> None:
        config = ServerConfig() if config == "vllm" else config
        self.config, self._trainer = config, trainer
        self._folder = Path(tempfile.mkdtemp(prefix="backtalk-weights-", dir=config.weights_folder))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._process: VllmProcess | None = None
        self._server: Server | None = None
        self._model = config.model or ""
        self._probe: list[tuple[int, ...]] = []
        self._prompt = tuple(trainer.tokenizer.encode(PROMPT, add_special_tokens=False))
        self._dtype = trainer.dtype.removeprefix("torch.")
        exact = self._dtype in ("float32", "float64")
        self._proof = SyncProof(config.max_logprob_gap or (GAP_FLOAT32 if exact else GAP))
        self.version: int | None = None  # of the weights that it has
        self.metrics: dict[str, float] = {}

    @property
    def server(self) -> Server:
        """Return its address; a server of our own is started when it is first asked for, and takes a while."""
        config = self.config
        if self._server is None:
            url = config.base_url
            if url is None:
                log = self._folder / "vllm.log"
                self._process = VllmProcess(config, self._trainer.location, self._dtype, self._trainer.device, log)
                self._process.wait(config.start_timeout_s)
                url = self._process.base_url
            self._server = Server(
                url=url, timeout_s=config.timeout_s, attempts=config.attempts, first_wait_s=config.retry_wait_s
            )
        return self._server

    def sync(self, version: int, params: SamplingParams) -> tuple[Server, str]:
        """Give the server the engine's weights if it has another version, and prove that it has them.

        Returns its address and the model's name there.

        Raises:
            SamplerFault: it is gone, did not take them, or has others by its log-probabilities.
        """
        if self._process is not None:
            self._process.check()
        if self.version != version:
            self.version, started = None, time.monotonic()
            gap, share = asyncio.run(self._sync(self.server, params))
            self.version = version
            self.metrics = {"sync_gap": gap, "sync_uptake": share, "sync_seconds": time.monotonic() - started}
        return self.server, self._model

    def check_sampled(self, gap: float) -> None:
        """Refuse a step whose actions have other log-probabilities than the server said: by ``gap``, mean |difference|.

        Raises:
            SamplerFault: the gap is above the bound.
        """
        if gap > self._proof.max_gap:  # NaN where nothing was sampled
            raise SamplerFault(
                f"{self.server.url} gave other log-probabilities than it samples with: those of this step's actions "
                f"differ from the trainer's by {gap:.2g} nats a token on average, and {self._proof.max_gap:g} is "
                "allowed, though its weights were in sync before the step. No update was made; restart the server, and "
                "continue with --resume"
            )

    async def _sync(self, server: Server, params: SamplingParams) -> tuple[float, float]:
        async with server.client() as client:
            try:
                if not self._model:
                    self._model = await _first_model(server, client)
                await self._load(server, client)
                if not self._probe:
                    self._probe = await self._sample_probe(server, client, params)
                scored = [await self._server_scores(server, client, row) for row in self._probe]
            except SamplerError as error:  # no rollout could be sampled either
                raise SamplerFault(
                    f"the sampler cannot be used: {error} Mend that, and continue with --resume"
                ) from error
        own = self._trainer.scores(self._probe)
        return self._proof.check(
            [x for row in scored for x in row], [x for row in own for x in row], f"the sampler {server.url}"
        )

    async def _load(self, server: Server, client: httpx2.AsyncClient) -> None:
        """Write the weights into a new folder and make the server load it; it may hold on to the files until then."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        self._trainer.write(folder)
        await load_weights(self.config, server, client, folder)
        shutil.rmtree(folder, ignore_errors=True)

    async def _sample_probe(
        self, server: Server, client: httpx2.AsyncClient, params: SamplingParams
    ) -> list[tuple[int, ...]]:
        """Let the server continue a prompt; check that it says the log-probabilities that it sampled with."""
        rows, said = [], []
        prompt, temperature = self._prompt, params.temperature
        for seed in range(PROBE_ROWS):
            asked = completion_request(
                self._model, prompt, max_tokens=PROBE_TOKENS, temperature=temperature, stop_token_ids=()
            )
            answer = await _completion(server, client, asked | {"seed": seed, "ignore_eos": True}, self._model)
            found = sampled_tokens(answer, server.first_choice(answer), prompt, (), own_prompt=True)
            if found is None or found.logprobs is None:
                raise SamplerFault(
                    f"{server.url} returns no token ids with log-probabilities; it has to know return_token_ids, as "
                    "vLLM 0.11 and SGLang of July 2026 do, and to serve the trained model's own vocabulary"
                )
            rows.append(prompt + found.token_ids)
            said += found.logprobs
        self._check_said(server, rows, said, temperature or 1.0)
        return rows

    def _check_said(
        self, server: Server, rows: Sequence[Sequence[int]], said: Sequence[float], temperature: float
    ) -> None:
        """Refuse a server whose sampled tokens have other log-probabilities, or those of before the temperature."""
        start, allowed = len(self._prompt) - 1, self._proof.max_gap

        def gap(at: float) -> float:
            return mean_gap(said, [x for row in self._trainer.scores(rows, at) for x in row[start:]])

        if (found := gap(temperature)) <= allowed:
            return
        if temperature != 1 and gap(1.0) <= allowed:
            raise SamplerFault(
                f"{server.url} returns log-probabilities of before the temperature {temperature:g}, which are not "
                "those that it samples with; start vLLM with --logprobs-mode processed_logprobs, or set temperature=1"
            )
        raise SamplerFault(
            f"{server.url} says of what it samples other log-probabilities than the trainer's: by {found:.2g} nats a "
            f"token on average, and {allowed:g} is allowed. Is it the same model, with a full and unquantised copy of "
            "its weights, and does nothing cut or penalise its distribution? If it only computes in less precision, "
            "raise engine.sampler.max_logprob_gap"
        )

    async def _server_scores(self, server: Server, client: httpx2.AsyncClient, row: Sequence[int]) -> list[float]:
        """Return the server's log-probabilities of a row's tokens but the first, at temperature 1."""
        asked = completion_request(self._model, row, max_tokens=1, temperature=1.0, stop_token_ids=())
        answer = await _completion(server, client, asked | {"echo": True}, self._model)
        found = (server.first_choice(answer).get("logprobs") or {}).get("token_logprobs") or ()
        scores = [float(x) for x in found[1 : len(row)] if x is not None]
        if len(scores) != len(row) - 1:
            raise SamplerFault(
                f"{server.url} returned {len(scores)} log-probabilities for a prompt of {len(row)} tokens; the proof "
                "that it has the trained weights needs /completions with echo and logprobs, as vLLM and SGLang have it"
            )
        return scores


async def _completion(server: Server, client: httpx2.AsyncClient, asked: dict[str, Any], model: str) -> Any:
    status, answer = await server.ask(client, "completions", asked)
    if status != 200:
        raise server.refusal(status, answer, model)
    return answer


async def _first_model(server: Server, client: httpx2.AsyncClient) -> str:
    status, answer = await server.ask(client, "models")
    models = answer.get("data") if status == 200 and isinstance(answer, dict) else None
    if not models:
        raise server.refusal(status, answer, "")
    return str(models[0]["id"])
