"""SkyRL under test without a GPU: a step of its trainer, dispatch and policy workers, on local Ray with gloo.

Everything between a generator's output and the gradient is SkyRL's own code: batches, advantages, mini-batches, the
workers' loop over micro-batches, the registry of losses, the correction for data-parallel means. What needs CUDA is put
in its place here: the device, the model (the table of the suite), and the sum of gradients.
"""

from __future__ import annotations

import atexit
import math
import os
import socket
from pathlib import Path
from typing import Any

os.environ.setdefault("LOG_LEVEL", "ERROR")  # of SkyRL, which takes over the logging of a process

import ray  # pyright: ignore[reportMissingImports]
import torch
from skyrl.backends.skyrl_train.distributed.dispatch import ActorInfo, MeshRank  # pyright: ignore[reportMissingImports]
from skyrl.backends.skyrl_train.distributed.strategy import DistributedStrategy  # pyright: ignore[reportMissingImports]
from skyrl.backends.skyrl_train.utils.ppo_utils import (  # pyright: ignore[reportMissingImports]
    PolicyLossRegistry,
    sync_registries,
)
from skyrl.backends.skyrl_train.workers.worker import (  # pyright: ignore[reportMissingImports]
    PolicyWorkerBase,
    PPORayActorGroup,
)
from skyrl.backends.skyrl_train.workers.worker_dispatch import WorkerDispatch  # pyright: ignore[reportMissingImports]
from skyrl.train.config import SkyRLTrainConfig  # pyright: ignore[reportMissingImports]
from skyrl.train.generators.base import TrajectoryID  # pyright: ignore[reportMissingImports]
from skyrl.train.trainer import RayPPOTrainer  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, AutoTokenizer

from backtalk.engines.conformance import Step, StepResult, token_gradients
from backtalk.errors import InfrastructureError
from backtalk.hosts.skyrl.loss import PREFIX, register_losses
from backtalk.hosts.skyrl.rows import SAMPLES, policy_factors, row
from backtalk.hosts.skyrl.support import algorithm_settings
from backtalk.hosts.skyrl.trainer import EchoTrainer

START_TRIES = 3  # of Ray
# What Ray gives its own processes to start.
PATIENCE = {
    "RAY_gcs_server_port_wait_time_s": "600",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_agent_register_timeout_ms": "600000",
}
_Worker: Any = PolicyWorkerBase
_Strategy: Any = DistributedStrategy
_Group: Any = PPORayActorGroup


class SkyRLUnderTest:
    """``EchoTrainer`` on Backtalk's own rollouts, and ``RayPPOTrainer`` on the same rows."""

    def __init__(self, model_folder: Path) -> None:
        self.model_folder = model_folder
        self._groups: dict[int, Any] = {}  # of actors, by their number
        start_ray()
        register_losses()
        sync_registries()

    def train_step(self, step: Step) -> StepResult:
        """Take a step with Backtalk's objective."""
        return self._step(step, EchoTrainer)

    def own_grpo(self, step: Step) -> StepResult:
        """Take the step by SkyRL's own trainer and loss."""
        return self._step(step, RayPPOTrainer)

    def _step(self, step: Step, trainer_class: Any) -> StepResult:
        cfg = step_config(step, plain=trainer_class is RayPPOTrainer)
        group = self.actors(step.processes)
        ray.get(group.async_run_ray_method("pass_through", "begin", cfg.trainer))
        objective = step.objective
        kwargs: dict[str, Any] = {}
        if trainer_class is EchoTrainer:
            kwargs = {
                "world_model_coeff": objective.world_model_coeff,
                "world_normalizer": objective.world_normalizer,
                "world_loss_target": objective.world_loss_target,
                "max_seq_len": objective.max_seq_len,
                "world": objective.world,
                "policy_coeff": objective.policy_coeff,
            }
        tokenizer = AutoTokenizer.from_pretrained(self.model_folder)
        trainer = trainer_class(cfg, None, tokenizer, None, None, None, **kwargs)
        trainer.dispatch = WorkerDispatch(cfg, policy_actor_group=group)
        trainer.global_step = 1
        take_step(trainer, generator_output(step, cfg, tokenizer.pad_token_id))
        seen = ray.get(group.async_run_ray_method("pass_through", "seen"))
        return StepResult(
            gradients=token_gradients(seen[0][0], step.samples),
            metrics=[{**trainer.all_metrics, **metrics} for _, metrics in seen],
            raw=[gradient for gradient, _ in seen],
        )

    def actors(self, count: int) -> Any:
        """Return so many workers; they are kept, because the table never changes."""
        if count not in self._groups:
            cfg = SkyRLTrainConfig.from_cli_overrides({"trainer.policy.optimizer_config.lr": 0.0})
            self._groups[count] = CpuActors(cfg.trainer, 1, count, ray.remote(TableWorker))
            ray.get(self._groups[count].async_init_model(str(self.model_folder)))
        return self._groups[count]


