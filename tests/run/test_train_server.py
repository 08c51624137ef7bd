"""A run whose sampler is a server that dies in the middle of a step."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from backtalk.errors import SamplerFault, SandboxUnavailable
from backtalk.run.config import TrainConfig, load_config
from backtalk.run.events import Event, StepDone
from backtalk.run.log import RunLog
from backtalk.run.train import train
from backtalk.sandboxes import local_sandbox
from sampling_server import sampling_server
from tiny import tiny_model_dir


def config_at(url: str, model: Path) -> TrainConfig:
    try:
        local_sandbox("auto")
        sandbox = "auto"
    except SandboxUnavailable:
        sandbox = "unsafe"
    overrides = {
        "steps": 2,
        "tasks_per_step": 1,
        "group_size": 2,
        "sandbox": sandbox,
        "tasks.levels": [1],
        "evaluation.tasks": 0,
        "checkpoint_every": 1,
        "rollout.max_turns": 2,
        "rollout.max_tokens": 400,
        "rollout.max_tokens_per_turn": 6,
        "rollout.max_retries": 0,
        "engine.model": str(model),
        "engine.learning_rate": 1e-3,
        "engine.device": "cpu",
        "engine.sampler.base_url": url,
        "engine.sampler.attempts": 1,
    }
    return load_config("triage", overrides)


async def test_a_step_whose_server_dies_is_not_counted_and_a_resume_repeats_it(tmp_path: Path) -> None:
    model = tiny_model_dir(tmp_path / "model")
    with sampling_server(model) as server:
        whole = await train(config_at(server.url, model), tmp_path / "whole")

        def die_in_second_step(event: Event) -> None:
            if isinstance(event, StepDone) and event.step == 0:
                server.lives = 4 + 1  # the proof, and one action

        broken = tmp_path / "broken"
        with pytest.raises(SamplerFault, match=r"the sampler is gone.*not counted.*--resume"):
            await train(config_at(server.url, model), broken, on_event=die_in_second_step)
        assert [row["step"] for row in RunLog(broken).read_metrics()] == [0]

        server.mend()
        await train(config_at(server.url, model), broken, resume=True)
    assert [row["step"] for row in RunLog(broken).read_metrics()] == [0, 1]
    weights = [load_file(RunLog(run).checkpoint_path / "model/model.safetensors") for run in (whole, broken)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])  # to the bit
