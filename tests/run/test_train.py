"""Whole runs: a tiny transformer in real sandboxes, killed, resumed, stopped, refused."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from backtalk.errors import ConfigError, DataError, InfrastructureError, SandboxUnavailable
from backtalk.objective import objective
from backtalk.objective.batch import TokenCounts, collate
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.samples import Sample
from backtalk.run.config import TrainConfig, config_from_dict, config_to_dict, load_config
from backtalk.run.evaluate import Evaluation
from backtalk.run.events import EvaluationDone, Event, Notice, RolloutDone, RunDone, RunStarted, StepDone
from backtalk.run.log import RunLog, read_trajectories, write_trajectories
from backtalk.run.rollouts import check_rollouts
from backtalk.run.tasks import tasks_of_step
from backtalk.run.train import _uninterrupted, evaluate_run, open_run, train
from backtalk.sandboxes import local_sandbox
from backtalk.sandboxes.base import SandboxFile
from backtalk.tasks.folder import write_harbor_task
from backtalk.tasks.load import load_tasks
from backtalk.tasks.task import Split
from backtalk.trajectory import Failure, Segment, StopReason, TokenRole, Trajectory, TrajectoryGroup
from backtalk.viewer.data import find_rollout
from backtalk.viewer.report.curves import BEHAVIOUR, GRAD_NORMS, ROLE_METRICS, SHARES, draw_run
from taught import taught_model_dir

HERE = Path(__file__).parents[1]
METRICS = re.findall(r"^\| `(\w+)` \|", (HERE.parent / "docs/metrics.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return taught_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sandbox() -> str:
    try:
        local_sandbox("auto")
    except SandboxUnavailable:
        return "unsafe"
    return "auto"


@pytest.fixture
def config(model: Path, sandbox: str) -> TrainConfig:
    return tiny_config(model, sandbox)


def tiny_config(model: Path, sandbox: str, **changes: Any) -> TrainConfig:
    overrides = {
        "steps": 4,
        "tasks_per_step": 2,
        "group_size": 3,
        "sandbox": sandbox,
        "tasks.levels": [1],
        "evaluation.tasks": 2,
        "evaluation.samples_per_task": 2,
        "rollout.max_turns": 2,
        "rollout.max_tokens": 400,
        "rollout.max_tokens_per_turn": 12,
        "engine.model": str(model),
        "engine.learning_rate": 1e-3,
        "engine.device": "cpu",
    }
    return load_config("triage", {**overrides, **changes})


def comparable(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run without what the clock says."""
    return [
        {name: value for name, value in row.items() if "second" not in name and "share" not in name}
        for row in RunLog(folder).read_metrics()
    ]


def said(folder: Path) -> list[tuple[Any, ...]]:
    """What was said in every training rollout, and what broke: where two runs part, this tells why."""
    log = RunLog(folder)
    rollouts = [(step, t) for step in log.group_steps() for group in log.read_groups(step) for t in group]
    return [(step, t.task_id, t.sample_index, t.failure, t.messages) for step, t in rollouts]


def measured(evaluation: Evaluation | dict[str, Any]) -> dict[str, Any]:
    tree = evaluation if isinstance(evaluation, dict) else json.loads(json.dumps(evaluation.to_dict()))
    return {name: value for name, value in tree.items() if name != "seconds"}


