"""Two processes that train a model sharded by FSDP2 on the CPU with the TRL host, for test_trl.py."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from backtalk.engines.torch.sampler import TorchSampler
from backtalk.hosts.trl import EchoGRPOTrainer
from backtalk.hosts.trl.conformance import cpu_config
from backtalk.hosts.trl.worlds import whole_weights
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.samples import Sample, build_samples
from backtalk.rollout.sampler import Completion, SamplingParams
from backtalk.trajectory import Segment, TokenRole, Trajectory, TrajectoryGroup

PROMPT = (5, 6, 7)


def samples() -> list[Sample]:
    """Return four rollouts of two turns, of which only the first two have an observation."""

    def trajectory(index: int) -> Trajectory:
        segments = [Segment(TokenRole.CONTEXT, PROMPT)]
        for turn in range(2):
            action = tuple(range(10 + index, 14 + index + turn))
            segments.append(Segment(TokenRole.ACTION, action, (-2.0,) * len(action), turn=turn))
            if index < 2:
                segments.append(Segment(TokenRole.TEMPLATE, (3, 4), turn=turn))
                segments.append(
                    Segment(TokenRole.ENV_OUTPUT, tuple(range(100 + 10 * index, 105 + 11 * index)), turn=turn)
                )
        return Trajectory(task_id="t", sample_index=index, segments=tuple(segments), reward=float(index % 2))

    return build_samples(TrajectoryGroup("t", tuple(trajectory(i) for i in range(4))), ObjectiveConfig())


def train(model_folder: Path, output: Path, *, processes: int = 1, rank: int = 0) -> dict[str, Any]:
    """Sample, then take a step on this process's share of the rollouts; return the actions, gradients and log."""
    sharded: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2}} if processes > 1 else {}
    args = cpu_config(
        output,
        max_steps=1,
        learning_rate=0.0,
        per_device_train_batch_size=4 // processes,
        num_generations=4,
        **sharded,
    )
    if processes > 1:
        # Accelerate reads FSDP's settings for a list of kinds of devices, and the CPU is not among them
        # (AcceleratorState.__init__). Under the name of one that is, it shards the CPU's as it does any other.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    share = 4 // processes
    trainer = EchoGRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "ls"}] * 4),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        rollouts=lambda inputs, trainer: samples()[rank * share : (rank + 1) * share],
        world_model_coeff=0.5,
    )
    reader = Reader(trainer, rank)
    trainer.add_callback(reader)
    trainer.train()
    return {"action": reader.action, "gradients": reader.gradients, "log": reader.log, "kinds": reader.kinds}


class Reader(TrainerCallback):
    """Samples before the step, more tokens on the second process than on the first, and reads the step's gradients."""

    def __init__(self, trainer: EchoGRPOTrainer, rank: int) -> None:
        self.trainer, self.count = trainer, 3 + 4 * rank
        self.gradients: dict[str, Tensor] = {}
        self.log: dict[str, float] = {}
        self.kinds: set[str] = set()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        model = self.trainer.model_wrapped
        with whole_weights(model, self.trainer.accelerator):
            sampler = TorchSampler(
                model, params=SamplingParams(max_tokens=self.count), stop_token_ids=(), pad_token_id=0
            )
            self.action = asyncio.run(sample(sampler))

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        for name, parameter in self.trainer.model.named_parameters():
            self.kinds.add(type(parameter.data).__name__)
            gradient = parameter.grad
            self.gradients[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.log = logs | self.log


async def sample(sampler: TorchSampler) -> Completion:
    async with sampler.session("one") as session:
        return await session.sample(PROMPT)


def in_two_processes(model_folder: Path, output: Path) -> list[dict[str, Any]]:
    """Return what each of two processes saw."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trl.trainer.grpo_trainer"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ProcessPoolExecutor(2, context) as pool:
        jobs = [pool.submit(_process, rank, port, model_folder, output) for rank in range(2)]
        return [job.result(timeout=600) for job in jobs]


def _process(rank: int, port: int, model_folder: Path, output: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    return train(model_folder, output, processes=2, rank=rank)
