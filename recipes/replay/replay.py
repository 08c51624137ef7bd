"""Take the recorded steps of a run again with an engine or a host, and write what it says of each step's losses.

python recipes/replay/replay.py ENGINE RUN OUT        ENGINE is tinker, float64, torch or trl

RUN is a folder of `backtalk train`; OUT gets ENGINE.jsonl, a line for each step, and the adapters after the last one as
ENGINE.safetensors. All train LoRA adapters that begin as start.safetensors: as the service drew them if tinker goes
first, else drawn here. The rollouts are the recorded ones in every step, token by token, with the log-probabilities at
which they were sampled, so the longer a replay is, the further it is from the policy that sampled.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters import adapters_of, begin_with
from backtalk.engines.torch.model import add_lora, load_model
from backtalk.objective.config import ObjectiveConfig, WorldOptions
from backtalk.objective.samples import build_samples
from backtalk.run.log import RunLog

RANK = 16  # SkyRL's server has alpha 32 for every rank, and the embedded engine twice the rank
RATE, BETAS = 1e-3, (0.9, 0.95)  # of AdamW, without decay, warm-up or clipping
COEFF = 0.05
# The optimizer of a service and of a host takes a full step where all rewards are equal, so all do.
OBJECTIVE = ObjectiveConfig(world_model_coeff=COEFF, world=WorldOptions(zero_advantage_steps="full"))
LOSSES = ("policy_loss", "world_model_loss", "total_loss", "target_ce", "grad_norm")

Losses = Mapping[str, float]


class Recording:
    """The steps of a run as samples, and the model that it began with."""

    def __init__(self, folder: str) -> None:
        log = RunLog(folder)
        config = log.read_config()
        self.model = str(Path(config["engine"]["model"]).resolve())
        self.group_size = int(config["group_size"])
        groups = [log.read_groups(step) for step in log.group_steps()]
        self.steps = [[s for group in step for s in build_samples(group, OBJECTIVE)] for step in groups]


def starting_adapters(recording: Recording, out: Path) -> dict[str, Tensor]:
    """Return the adapters to begin with, drawn where there are none: one A for queries, keys and values."""
    if not (out / "start.safetensors").is_file():
        model = add_lora(load_model(recording.model, torch.device("cpu"), torch.float32), RANK, 0)
        drawn = adapters_of(model)
        for name in drawn:
            shared = name.replace("k_proj.lora_A", "q_proj.lora_A").replace("v_proj.lora_A", "q_proj.lora_A")
            drawn[name] = drawn[shared].clone()
        save_file(drawn, out / "start.safetensors")
    return load_file(out / "start.safetensors")


def replay_tinker(recording: Recording, out: Path) -> Iterator[Losses]:
    """Replay through the Tinker engine, on the server at TINKER_BASE_URL."""
    from backtalk.engines.remote.engine import RemoteEngine
    from backtalk.engines.tinker.config import TinkerConfig
    from backtalk.engines.tinker.sdk import connect

    config = TinkerConfig(
        model=recording.model,
        base_url=os.environ["TINKER_BASE_URL"],
        lora_rank=RANK,
        learning_rate=RATE,
        betas=BETAS,
        grad_clip_norm=float("inf"),
        max_logprob_gap=float("inf"),  # the rollouts are another policy's
    )
    engine = RemoteEngine(config, lambda: connect(config))
    save_file(_served_adapters(engine), out / "start.safetensors")
    for samples in recording.steps:
        yield asyncio.run(engine.train_step(samples, OBJECTIVE))
    save_file(_served_adapters(engine), out / "tinker.safetensors")


def replay_torch(recording: Recording, out: Path, *, dtype: str = "float32") -> Iterator[Losses]:
    """Replay through the embedded engine."""
    from backtalk.engines.torch.config import TorchConfig
    from backtalk.engines.torch.engine import TorchEngine

    config = TorchConfig(
        model=recording.model,
        device="cpu",
        dtype=dtype,
        lora_rank=RANK,
        learning_rate=RATE,
        betas=BETAS,
        grad_clip_norm=float("inf"),
        measure_gradients_every=0,
    )
    engine = TorchEngine(config)
    begin_with(engine.model, starting_adapters(recording, out))
    for samples in recording.steps:
        yield asyncio.run(engine.train_step(samples, OBJECTIVE))
    save_file(adapters_of(engine.model), out / f"{'float64' if dtype == 'float64' else 'torch'}.safetensors")


def replay_trl(recording: Recording, out: Path) -> Iterator[Losses]:
    """Replay through TRL's trainer, with its own loop and optimizer, in four micro-batches a step."""
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback

    from backtalk.hosts.trl import EchoGRPOTrainer
    from backtalk.hosts.trl.conformance import cpu_config

    parts, logged, left = 4, list[Losses](), list(recording.steps)
    rows = -(-len(left[0]) // parts)

    class Reader(TrainerCallback):
        def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "train_runtime" not in logs:
                logged.append(logs)

    model = add_lora(load_model(recording.model, torch.device("cpu"), torch.float32), RANK, 0)
    begin_with(model, starting_adapters(recording, out))
    args = cpu_config(
        out / "trl",
        max_steps=len(left),
        learning_rate=RATE,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        lr_scheduler_type="constant",
        max_grad_norm=1e9,  # 0 would leave the norm out of the log
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=parts,
        num_generations=recording.group_size,
        loss_type="grpo",
        epsilon=OBJECTIVE.clip[0],
        epsilon_high=OBJECTIVE.clip[1],
        remove_unused_columns=False,
    )
    trainer = EchoGRPOTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": ""}] * args.generation_batch_size),
        processing_class=AutoTokenizer.from_pretrained(recording.model),
        rollouts=lambda inputs, trainer: left.pop(0),
        world_model_coeff=COEFF,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Reader())
    trainer.train()
    save_file(adapters_of(model), out / "trl.safetensors")
    for logs in logged:
        yield _losses(logs["loss"], logs["world/loss"], logs["world/target_ce"], logs["grad_norm"])


def _losses(total: float, world: float, ce: float, norm: float) -> Losses:
    return dict(zip(LOSSES, (total - COEFF * world, world, total, ce, norm), strict=True))


def _served_adapters(engine: Any) -> dict[str, Tensor]:
    """Return the adapters of the engine's model as its service hands them out, in PEFT's names."""
    from served import read_adapters

    name = f"replay-{engine.policy_version}"
    return read_adapters(engine._current_model(), engine.config.base_url, name)[1]


def main(engine: str, run: str, out: str) -> None:
    """Replay a run through one engine and write a line for each step."""
    torch.manual_seed(0)
    folder, recording = Path(out), Recording(run)
    folder.mkdir(parents=True, exist_ok=True)
    replays = {
        "tinker": replay_tinker,
        "torch": replay_torch,
        "float64": lambda *args: replay_torch(*args, dtype="float64"),
        "trl": replay_trl,
    }
    lines = []
    for step, metrics in enumerate(replays[engine](recording, folder)):
        lines.append({"step": step} | {name: metrics[name] for name in LOSSES})
        print(engine, json.dumps(lines[-1]), flush=True)
    (folder / f"{engine}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