def step_config(step: Step, *, plain: bool = False) -> Any:
    """Return SkyRL's settings of a step; the advantage of a row is given as its reward."""
    settings = algorithm_settings(step.objective)
    if plain:
        settings["trainer.algorithm.policy_loss_type"] = settings["trainer.algorithm.policy_loss_type"][len(PREFIX) :]
    rows = len(step.samples)
    share = math.ceil(rows / step.processes)
    return SkyRLTrainConfig.from_cli_overrides(
        {
            **settings,
            "trainer.algorithm.grpo_norm_by_std": False,
            "trainer.policy.optimizer_config.lr": 0.0,
            "trainer.placement.colocate_all": False,
            "trainer.enable_ray_gpu_monitor": False,
            "generator.inference_engine.enable_ray_prometheus_stats": False,
            "trainer.train_batch_size": rows,
            "trainer.policy_mini_batch_size": rows,
            "trainer.micro_train_batch_size_per_gpu": max(math.ceil(share / step.microbatches), 1),
            "generator.n_samples_per_prompt": 1,
            "generator.step_wise_trajectories": True,
            "generator.sampling_params.temperature": 1.0,
        }
    )


def generator_output(step: Step, cfg: Any, pad_token_id: int) -> dict[str, Any]:
    """Return a step's samples as a generator returns rollouts: each row is a group of one, whose baseline is 0."""
    samples = list(step.samples)
    advantages_B = torch.tensor([sample.advantage for sample in samples])
    if not cfg.trainer.algorithm.policy_loss_type.startswith(PREFIX):
        # SkyRL's own trainer knows of no row that counts for less than one.
        reduction = cfg.trainer.algorithm.loss_reduction
        boundaries = [(0, len(samples))]
        advantages_B = advantages_B * policy_factors(samples, boundaries, reduction, count=len(samples))
    columns = [row(sample, pad_token_id) for sample in samples]
    return {
        **{key: [column[key] for column in columns] for key in columns[0]},
        "rewards": advantages_B.tolist(),
        "trajectory_ids": [TrajectoryID(str(b), 0) for b in range(len(samples))],
        "is_last_step": [True] * len(samples),
        SAMPLES: samples,
    }


def take_step(trainer: Any, output: dict[str, Any]) -> None:
    """Take one step by a trainer of SkyRL, as its loop does after the rollouts; the sampler is the old policy."""
    uids = [trajectory_id.instance_id for trajectory_id in output["trajectory_ids"]]
    output, uids = trainer.postprocess_generator_output(output, uids)
    batch = trainer.convert_to_training_input(output, uids)
    batch = trainer.fwd_logprobs_values_reward(batch)
    sampled_BT = batch["loss_mask"] > 0
    batch["action_log_probs"] = batch["action_log_probs"].where(~sampled_BT, batch["rollout_logprobs"])
    batch = trainer.compute_advantages_and_returns(batch)
    batch.pop("rewards")
    for name in ("uids", "is_last_step"):
        batch.metadata.pop(name, None)
    trainer.train_critic_and_policy(batch)


