"""The embedded engine: one process, one device, any causal language model of transformers.

It is the default, and the reference for other engines. One forward pass serves both terms.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from backtalk.engines.abilities import check_objective
from backtalk.engines.metrics import StepRecord, sampler_gap, term_metrics, token_metrics
from backtalk.engines.torch.checkpoint import FORMAT, read_checkpoint
from backtalk.engines.torch.config import TorchConfig
from backtalk.engines.torch.gradients import GradientSum, StepTerms, needs_both_terms, steps_between_measurements
from backtalk.engines.torch.logprobs import TokenScorer
from backtalk.engines.torch.memory import TokenBudget, release_memory
from backtalk.engines.torch.model import (
    add_lora,
    enable_gradient_checkpointing,
    load_adapter,
    load_model,
    quiet_transformers,
    resolve_device,
    resolve_dtype,
    save_merged,
)
from backtalk.engines.torch.optimizer import StepOptimizer
from backtalk.engines.torch.packing import MicroBatch
from backtalk.engines.torch.scores import add_to_record, batch_scores, token_scores
from backtalk.errors import ConfigError, DataError
from backtalk.language.renderer import Renderer, RendererConfig
from backtalk.language.tokenizer import load_tokenizer, model_location
from backtalk.objective.batch import Batch, TokenCounts, collate
from backtalk.objective.coefficient import CoefficientController, Share
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.gradients import term_gradients
from backtalk.objective.loss import objective
from backtalk.objective.samples import Sample, to_samples
from backtalk.rollout.sampler import Sampler, SamplingParams
from backtalk.spans import timed
from backtalk.trajectory import TokenScores, Trajectory

if TYPE_CHECKING:  # a server needs an HTTP client, and nothing else here does
    from backtalk.engines.server.synced import SyncedServer

T = TypeVar("T")
log = logging.getLogger(__name__)


class TorchEngine:
    """An ``Engine`` with one model of transformers. ``seed`` is that of new LoRA adapters; nothing else is random.

    ``model`` takes the place of the weights that ``config.model`` names, for weights that lie in no folder.
    One worker thread does all computing, in the order of the calls. Not safe for use from several event loops at once.
    The same config, samples and machine give the same bits (on a GPU up to PyTorch's own non-deterministic kernels).
    """

    def __init__(self, config: TorchConfig, *, seed: int = 0, model: Any = None) -> None:
        self.config = config
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        # A new thread would start with the default number of its own.
        self._executor = ThreadPoolExecutor(1, "backtalk-engine", torch.set_num_threads, (torch.get_num_threads(),))
        self.location = model_location(config.model)
        self.device = resolve_device(config.device)
        self.tokenizer = load_tokenizer(self.location)
        self._dtype = resolve_dtype(config.dtype, self.device)
        self.model: Any = load_model(self.location, self.device, self._dtype) if model is None else model
        self._peft: Any = add_lora(self.model, config.lora_rank, seed) if config.lora_rank else None
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(self.model)
        # Flash attention skips the pairs between samples of a row; others compute the hidden pairs too. On a CPU a step
        # of the embedded model was 12 % slower with packing than with padding (benchmarks/objective.py packing).
        skips_pairs = str(getattr(self.model.config, "_attn_implementation", "")).startswith("flash")
        packs = config.packing == "on" or (config.packing == "auto" and skips_pairs)
        self._scorer = TokenScorer(self.model, try_packing=packs)
        if config.packing == "on" and not self._scorer.packs:
            raise ConfigError(
                f"packing='on', but {type(self.model).__name__} mixes the samples of one row (it carries a state along "
                "the row, or ignores position ids); use packing='auto', which pads such models"
            )
        if config.batching == "continuous":
            from backtalk.engines.torch.continuous import check_continuous

            check_continuous(self.model)
        self._reference: TokenScorer | None = None  # loaded when a KL term first asks for it
        self._tools: set[str] = set()  # seen in samples so far
        self._optimizer = StepOptimizer(self.model.parameters(), config)
        self._budget = TokenBudget(config.max_tokens_per_microbatch, self.device)
        self._controller = CoefficientController()
        self._measured_at: int | None = None  # step of the last measurement of both terms' gradients
        self._policy_version = 0
        self._stop_token_ids: frozenset[int] | None = None
        self._server: SyncedServer | None = None
        if config.sampler != "torch":
            write = partial(save_merged, self._peft or self.model)
            from backtalk.engines.server import synced

            trainer = synced.Trainer(
                self.location,
                str(self._dtype),
                self.device.type,
                self.tokenizer,
                write=write,
                score=lambda rows, temperature: self._fit(lambda: self._score(rows, temperature)),
            )
            self._server = synced.SyncedServer(config.sampler, trainer)

    @property
    def policy_version(self) -> int:
        """Return the number of train steps taken so far, skipped ones included."""
        return self._policy_version

    @property
    def measures_gradients(self) -> bool:
        """Return whether ``train_step`` measures both terms' gradients, and so takes a share as the coefficient."""
        return self.config.measure_gradients_every != 0

    @property
    def applies_head(self) -> bool:
        """Return whether the engine applies the output embedding itself, and so can keep a term's gradient off it."""
        return self._scorer.has_separate_head

    @property
    def pad_token_id(self) -> int:
        """Return the token that fills the ends of rows; no result depends on it."""
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return pad if pad is not None else end if end is not None else 0

    def sampler(self, params: SamplingParams) -> Sampler:
        """Return a sampler of the current weights, which may not be used during or after a train step."""
        from backtalk.engines.torch.continuous import ContinuousTorchSampler
        from backtalk.engines.torch.sampler import TorchSampler

        if self._stop_token_ids is None:  # they depend on the chat template, and not on tools
            self._stop_token_ids = Renderer(self.tokenizer, (), RendererConfig(on_drift="fork")).stop_token_ids
        if (server := self._server) is not None:
            version = self._policy_version
            prepare = partial(self._in_worker, lambda: server.sync(version, params))
            from backtalk.engines.server.sampler import ServerSampler

            return ServerSampler(prepare, params=params, stop_token_ids=self._stop_token_ids, policy_version=version)
        kind = ContinuousTorchSampler if self.config.batching == "continuous" else TorchSampler
        return kind(
            self.model,
            params=params,
            stop_token_ids=self._stop_token_ids,
            pad_token_id=self.pad_token_id,
            policy_version=self._policy_version,
            device=self.device,
        )

    async def train_step(self, samples: Sequence[Sample], config: ObjectiveConfig) -> dict[str, float]:
        """Take one optimizer step over all samples, in micro-batches that change nothing but memory.

        Returns the metrics listed in docs/metrics.md, with the same names in every step (tools: those seen
        so far); NaN where there was nothing to measure.
        """
        check_objective(self, config)
        metrics = await self._in_worker(lambda: self._train_step(samples, config.at(self._policy_version)))
        if metrics["skipped"]:
            log.warning(
                "step %d changed nothing: %d rows with a reward, %d target tokens, gradient norm %s",
                self._policy_version,
                metrics["rewarded_sequences"],
                metrics["target_tokens"],
                metrics["grad_norm"],
            )
        return metrics

    async def score(self, trajectories: Sequence[Trajectory]) -> list[list[float]]:
        """Return each token's log-probability at temperature 1, in nats; 0.0 for the first token of a branch."""
        return await self._in_worker(lambda: self._fit(lambda: self._score(trajectories)))

    async def score_tokens(self, trajectories: Sequence[Trajectory], alternatives: int) -> list[TokenScores]:
        """Score as ``score`` does, and name the ``alternatives`` likeliest tokens where another one came."""
        parts = self._scorer, self._micro_batches, self._collate
        return await self._in_worker(lambda: self._fit(lambda: token_scores(*parts, trajectories, alternatives)))

    def save(self, folder: Path) -> None:
        """Write a checkpoint into a new folder.

        model/        weights and tokenizer, as AutoModelForCausalLM and AutoTokenizer read them (LoRA: merged)
        adapter/      the LoRA adapters alone, where there are any
        training.pt   optimizer state and float32 masters
        state.json    policy version and format
        """
        self._executor.submit(self._write, Path(folder)).result()

    def load(self, folder: Path) -> None:
        """Restore what ``save`` wrote; training continues with the same bits on the same machine."""
        self._executor.submit(self._read, Path(folder)).result()

    async def _in_worker(self, work: Callable[[], T]) -> T:
        """Run a function in the worker thread, as all methods below are."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def _fit(self, work: Callable[[], T]) -> T:
        """Do the work of a step in micro-batches that the device has memory for."""
        return self._budget.fit(work, self._optimizer.zero_grad)

    def _timed(self, stage: str) -> AbstractContextManager[None]:
        """Record a stage of a step, if anybody does, until the device has done its work."""
        return timed(stage, track="engine", wait=torch.cuda.synchronize if self.device.type == "cuda" else None)

    def _train_step(self, samples: Sequence[Sample], config: ObjectiveConfig) -> dict[str, float]:
        self._optimizer.zero_grad()  # where an earlier step broke off
        counts = TokenCounts.of(samples, config.world_loss_target)
        with self._timed("gradients"):
            due = self._is_measured(samples, config)
            terms = self._fit(lambda: self._measure(samples, counts, config)) if due else None
        share = config.world_model_coeff
        if isinstance(share, Share):
            coeff = self._controller.coefficient(share, self._policy_version)
            config = replace(config, world_model_coeff=coeff)
        if terms is not None and needs_both_terms(config, share):  # the measured gradients are the update's own
            losses, record, gradients = terms.combine(config)
            self._optimizer.set_gradients(gradients)
            has_gradient = any(gradient is not None for gradient in gradients)
        else:
            losses, record, has_gradient = self._fit(lambda: self._accumulate(samples, counts, config))
        if self._server is not None and self._server.version == self._policy_version:
            self._server.check_sampled(sampler_gap(record))
        world_only = config.policy_coeff > 0 and config.world_coeff > 0 and record.policy_square == 0
        scaled = world_only and config.world.zero_advantage_steps == "scaled"
        ratio = config.world_coeff / config.policy_coeff if scaled else None
        with self._timed("optimizer"):
            update = self._optimizer.step(ratio) if has_gradient else self._optimizer.idle_metrics()
            self._optimizer.zero_grad()
        if self.device.type == "cpu":
            release_memory()  # for the sampler and the commands
        self._policy_version += 1
        self._tools.update(span.tool for sample in samples for span in sample.spans if span.tool is not None)
        with self._timed("metrics"):
            tokens = token_metrics(record, counts, config, sorted(self._tools))
        coeff = config.world_coeff
        measured = None if terms is None else terms.measured
        update |= {} if self._server is None else self._server.metrics
        return losses | {"world_model_coeff": coeff} | tokens | term_metrics(measured, coeff) | update

    def _is_measured(self, samples: Sequence[Sample], config: ObjectiveConfig) -> bool:
        """Return whether this step measures both terms' gradients: one is due, and the policy term has a gradient."""
        every, last = steps_between_measurements(self.config.measure_gradients_every, config), self._measured_at
        if every == 0 or config.policy_coeff == 0 or (last is not None and self._policy_version - last < every):
            return False
        return any(s.has_reward and (s.advantage != 0 or config.policy.kl_coeff > 0) for s in samples)

    def _measure(self, samples: Sequence[Sample], counts: TokenCounts, config: ObjectiveConfig) -> StepTerms:
        """Compute both terms' gradients over the trained weights, each by itself, and tell the controller their norms.

        One forward and two backward passes. Under a share they are the update's own; otherwise they come before it, so
        that no bit of the update depends on measuring. They take two more tensors the size of the trained weights.
        """
        both = replace(config, world_model_coeff=1.0)
        policy_alone = replace(config, world_model_coeff=0.0)
        world_alone = replace(both, policy_coeff=0.0, world=replace(config.world, every=1))  # this step has the term
        policy, world = GradientSum(self.model.parameters()), GradientSum(self.model.parameters())
        losses, record = {"policy_loss": 0.0, "world_model_loss": 0.0}, StepRecord()
        self.model.train(self.config.gradient_checkpointing)
        for part, batch, row_sizes in self._batches(samples, both):
            scores = batch_scores(self._scorer, batch, row_sizes, both, counts).keep_gradients()
            world_loss, values = objective(scores.logprobs_BT, batch, counts, world_alone)
            if scores.logprobs_BT.requires_grad:
                world.add(world_loss, keep_graph=True)
                policy.add(objective(scores.logprobs_BT, batch, counts, policy_alone)[0])
            for name in losses:
                losses[name] += float(values[name])
            add_to_record(record, part, batch, scores)
        self.model.eval()
        measured = term_gradients(policy.sums, world.sums)
        self._controller.observe(measured.policy_norm, measured.world_norm)
        self._measured_at = self._policy_version
        return StepTerms(policy=policy, world=world, losses=losses, record=record, measured=measured)

    def _accumulate(
        self, samples: Sequence[Sample], counts: TokenCounts, config: ObjectiveConfig
    ) -> tuple[dict[str, float], StepRecord, bool]:
        """Accumulate the gradients of a step; return its losses, its record and whether any token has a gradient."""
        losses: dict[str, float] = {"policy_loss": 0.0, "world_model_loss": 0.0, "total_loss": 0.0}
        record, has_gradient = StepRecord(), False
        self.model.train(self.config.gradient_checkpointing)  # which only works in that mode; dropout is 0 anyway
        for part, batch, row_sizes in self._batches(samples, config):
            with self._timed("forward"):
                scores = batch_scores(self._scorer, batch, row_sizes, config, counts).keep_gradients()
                loss, terms = objective(scores.logprobs_BT, batch, counts, config)
            if loss.requires_grad:
                with self._timed("backward"):
                    loss.backward()
                    self._optimizer.accumulate()
                has_gradient = True
            for name, value in terms.items():
                losses[name] += float(value)
            add_to_record(record, part, batch, scores)
        self.model.eval()
        return losses, record, has_gradient

    def _batches(
        self, samples: Sequence[Sample], config: ObjectiveConfig
    ) -> Iterator[tuple[MicroBatch, Batch, list[int]]]:
        """Yield the micro-batches of a step, with the reference's log-probabilities where the KL term reads them."""
        for part in self._micro_batches(samples):
            batch, row_sizes = self._collate(part)
            if config.policy.kl_coeff > 0:
                batch = replace(batch, reference_logprobs_BT=self._reference_logprobs(batch, row_sizes, config))
            yield part, batch, row_sizes

    def _micro_batches(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        return self._budget.plan(samples, packing=self._scorer.packs)

    def _collate(self, part: MicroBatch) -> tuple[Batch, list[int]]:
        """Return a micro-batch as tensors on the device, and the number of samples in each row."""
        batch = collate([sample for row in part for sample in row], self.pad_token_id)
        return batch.to(self.device), [len(row) for row in part]

    @torch.no_grad()
    def _reference_logprobs(self, batch: Batch, row_sizes: Sequence[int], config: ObjectiveConfig) -> Tensor:
        """Score the actions with the model that the run began with: a second copy, or this one without adapters."""
        if self._peft is None and self._reference is None:
            model = load_model(self.location, self.device, self._dtype).requires_grad_(False)
            self._reference = TokenScorer(model, try_packing=self._scorer.packs)
        with nullcontext() if self._peft is None else self._peft.disable_adapter():
            return batch_scores(self._reference or self._scorer, batch, row_sizes, config).logprobs_BT

    @torch.no_grad()
    def _score(self, trajectories: Sequence[Trajectory], temperature: float = 1.0) -> list[list[float]]:
        """Return each token's log-probability, one list a trajectory, over all its branches."""
        branches = [to_samples(trajectory) for trajectory in trajectories]
        logprobs: dict[Sample, list[float]] = {}
        for part in self._micro_batches([sample for row in branches for sample in row]):
            batch, row_sizes = self._collate(part)
            real_BT = torch.arange(batch.token_ids_BT.shape[1], device=self.device) < batch.lengths_B[:, None]
            scores = self._scorer.scores(
                batch.token_ids_BT,
                batch.lengths_B,
                row_sizes,
                trained_BT=torch.zeros_like(real_BT),
                measured_BT=real_BT,
                temperature_BT=torch.full(real_BT.shape, temperature, device=self.device),
            )
            samples = [sample for row in part for sample in row]
            for sample, row in zip(samples, scores.logprobs_BT.tolist(), strict=True):
                logprobs[sample] = row[: len(sample)]
        return [[x for sample in row for x in logprobs.get(sample, ())] for row in branches]

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with quiet_transformers():
            if self._peft is not None:
                self._peft.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
            save_merged(self._peft or self.model, folder / "model")
            self.tokenizer.save_pretrained(folder / "model")
        state = {"policy_version": self._policy_version, "lora_rank": self.config.lora_rank, "model": self.config.model}
        state |= {"measured_at": self._measured_at, "coefficient": self._controller.state_dict()}
        torch.save(self._optimizer.state_dict(), folder / "training.pt")
        (folder / "state.json").write_text(json.dumps({"format": FORMAT} | state, indent=2) + "\n")

    def _read(self, folder: Path) -> None:
        state, training = read_checkpoint(folder, self.config.lora_rank)
        try:
            if self._peft is None:
                saved = load_model(str(folder / "model"), torch.device("cpu"), self._dtype)
                self.model.load_state_dict(saved.state_dict())
            else:
                load_adapter(self._peft, folder / "adapter")
            self._optimizer.load_state_dict(training)
        except (ConfigError, OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
            raise DataError(
                f"checkpoint {folder} does not fit model={self.config.model!r}, dtype={self._dtype}: {error}"
            ) from error
        self._policy_version = state["policy_version"]
        if self._server is not None:
            self._server.version = None  # it may hold others of that number
        if "coefficient" in state:  # not in a checkpoint of an older version
            self._measured_at = state["measured_at"]
            self._controller.load_state_dict(state["coefficient"])