@pytest.fixture(scope="module")
def whole(model: Path, sandbox: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    """An unbroken run of four steps, and what it told."""
    events: list[Event] = []
    folder = tmp_path_factory.mktemp("whole") / "run"
    return asyncio.run(train(tiny_config(model, sandbox), folder, on_event=events.append)), events


# ---------------------------------------------------------------- a run


async def test_a_run_leaves_everything_a_reader_needs(config: TrainConfig, whole: tuple[Path, list[Event]]) -> None:
    folder, events = whole
    log = RunLog(folder)

    assert config_from_dict(log.read_config()) == config
    assert (log.tokenizer_path / "tokenizer.json").is_file()
    assert log.checkpoint_path.is_dir()
    assert log.evaluation_steps() == [0, 4]
    assert [row["step"] for row in log.read_metrics()] == log.group_steps() == [0, 1, 2, 3]
    for row in log.read_metrics():
        groups = log.read_groups(row["step"])
        rollouts = [t for group in groups for t in group]
        assert [len(group) for group in groups] == [3, 3]
        assert all(t.policy_version == row["step"] for t in rollouts)
        assert row["env_output_tokens"] == sum(t.count(TokenRole.ENV_OUTPUT) for t in rollouts)
        assert row["action_tokens"] == sum(t.count(TokenRole.ACTION) for t in rollouts) > 0
        assert row["reward"] == sum(t.reward or 0.0 for t in rollouts) / 6
        assert math.isfinite(row["total_loss"]) and row["sampler_logprob_gap"] < 1e-3
        assert 0 < row["sandbox_share"] < 1 and row["rollout_seconds"] > 0 and row["tokens_per_second"] > 0
        weights = log.read_weights(row["step"], groups)
        assert weights is not None and [len(rows) for rows in weights] == [3, 3]
        observed = sum(t.count(TokenRole.ENV_OUTPUT) > 0 and t.count(TokenRole.WARNING) == 0 for t in rollouts)
        said = sum(sum(w.world) for rows in weights for w in rows)
        assert 0.05 * observed / 6 - 1e-6 <= said <= 0.05 + 1e-6
    assert sum(row["env_output_tokens"] for row in log.read_metrics()) > 0

    kinds = [type(event) for event in events if not isinstance(event, RolloutDone | Notice)]
    assert kinds == [RunStarted, EvaluationDone, StepDone, StepDone, StepDone, StepDone, EvaluationDone, RunDone]
    done = [e for e in events if isinstance(e, RolloutDone) and (e.phase, e.step) == ("training", 1)]
    assert [(e.done, e.total) for e in done] == [(i, 6) for i in range(1, 7)]
    assert events[-1] == RunDone(folder, 4, finished=True)

    again = await evaluate_run(folder)
    assert measured(again) == measured(log.read_evaluation(4))
    assert (await evaluate_run(folder, overrides=["evaluation.tasks=1"], base=True)).step == 0


def test_metrics_are_the_listed_ones(whole: tuple[Path, list[Event]]) -> None:
    for row in RunLog(whole[0]).read_metrics():
        names = dict.fromkeys(name.partition("/")[0] for name in row)
        assert set(names) == {"step", *METRICS}


async def test_every_curve_is_drawn_of_a_real_run(longer: tuple[TrainConfig, Path]) -> None:
    log = RunLog(longer[1])
    recorded = log.evaluation_path(0).with_suffix(".parquet")
    # Of the model that the run began with: at its end the penalty on length has made rollouts too short for an answer.
    measured = await evaluate_run(log.folder, overrides={"evaluation.recorded_path": str(recorded)}, base=True)
    figure = draw_run(log.read_metrics(), {0: measured.to_dict()})
    assert {axis.get_title(): axis.get_legend_handles_labels()[1] for axis in figure.axes} == {
        "reward": ["reward of the step", "share solved", "held-out pass@1"],
        "env-output cross-entropy, nats/token": ["training rollouts", "held-out, recorded", "held-out, own"],
        "gradient norm over all weights": [*GRAD_NORMS.values()],
        "gradient of the world-model term": [*SHARES.values()],
        "tokens a step, by role": ["action", "env output", "warning"],
        "seconds a step": ["sampling", "sandbox", "training"],
        "per rollout, on average": [*BEHAVIOUR.values()],
        "world_model_coeff": ["as used"],
    }
    assert {*GRAD_NORMS, *SHARES, *BEHAVIOUR, *ROLE_METRICS} <= set(METRICS)
    for axis in figure.axes[:4]:  # each line has numbers that are drawn
        assert all(len(line.get_xdata()) for line in axis.get_lines())
    for axis in figure.axes[4:6]:
        assert all(area.get_paths()[0].get_extents().height > 0 for area in axis.collections)


async def test_observations_alone_teach_what_another_policys_world_says(
    model: Path, sandbox: str, whole: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    """No verifier, groups of one, and the cross-entropy on recorded trajectories falls."""
    recorded = RunLog(whole[0]).evaluation_path(0).with_suffix(".parquet")
    changes = {"objective.policy_coeff": 0, "group_size": 1, "tasks_per_step": 6, "engine.warmup_steps": 0}
    changes |= {"engine.learning_rate": 3e-3, "evaluation.recorded_path": str(recorded), "evaluation.tasks": 1}
    log = RunLog(await train(tiny_config(model, sandbox, **changes), tmp_path / "run"))
    before, after = (log.read_evaluation(step)["env_ce_recorded"]["value"] for step in (0, 4))
    assert after < 0.9 * before
    said = sum(t.count(TokenRole.ENV_OUTPUT) for t in read_trajectories(recorded))
    assert sum(task["env_tokens"] for task in log.read_evaluation(0)["recorded"]) == said > 0


# ---------------------------------------------------------------- what is shown is what was trained


class GradientEngine:
    """An engine at version 3 whose gradient d(loss) / d(logprob) is taken at the sampling policy, and kept."""

    policy_version = 3

    async def train_step(self, samples: Sequence[Sample], config: ObjectiveConfig) -> dict[str, float]:
        batch = collate(samples, 0)
        logprobs_BT = batch.sampling_logprobs_BT.double().requires_grad_()
        objective(logprobs_BT, batch, TokenCounts.of(samples), config)[0].backward()
        assert logprobs_BT.grad is not None
        self.gradients = [row[: len(sample)] for row, sample in zip(logprobs_BT.grad, samples, strict=True)]
        return {}


async def test_what_is_shown_is_what_was_trained(model: Path, sandbox: str, tmp_path: Path) -> None:
    """Length and age move a reward before advantages, and a viewer that starts from the reward shows another sign."""
    penalty = {"advantage": "dr_grpo", "length_penalty": {"per_1000_tokens": 100, "max_penalty": 9.0}}  # 0.1 a token
    config = tiny_config(model, sandbox, **{"objective.policy": penalty, "checkpoint_every": 4})

    def rollout(task: str, index: int, reward: float, length: int, version: int) -> Trajectory:
        prompt, action = Segment(TokenRole.CONTEXT, (5, 6)), Segment(TokenRole.ACTION, (7, 8), (-0.5, -0.5), 0)
        said = Segment(TokenRole.ENV_OUTPUT, (9,) * (length - 2), None, 0, "bash")
        segments = (prompt, action, said)
        return Trajectory(task_id=task, sample_index=index, segments=segments, reward=reward, policy_version=version)

    groups = [
        TrajectoryGroup("long", (rollout("long", 0, 1.0, 24, 3), rollout("long", 1, 0.5, 10, 3))),
        TrajectoryGroup("old", (rollout("old", 0, 1.0, 6, 2), rollout("old", 1, 0.0, 6, 2))),
    ]
    log, engine = RunLog(tmp_path / "run"), GradientEngine()
    log.write_config(config_to_dict(config))
    log.write_groups(0, groups)
    async with open_run(config, lambda event: None) as run:
        run.engine.tokenizer.save_pretrained(str(log.tokenizer_path))
        run.engine = engine  # type: ignore[assignment]
        assert find_rollout(log.folder).weights is None  # not trained yet
        await run.train_step(0, groups, 1.0, log)

    trained = iter(engine.gradients)
    for group, sample, advantage in [(0, 0, -0.45), (0, 1, 0.45), (1, 0, None), (1, 1, None)]:
        weights = find_rollout(log.folder, group=group, sample=sample).weights
        assert weights is not None and weights.advantage == pytest.approx(advantage)  # 1 - 2.4 and 0.5 - 1.0
        shown = [p + w for p, w in zip(weights.policy, weights.world, strict=True)]
        assert shown == pytest.approx((-next(trained)).tolist(), rel=1e-6)
        assert any(weights.policy) == (group == 0) and any(weights.world)


# ---------------------------------------------------------------- killed and resumed

KILLED = """
import asyncio, json, os, signal, sys
from pathlib import Path
from backtalk.run.config import config_from_dict
from backtalk.run.events import RolloutDone, StepDone
from backtalk.run.train import train

config, folder, kind, step = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

def on_event(event):
    middle = isinstance(event, RolloutDone) and event.phase == "training" and event.done == event.total // 2
    if (middle if kind == "rollouts" else isinstance(event, StepDone)) and event.step == step:
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(train(config_from_dict(config), folder, on_event=on_event))
"""


@pytest.fixture(scope="module")
def longer(model: Path, sandbox: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    """An unbroken run of six steps, a coefficient by share, a checkpoint and an evaluation every second step.

    A penalty on length makes rewards unequal, so that there is a policy gradient to measure.
    """
    share = {"objective.world_model_coeff": {"share": 0.2}, "engine.measure_gradients_every": 1}
    share |= {"objective.policy.length_penalty": {"per_1000_tokens": 100, "max_penalty": 9.0}}
    config = tiny_config(model, sandbox, steps=6, checkpoint_every=2, **{"evaluation.every": 2}, **share)
    return config, asyncio.run(train(config, tmp_path_factory.mktemp("longer") / "run"))


@pytest.mark.parametrize(
    "kind", ["rollouts", pytest.param("after_the_step_before_its_checkpoint", marks=pytest.mark.slow)]
)
async def test_a_killed_run_resumes_to_the_same_numbers(
    kind: str, longer: tuple[TrainConfig, Path], tmp_path: Path
) -> None:
    config, whole = longer
    folder = tmp_path / "killed"
    process = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(config_to_dict(config)), str(folder), kind, "4"],
        env={**os.environ, "PYTHONPATH": str(HERE.parent / "src"), "OMP_NUM_THREADS": str(threads())},
        capture_output=True,
        text=True,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    left = RunLog(folder)
    assert [row["step"] for row in left.read_metrics()] == list(range(4 if kind == "rollouts" else 5))

    events: list[Event] = []
    await train(config, folder, resume=True, on_event=events.append)
    assert isinstance(events[0], RunStarted | Notice)
    assert next(e for e in events if isinstance(e, RunStarted)).first_step == 4
    assert said(folder) == said(whole)
    assert comparable(folder) == comparable(whole)
    assert RunLog(whole).read_metrics()[4]["world_model_coeff"] != 0.05  # no longer the initial one
    for step in left.evaluation_steps():
        assert measured(left.read_evaluation(step)) == measured(RunLog(whole).read_evaluation(step))
    assert left.evaluation_steps() == [0, 2, 4, 6]


async def test_shuffled_observations_are_those_of_an_unbroken_run_after_a_resume(
    model: Path, sandbox: str, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"objective.world.observations": "shuffled", "evaluation.tasks": 0}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    await train(tiny_config(model, sandbox, steps=3, **changes), whole)
    await train(tiny_config(model, sandbox, steps=2, **changes), broken)
    await train(tiny_config(model, sandbox, steps=3, **changes), broken, resume=True)
    assert comparable(broken) == comparable(whole)
    rows = RunLog(whole).read_metrics()
    assert all(row["target_tokens"] == row["env_output_tokens"] > 0 for row in rows)
    assert all(row["target_ce"] != row["env_output_ce"] for row in rows)


def threads() -> int:
    import torch

    return torch.get_num_threads()


async def test_a_stopped_run_resumes_with_more_steps(
    model: Path, sandbox: str, whole: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    stop = threading.Event()
    events: list[Event] = []

    def on_event(event: Event) -> None:
        events.append(event)
        if isinstance(event, RolloutDone) and (event.phase, event.step) == ("training", 0):
            stop.set()

    folder = tmp_path / "run"
    await train(tiny_config(model, sandbox, steps=3), folder, on_event=on_event, stop=stop)
    assert events[-1] == RunDone(folder, 1, finished=False)
    assert RunLog(folder).evaluation_steps() == [0]
    assert RunLog(folder).checkpoint_path.is_dir()
    await train(tiny_config(model, sandbox), folder, resume=True)
    assert comparable(folder) == comparable(whole[0])


async def test_an_alarm_halves_the_coefficient_and_a_resumed_run_goes_on_alike(
    model: Path, sandbox: str, tmp_path: Path
) -> None:
    """At 5 the world-model term is most of the gradient; a penalty on length makes rewards unequal."""
    changes = {"objective.world_model_coeff": 5.0, "objective.world.on_trouble": "halve", "evaluation.tasks": 0}
    changes |= {"objective.policy.length_penalty": {"per_1000_tokens": 100, "max_penalty": 9.0}}
    config = tiny_config(model, sandbox, **changes, **{"engine.measure_gradients_every": 1})
    events: list[Event] = []
    whole = RunLog(await train(config, tmp_path / "whole", on_event=events.append))
    rows = whole.read_metrics()
    first = next(row["step"] for row in rows if row["world_grad_share"] is not None)
    assert first < 2 and rows[first]["world_grad_share"] > 0.5
    assert [row["world_model_coeff"] for row in rows] == [5.0] * (first + 1) + [2.5] * (3 - first)
    told = [e.text for e in events if isinstance(e, Notice) and e.text.startswith(f"step {first}: world_")]
    assert [line.split("=")[0] for line in told] == [
        f"step {first}: world_grad_share",
        f"step {first}: world_model_coeff",
    ]

    stop = threading.Event()

    def stop_after_two(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 1:
            stop.set()

    folder = await train(config, tmp_path / "stopped", on_event=stop_after_two, stop=stop)
    assert RunLog(folder).last_step() == 1
    await train(config, folder, resume=True, on_event=events.append)
    assert comparable(folder) == comparable(whole.folder)
    assert not any("halved" in e.text for e in events[-20:] if isinstance(e, Notice))


async def test_a_cancelled_run_leaves_a_checkpoint_of_its_last_whole_step(
    config: TrainConfig, whole: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    def on_event(event: Event) -> None:
        if isinstance(event, RolloutDone) and (event.phase, event.step, event.done) == ("training", 2, 1):
            running.cancel()

    folder = tmp_path / "run"
    running = asyncio.ensure_future(train(config, folder, on_event=on_event))
    with pytest.raises(asyncio.CancelledError):
        await running
    assert [row["step"] for row in RunLog(folder).read_metrics()] == [0, 1]
    starts: list[Event] = []
    await train(config, folder, resume=True, on_event=starts.append)
    assert next(e for e in starts if isinstance(e, RunStarted)).first_step == 2
    assert comparable(folder) == comparable(whole[0])


async def test_an_update_that_has_begun_is_recorded_before_a_cancellation_is_obeyed() -> None:
    begun, go_on, done = asyncio.Event(), asyncio.Event(), []

    async def work() -> None:
        begun.set()
        await go_on.wait()
        done.append("recorded")

    running = asyncio.ensure_future(_uninterrupted(work()))
    await begun.wait()
    running.cancel()
    await asyncio.sleep(0)
    assert not running.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert done == ["recorded"]


async def test_a_checkpoint_caught_between_two_names_is_found(
    config: TrainConfig, whole: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole[0], tmp_path / "run"))
    (folder / "checkpoint").rename(folder / ".checkpoint.old")
    events: list[Event] = []
    await train(config, folder, resume=True, on_event=events.append)
    assert next(e for e in events if isinstance(e, RunStarted)).first_step == 4


async def test_a_folder_with_another_run_is_not_written_over(
    config: TrainConfig, model: Path, sandbox: str, whole: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="holds a run already; continue it with --resume"):
        await train(config, whole[0])
    with pytest.raises(ConfigError, match=r"group_size: 3 -> 2.*would mix two runs"):
        await train(tiny_config(model, sandbox, group_size=2), whole[0], resume=True)
    with pytest.raises(DataError, match="not a run folder"):
        await train(config, tmp_path / "absent", resume=True)
    with pytest.raises(ConfigError, match="has done 4 steps already, more than steps=3"):
        await train(tiny_config(model, sandbox, steps=3), whole[0], resume=True)
    assert RunLog(whole[0]).evaluation_steps() == [0, 4]


async def test_a_folder_in_which_a_run_lives_is_refused_to_a_second(config: TrainConfig, tmp_path: Path) -> None:
    """Begun anew or resumed; the first goes on to its end."""
    refused: list[str] = []

    async def second(event: Event) -> None:
        for resume in (False, True):
            with pytest.raises(ConfigError, match=f"being written by process {os.getpid()} .*two writers would mix"):
                await train(config, tmp_path / "run", resume=resume)
            refused.append(type(event).__name__)

    seconds: list[asyncio.Task[None]] = []

    def on_event(event: Event) -> None:
        if isinstance(event, RunStarted | StepDone):
            seconds.append(asyncio.ensure_future(second(event)))

    await train(config, tmp_path / "run", on_event=on_event)
    await asyncio.gather(*seconds)
    assert refused == ["RunStarted"] * 2 + ["StepDone"] * 2 * config.steps
    assert [row["step"] for row in RunLog(tmp_path / "run").read_metrics()] == list(range(config.steps))
    assert not (tmp_path / "run" / ".lock").exists()


async def test_a_run_without_its_checkpoint_is_not_begun_again(
    config: TrainConfig, model: Path, sandbox: str, whole: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole[0], tmp_path / "run"))
    RunLog(folder).write_config(config_to_dict(replace(config, checkpoint_every=3)))
    shutil.rmtree(folder / "checkpoint")
    with pytest.raises(DataError, match="4 steps on record and its checkpoint is gone"):
        await train(config, folder, resume=True)
    assert comparable(folder) == comparable(whole[0])


# ---------------------------------------------------------------- what cannot work


async def test_a_missing_model_folder_is_refused_before_anything_is_written(
    config: TrainConfig, sandbox: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="absent"):
        await train(tiny_config(tmp_path / "absent", sandbox), tmp_path / "run")
    assert not (tmp_path / "run").exists()


async def test_a_world_in_which_nothing_works_stops_the_run(model: Path, sandbox: str, tmp_path: Path) -> None:
    """Tests that leave no reward break every rollout; one such rollout would cost itself only."""
    broken = {"test.sh": SandboxFile(b"true\n")}
    for task in load_tasks("triage", split=Split.TRAIN, count=3, levels=(1,)):
        write_harbor_task(replace(task, tests=broken), tmp_path / "tasks" / task.id)
    source = {"tasks.source": str(tmp_path / "tasks")}
    config = tiny_config(model, sandbox, **source, **{"evaluation.tasks": 0})
    with pytest.raises(
        InfrastructureError, match=r"all 6 rollouts of step 0 failed, the first at score.*VerifierError"
    ):
        await train(config, tmp_path / "run")
    assert RunLog(tmp_path / "run").read_metrics() == []
    for task in load_tasks("triage", split=Split.HELD_OUT, count=2, levels=(1,)):
        write_harbor_task(replace(task, tests=broken), tmp_path / "tasks" / task.id)
    with pytest.raises(InfrastructureError, match="all 4 rollouts of the held-out measurement failed"):
        await train(tiny_config(model, sandbox, **source), tmp_path / "other")
    assert RunLog(tmp_path / "other").evaluation_steps() == []  # a resume measures anew


# ---------------------------------------------------------------- little room, little time


@pytest.fixture
def config_file(config: TrainConfig, tmp_path: Path) -> Path:
    changed = replace(config, steps=1, group_size=16, evaluation=replace(config.evaluation, tasks=0))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_to_dict(changed)))
    return path


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_few_open_files_mean_fewer_rollouts_at_once(config_file: Path, tmp_path: Path) -> None:
    """32 rollouts with 200 open files, of which 64 are the trainer's, and 8 a sandbox: at most 17 at once."""

    def limit() -> None:  # as `ulimit -n` would
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))

    command = [sys.executable, "-m", "backtalk.cli", "train", str(config_file), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, preexec_fn=limit)
    assert done.returncode == 0, done.stdout + done.stderr
    lowered = re.search(r"rollout\.concurrency=64 is lowered to (\d+),.*with \d+ open files left", done.stdout)
    assert lowered is not None and 1 <= int(lowered[1]) <= 17
    rollouts = [t for group in RunLog(tmp_path / "run").read_groups(0) for t in group]
    assert len(rollouts) == 32 and all(t.num_turns and t.failure is None for t in rollouts)


