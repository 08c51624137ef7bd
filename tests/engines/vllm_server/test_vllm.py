"""Training with vLLM as the sampler, killed in the middle of a step and resumed: `scripts/vllm test` runs this."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backtalk.engines.server.config import ServerConfig
from backtalk.engines.server.process import VllmProcess
from backtalk.engines.torch.model import resolve_device, resolve_dtype
from backtalk.errors import SamplerFault
from backtalk.language.tokenizer import model_location
from backtalk.run.config import TrainConfig, load_config
from backtalk.run.events import Event, RolloutDone, StepDone
from backtalk.run.log import RunLog
from backtalk.run.train import train

if "BACKTALK_VLLM" not in os.environ:
    pytest.skip("vLLM is not installed here; type `scripts/vllm test`", allow_module_level=True)

START_S = 1800.0
PYTHON, EAGER = os.environ["BACKTALK_VLLM"], ("--enforce-eager",)
SMALL = {
    "steps": 3,
    "tasks_per_step": 2,
    "group_size": 3,
    "tasks.levels": [1],
    "evaluation.tasks": 0,
    "checkpoint_every": 1,
    "rollout.max_turns": 3,
}


def started(folder: Path) -> VllmProcess:
    folder.mkdir(exist_ok=True)
    device = resolve_device("auto")
    dtype = str(resolve_dtype("auto", device)).removeprefix("torch.")
    config = ServerConfig(python=PYTHON, arguments=EAGER)
    process = VllmProcess(config, model_location("base"), dtype, device.type, folder / "vllm.log")
    process.wait(START_S)
    return process


def config_at(server: VllmProcess) -> TrainConfig:
    return load_config("triage", {**SMALL, "engine.sampler.base_url": server.base_url, "engine.sampler.attempts": 3})


async def test_a_run_whose_server_is_killed_within_a_step_is_resumed_at_another(tmp_path: Path) -> None:
    server, folder, step = started(tmp_path / "first"), tmp_path / "run", 0

    def kill_in_second_step(event: Event) -> None:
        nonlocal step
        if isinstance(event, StepDone):
            step += 1
        elif isinstance(event, RolloutDone) and step == 1:
            os.killpg(server.process.pid, signal.SIGKILL)

    with pytest.raises(SamplerFault, match=r"the sampler is gone.*--resume"):
        await train(config_at(server), folder, on_event=kill_in_second_step)
    assert [row["step"] for row in RunLog(folder).read_metrics()] == [0]

    server = started(tmp_path / "second")
    await train(config_at(server), folder, resume=True)
    server.end()
    rows: list[dict[str, Any]] = RunLog(folder).read_metrics()
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        print({name: row[name] for name in ("sync_gap", "sync_uptake", "sync_seconds", "sampler_logprob_gap")})
        assert row["sync_gap"] < 1e-4 and row["sampler_logprob_gap"] < 1e-2
    assert rows[0]["sync_uptake"] is None or math.isnan(rows[0]["sync_uptake"])
    assert rows[2]["sync_uptake"] == pytest.approx(1, abs=0.05)


def test_a_vllm_started_by_the_run_ends_with_it(tmp_path: Path) -> None:
    settings = [f"{name}={value}" for name, value in {**SMALL, "steps": 1}.items()]
    settings += [f"engine.sampler.python={PYTHON}", f"engine.sampler.arguments={list(EAGER)}"]
    command = [sys.executable, "-m", "backtalk.cli", "train", "--preset", "triage", "--out", str(tmp_path / "run")]
    command += [word for setting in settings for word in ("--set", setting)]
    before = serving()
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert RunLog(tmp_path / "run").read_metrics()[0]["sync_gap"] < 1e-4
    assert serving() <= before


def serving() -> set[int]:
    """The processes of vLLM on this machine."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if b"vllm.entrypoints" in words or b"VLLM" in words:
            found.add(int(path.parent.name))
    return found