class TableWorker(_Worker):
    """SkyRL's policy worker on a CPU, with the table of the suite as its model."""

    def init_worker_process_group(self) -> None:
        """Join the other workers by gloo, and let SkyRL take the CPU for its device."""
        torch.cuda.current_device = lambda: torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue]
        torch.distributed.init_process_group("gloo")
        self.device_mesh = init_device_mesh("cpu", (self._world_size, 1), mesh_dim_names=("dp", "sp"))
        rank, size = self._rank, self._world_size
        self.mesh_rank = MeshRank(dp=rank, sp=0, tp=0, pp=0, world_size=size, dp_size=size, pp_size=1)

    def init_model(self, folder: str) -> None:
        """Load the table, or another small model."""
        self.model = TableModel(folder)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.cfg.policy.optimizer_config.lr)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        self.strategy = CpuStrategy()

    def begin(self, cfg: Any) -> None:
        """Take the settings of the next step."""
        self.cfg = cfg
        self.policy_loss_fn = PolicyLossRegistry.get(cfg.algorithm.policy_loss_type)

    def forward_backward(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Accumulate the gradient of a share of a step, by SkyRL's own loop, and keep its metrics."""
        output = super().forward_backward(data, *args, **kwargs)
        self.metrics = dict(output.metrics)
        return output

    def seen(self) -> tuple[Tensor, dict[str, float]]:
        """Return the gradient of the head in the last step, and what this worker logged."""
        return self.strategy.head_gradient, self.metrics


class TableModel(torch.nn.Module):
    """A model of transformers with the call of SkyRL's model wrapper, which needs flash-attn to be imported."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def forward(
        self,
        sequences: Tensor,
        num_actions: int,
        attention_mask: Tensor | None = None,
        temperature: float = 1.0,
        return_output: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the log-probabilities of the last ``num_actions`` tokens, and the entropies before every token."""
        logprobs = (self.model(sequences, attention_mask=attention_mask).logits / temperature).log_softmax(-1)
        chosen = logprobs[:, :-1].gather(-1, sequences[:, 1:, None])[..., 0][:, -num_actions:]
        return (chosen, {"entropy": -(logprobs.exp() * logprobs).sum(-1)}) if return_output else chosen


class CpuStrategy(_Strategy):
    """Data-parallel training as SkyRL's strategies do it: backward passes, then the mean over processes."""

    def setup_distributed(self) -> None:
        """Do nothing: the worker has joined the others."""

    def backward(self, loss: Tensor, model: Any, optimizer: Any, **kwargs: Any) -> None:
        """Accumulate a gradient."""
        loss.backward()

    def optimizer_step(self, optimizer: Any, model: Any, scheduler: Any, name: str = "model", **kwargs: Any) -> Tensor:
        """Average the gradient over the processes, take the step, and return the norm."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
            gradient /= torch.distributed.get_world_size()
        self.head_gradient = model.model.lm_head.weight.grad.clone()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return torch.stack([gradient.norm() for gradient in gradients]).norm()

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: nothing is learned here."""
        raise NotImplementedError

    load_checkpoint = save_hf_model = save_checkpoint


class CpuActors(_Group):
    """A group of SkyRL's workers on this machine, without a GPU each."""

    def _initiate_actors(self, pg: Any, num_gpus_per_actor: float) -> None:
        size = self._num_gpus_per_node
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._actor_handlers = [
            self.ray_actor_type.options(num_cpus=0).remote(
                cfg=self.cfg,
                world_size=size,
                rank=rank,
                local_rank=rank,
                master_addr="127.0.0.1",
                master_port=port,
                sequence_parallel_size=1,
            )
            for rank in range(size)
        ]
        ray.get([actor.init_worker_process_group.remote() for actor in self._actor_handlers])
        ranks = ray.get([actor.get_mesh_rank.remote() for actor in self._actor_handlers])
        self.actor_infos = [ActorInfo(*pair) for pair in zip(self._actor_handlers, ranks, strict=True)]


def start_ray() -> None:
    """Start a Ray of this machine alone, unless one runs; it ends with this process.

    Ray gives its agent 15 seconds to start and its node 30, whatever its settings say. On a busy machine the first try
    may take longer, as it reads Ray's packages from the disk, and is repeated.

    Raises:
        InfrastructureError: it did not start in time.
    """
    if ray.is_initialized():
        return
    os.environ.update(PATIENCE | os.environ)
    atexit.register(ray.shutdown)
    settings = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR", "namespace": "backtalk"}
    for _ in range(START_TRIES):
        try:
            ray.init(num_cpus=2, **settings)
            return
        except Exception as error:  # Ray's own are plain ones
            ray.shutdown()
            if "timed out during startup" not in str(error):
                raise
    raise InfrastructureError(
        f"Ray did not start here in {START_TRIES} tries of 30 s, which no setting of Ray changes; "
        f"the load is {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores: try again when less is running"
    )