async def test_a_deadline_before_any_action_is_an_error(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, {"rollout.rollout_timeout_s": 0.001})
    with pytest.raises(InfrastructureError, match=r"raise rollout\.rollout_timeout_s") as error:
        await train(config, tmp_path / "run")
    assert "all 32 rollouts of step 0 ended at their deadline, before the policy sampled an action" in str(error.value)
    assert RunLog(tmp_path / "run").read_metrics() == []


def ended(reason: StopReason, *, acted: bool, where: str = "reset") -> Trajectory:
    action = Segment(TokenRole.ACTION, (5,), (-1.0,), turn=0)
    segments = (Segment(TokenRole.CONTEXT, (1,)), *([action] if acted else []))
    failure = Failure(where, "SandboxError", "it broke") if reason is StopReason.FAILED else None
    reward = None if reason in (StopReason.DEADLINE, StopReason.FAILED) else 0.0
    return Trajectory(
        task_id="t", sample_index=0, segments=segments, reward=reward, stop_reason=reason, failure=failure
    )


def test_which_rollouts_came_through() -> None:
    late, cut = ended(StopReason.DEADLINE, acted=False), ended(StopReason.DEADLINE, acted=True)
    failed, whole = ended(StopReason.FAILED, acted=True), ended(StopReason.MAX_TURNS, acted=True)

    def check(*rollouts: Trajectory, teach: bool = True) -> None:
        check_rollouts([TrajectoryGroup("t", rollouts)], "step 7", observations_teach=teach)

    check(late, failed, whole)
    check(late, failed, cut)  # what it was told teaches the world-model term
    check(whole, late, teach=False)
    check(replace(cut, reward=0.0), late, teach=False)  # rollout.deadline scored it
    with pytest.raises(InfrastructureError, match=r"2 of 3 rollouts of step 7 ended .* before the policy sampled"):
        check(late, failed, late)
    with pytest.raises(InfrastructureError, match="1 of 3 rollouts of step 7 failed, the first at reset with Sandbox"):
        check(late, failed, late)
    with pytest.raises(InfrastructureError, match=r"all 2 rollouts of step 7 ended .* world_model_coeff=0 learns noth"):
        check(cut, late, teach=False)
    with pytest.raises(InfrastructureError, match="all 1 rollouts of step 7 failed, the first at reset"):
        check(failed)


