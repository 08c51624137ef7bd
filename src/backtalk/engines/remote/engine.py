"""An engine over a service: sampling and training on a service, with the same objective as the embedded engine.

The service trains on log-probabilities, and so does the objective: a forward pass returns the log-probability of each
token, the objective's own code gives d(loss)/d(logprob) here, and one request carries these numbers back through the
model (``reduction.linear_loss``). So every form of either term is the embedded engine's by construction.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from backtalk.engines.metrics import sampler_gap, token_metrics
from backtalk.engines.remote.config import Reduction, RemoteConfig
from backtalk.engines.remote.gradients import StepGradients, check_objective, step_gradients
from backtalk.engines.remote.reduction import forward, linear_loss, probe
from backtalk.engines.remote.sampler import RemoteSampler, Usage
from backtalk.engines.remote.service import AdamStep, RemoteModel, SamplingWeights, Service, ServiceError
from backtalk.engines.update_scale import UpdateScale
from backtalk.errors import DataError, SamplerFault
from backtalk.language.renderer import Renderer, RendererConfig
from backtalk.language.tokenizer import load_tokenizer, model_location
from backtalk.objective.batch import TokenCounts
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.samples import Sample, to_samples
from backtalk.rollout.sampler import Sampler, SamplingParams
from backtalk.trajectory import Trajectory

FORMAT = 1
PROBE_TOKENS = 16  # of the row that the reduction is measured on

T = TypeVar("T")
log = logging.getLogger(__name__)


class RemoteEngine:
    """An ``Engine`` whose model is on a service. ``connect`` opens a session with it.

    One worker thread waits for all answers but those of the sampler. A step of which the service may have done a part
    is never counted; the engine then takes no other until ``load`` has opened a model from a saved state.
    """

    def __init__(self, config: RemoteConfig, connect: Callable[[], Service]) -> None:
        self.config, self._connect = config, connect
        self._executor = ThreadPoolExecutor(1, "backtalk-remote")
        self.tokenizer = load_tokenizer(model_location(config.tokenizer or config.model))
        self._stop_token_ids: tuple[int, ...] | None = None
        self._service = connect()
        self._model: RemoteModel | None = None
        self._weights: SamplingWeights | None = None  # of the current version
        self._reduction: Reduction | None = None if config.reduction == "auto" else config.reduction
        self._scale = UpdateScale(config.betas[1])
        self._usage = Usage()
        self._tools: set[str] = set()  # seen in samples so far
        self._policy_version = self._updates = 0
        self._trouble: str | None = None  # why the service's model may not be that of the version

    @property
    def policy_version(self) -> int:
        """Return the number of train steps taken so far, skipped ones included."""
        return self._policy_version

    def sampler(self, params: SamplingParams) -> Sampler:
        """Return a sampler at the current version; it may not be used during or after a train step."""
        if self._stop_token_ids is None:  # they depend on the chat template, and not on tools
            self._stop_token_ids = tuple(Renderer(self.tokenizer, (), RendererConfig(on_drift="fork")).stop_token_ids)
        return RemoteSampler(
            lambda: self._in_worker(self._sampling_weights),
            params=params,
            stop_token_ids=self._stop_token_ids,
            policy_version=self._policy_version,
            usage=self._usage,
        )

    async def train_step(self, samples: Sequence[Sample], config: ObjectiveConfig) -> dict[str, float]:
        """Take one optimizer step over all samples.

        Returns the embedded engine's metrics but those over the weights, and what the service was asked to do.

        Raises:
            ConfigError: an option of the objective that this engine cannot keep.
            ServiceError: the service failed; the version is still that before the step.
            SamplerFault: it samples with other log-probabilities than it trains on; nothing was updated.
        """
        check_objective(samples, config)
        metrics = await self._in_worker(lambda: self._train_step(samples, config.at(self._policy_version)))
        if metrics["skipped"]:
            log.warning("step %d changed nothing: no token has a finite gradient that is not 0", self._policy_version)
        return metrics

    async def score(self, trajectories: Sequence[Trajectory]) -> list[list[float]]:
        """Return each token's log-probability at temperature 1, in nats; 0.0 for the first token of a branch."""
        return await self._in_worker(lambda: self._score(trajectories))

    def save(self, folder: Path) -> None:
        """Save the state on the service, and write its path into a new folder."""
        self._executor.submit(self._write, Path(folder)).result()

    def load(self, folder: Path) -> None:
        """Open a model from what ``save`` left on the service, optimizer included.

        Raises:
            DataError: no checkpoint, a damaged one, or one of another model.
            ServiceError: the service has no such state any more, or failed.
        """
        self._executor.submit(self._read, Path(folder)).result()

    async def _in_worker(self, work: Callable[[], T]) -> T:
        """Run a function in the worker thread, as all methods below are."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def _current_model(self) -> RemoteModel:
        """Return the model of the current version, which is opened when it is first asked for."""
        if self._trouble is not None:
            raise ServiceError(f"{self._trouble}; continue from the last checkpoint, with `backtalk train --resume`")
        if self._model is None:
            self._model = self._service.open_model()
        return self._model

    def _sampling_weights(self) -> SamplingWeights:
        if self._weights is None:
            self._weights = self._current_model().sampling_weights()
        return self._weights

    def _known_reduction(self) -> Reduction:
        """Return how the service reduces losses, measured once on a model in a session of its own."""
        if self._reduction is None:
            words = self.tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 4, add_special_tokens=False)
            service = self._connect()
            self._reduction = probe(service.open_model(), words[:PROBE_TOKENS])
            service.close()
            log.info("the service reduces losses by %s", self._reduction)
        return self._reduction

    def _train_step(self, samples: Sequence[Sample], config: ObjectiveConfig) -> dict[str, float]:
        """Take an optimizer step and return its metrics."""
        model, reduction = self._current_model(), self._known_reduction()
        counts = TokenCounts.of(samples, config.world_loss_target)
        gradients = step_gradients(samples, self._forward([s.token_ids.tolist() for s in samples]), counts, config)
        self._check_sampled(sampler_gap(gradients.record))
        update = {"grad_norm": 0.0, "learning_rate": 0.0, "update_scale": 0.0, "skipped": 1.0}
        if gradients.norm > 0 and math.isfinite(gradients.norm):
            update = self._update(model, reduction, gradients, config)
        self._policy_version += 1
        self._weights = None
        self._tools.update(span.tool for sample in samples for span in sample.spans if span.tool is not None)
        tokens = token_metrics(gradients.record, counts, config, sorted(self._tools))
        tokens |= dict.fromkeys(("policy_grad_norm", "world_grad_norm", "grad_norm_ratio"), math.nan)
        coefficient = {"world_model_coeff": config.world_coeff}
        return gradients.losses | coefficient | tokens | update | self._take_usage()

    def _check_sampled(self, gap: float) -> None:
        """Refuse a step whose actions have other log-probabilities than the sampler said, by ``gap`` on average."""
        allowed = self.config.max_logprob_gap
        if self._weights is not None and gap > allowed:  # sampled at this version; NaN where nothing was
            raise SamplerFault(
                "the service samples with other log-probabilities than it trains on: its forward pass differs by "
                f"{gap:.2g} nats a token on average from what it said of this step's actions, and {allowed:g} is "
                "allowed. No update was made. See whether it samples from the trained weights, and continue with "
                "`backtalk train --resume`; if it only samples in less precision, raise engine.max_logprob_gap"
            )

    def _forward(self, rows: Sequence[list[int]]) -> list[list[float]]:
        """Return the log-probability of each token, 0 for the first of a row."""
        long = [row for row in rows if len(row) > 1]
        self._usage.prefill_tokens += sum(map(len, long))
        found = iter(forward(self._current_model(), long))
        return [[0.0, *next(found)] if len(row) > 1 else [0.0] * len(row) for row in rows]

    def _update(
        self, model: RemoteModel, reduction: Reduction, gradients: StepGradients, config: ObjectiveConfig
    ) -> dict[str, float]:
        """Send the gradient and take the optimizer step; return the metrics of the update."""
        settings = self.config
        world_only = config.policy_coeff > 0 and config.world_coeff > 0 and gradients.policy_norm == 0
        scaled = world_only and config.world.zero_advantage_steps == "scaled"
        unit = gradients.norm * config.policy_coeff / config.world_coeff if scaled else gradients.norm
        scale = self._scale.update(gradients.norm, unit)
        rate = settings.learning_rate * min(1.0, (self._updates + 1) / max(settings.warmup_steps, 1))
        data, loss = linear_loss(*gradients.rows(), reduction)
        self._trouble = f"step {self._policy_version} stopped half way on the service"
        model.run(data, loss, backward=True)
        metrics = model.step(
            AdamStep(
                learning_rate=rate * (scale if scaled else 1.0),
                betas=settings.betas,
                weight_decay=settings.weight_decay,
                grad_clip_norm=settings.clip_norm(),
            )
        )
        self._trouble = None
        self._updates += 1
        self._usage.trained_tokens += sum(len(row.token_ids) for row in data)
        norms = [value for name, value in metrics.items() if "grad_norm" in name or "grad_l2" in name]
        return {
            "grad_norm": norms[0] if norms else math.nan,
            "learning_rate": rate * (scale if scaled else 1.0),
            "update_scale": scale if scaled else 1.0,
            "skipped": 0.0,
        }

    def _take_usage(self) -> dict[str, float]:
        """Return the tokens billed since the last step and their cost, and reset the counts."""
        used, config = self._usage, self.config
        counts = {
            "prefill_tokens": (used.prefill_tokens, config.prefill_price),
            "sampled_tokens": (used.sampled_tokens, config.sample_price),
            "trained_tokens": (used.trained_tokens, config.train_price),
        }
        cost = sum(n * (math.nan if price is None else price) for n, price in counts.values()) / 1e6
        used.prefill_tokens = used.sampled_tokens = used.trained_tokens = 0
        return {f"service_{name}": float(n) for name, (n, _) in counts.items()} | {"service_cost": cost}

    def _score(self, trajectories: Sequence[Trajectory]) -> list[list[float]]:
        branches = [to_samples(trajectory) for trajectory in trajectories]
        scores = iter(self._forward([sample.token_ids.tolist() for row in branches for sample in row]))
        return [[x for _ in row for x in next(scores)] for row in branches]

    def _write(self, folder: Path) -> None:
        model = self._current_model()
        path = model.save(f"backtalk-{self._policy_version:06d}-{uuid.uuid4().hex[:8]}")
        state: dict[str, Any] = {
            "format": FORMAT,
            "policy_version": self._policy_version,
            "path": path,
            "model": self.config.model,
            "lora_rank": self.config.lora_rank,
            "updates": self._updates,
            "update_scale": self._scale.state(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")

    def _read(self, folder: Path) -> None:
        file = folder / "state.json"
        try:
            state = json.loads(file.read_text())
            found = {name: state[name] for name in ("format", "model", "lora_rank")}
            path, version, updates = str(state["path"]), int(state["policy_version"]), int(state["updates"])
            scale = UpdateScale(self.config.betas[1], *map(float, state["update_scale"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder} holds no checkpoint of engine.kind={self.config.kind}: {error}; pass one of its run"
            ) from error
        wanted = {"format": FORMAT, "model": self.config.model, "lora_rank": self.config.lora_rank}
        if found != wanted:
            raise DataError(f"checkpoint {folder} is of {found}, and this engine has {wanted}; use the same settings")
        self._model, self._weights, self._trouble = self._service.open_model(path), None, None
        self._policy_version, self._updates, self._scale = version, updates, scale