async def test_too_few_tasks_for_a_step_are_refused(model: Path, sandbox: str, tmp_path: Path) -> None:
    for task in load_tasks("triage", split=Split.TRAIN, count=1, levels=(1,)):
        write_harbor_task(task, tmp_path / "tasks" / task.id)
    config = tiny_config(model, sandbox, **{"tasks.source": str(tmp_path / "tasks"), "evaluation.tasks": 0})
    with pytest.raises(ConfigError, match="has 1 training tasks, fewer than tasks_per_step=2"):
        await train(config, tmp_path / "run")


async def test_recorded_tokens_of_another_tokenizer_are_refused(
    config: TrainConfig, model: Path, sandbox: str, tmp_path: Path
) -> None:
    foreign = Trajectory(task_id="a", sample_index=0, segments=(Segment(TokenRole.CONTEXT, (99_999,)),))
    write_trajectories(tmp_path / "foreign.parquet", [foreign])
    config = tiny_config(model, sandbox, **{"evaluation.recorded_path": str(tmp_path / "foreign.parquet")})
    with pytest.raises(ConfigError, match="holds token 99999"):
        await train(config, tmp_path / "run")


# ---------------------------------------------------------------- tasks of a step


def test_every_task_comes_once_an_epoch_and_never_twice_a_step() -> None:
    tasks = load_tasks("triage", split=Split.TRAIN, count=12, levels=(1,))
    epoch = [task.id for step in range(3) for task in tasks_of_step(tasks, 4, 0, step)]
    assert sorted(epoch) == sorted(task.id for task in tasks)
    following = [task.id for step in range(3, 6) for task in tasks_of_step(tasks, 4, 0, step)]
    assert sorted(following) == sorted(epoch) and following != epoch
    other_seed = [task.id for step in range(3) for task in tasks_of_step(tasks, 4, 1, step)]
    assert other_seed != epoch
    for step in range(10):  # five of twelve: the two that fill no step wait
        assert len({task.id for task in tasks_of_step(tasks, 5, 0, step)}) == 5
