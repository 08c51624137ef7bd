"""Studies: the comparison by hand, and two arms trained for real by the command line."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from backtalk.errors import BacktalkError, ConfigError, SandboxUnavailable
from backtalk.evidence.compare import compare, trapezoid_weights
from backtalk.evidence.study import (
    StudyDone,
    StudyEvent,
    StudyProgress,
    StudyRunDone,
    StudyStarted,
    _process,
    load_study,
    plan,
    run_study,
)
from backtalk.objective.coefficient import Share
from backtalk.run.config import config_to_dict
from backtalk.run.estimates import Interval
from backtalk.run.log import RunLog, lock_folder
from backtalk.sandboxes import local_sandbox
from backtalk.sandboxes.machine.capacity import SHARED_BY
from backtalk.viewer.report.study import write_study_report
from taught import taught_model_dir

HERE = Path(__file__).parents[1]
KILLS = int(os.environ.get("STUDY_KILLS", "1"))

# ---------------------------------------------------------------- the comparison


def evaluation(solved: list[int], recorded: list[float]) -> dict[str, Any]:
    """Of tasks with 4 rollouts, an invalid call in each that was not solved; recorded ones of 10 tokens, in nats."""
    tasks = [
        {"task_id": str(i), "solved": n, "scored": 4, "rollouts": 4, "reward_sum": float(n), "invalid_calls": 4.0 - n}
        | {"env_nats": 20.0, "env_tokens": 10}
        for i, n in enumerate(solved)
    ]
    known = [{"task_id": str(i), "env_nats": nats, "env_tokens": 10} for i, nats in enumerate(recorded)]
    return {"tasks": tasks, "recorded": known}


def test_arms_of_one_seed_are_compared_task_by_task() -> None:
    before = evaluation([0, 1, 2, 1], [20.0, 40.0])
    runs = {
        ("grpo", 0): {0: before, 8: evaluation([1, 2, 3, 2], [20.0, 40.0])},
        ("echo", 0): {0: before, 8: evaluation([2, 3, 4, 3], [10.0, 20.0])},
    }
    comparison = compare("demo", ("grpo", "echo"), (0,), runs)
    results = {(r.arm, r.metric): r for r in comparison.results}
    echo = results["echo", "pass@1"]
    assert echo.before and echo.after and echo.change and echo.against_first
    assert (echo.before.value, echo.after.value) == (0.25, 0.75)
    # every task gained the same, so nothing is uncertain about the difference
    assert (echo.change.value, echo.change.low, echo.change.high) == (0.5, 0.5, 0.5)
    assert (echo.against_first.value, echo.against_first.low) == (0.25, 0.25)
    ce = results["echo", "env CE, recorded"]
    assert ce.change and ce.change.value == -1.5  # (10 + 20) / 20 - (20 + 40) / 20
    calls = results["echo", "invalid calls"]
    assert calls.before and calls.after and (calls.before.value, calls.after.value) == (0.75, 0.25)  # a rollout
    assert results["grpo", "pass@1"].against_first is None
    assert comparison.interval == "tasks"


def test_arms_of_many_seeds_are_compared_seed_by_seed_and_task_by_task() -> None:
    runs = {}
    for seed, gain in enumerate((1, 2, 3)):
        before = evaluation([0, 0], [20.0])
        runs["grpo", seed] = {0: before, 4: evaluation([0, 1], [20.0])}
        runs["echo", seed] = {0: before, 4: evaluation([gain, gain + 1], [10.0])}
    comparison = compare("demo", ("grpo", "echo"), (0, 1, 2), runs)
    against = next(r for r in comparison.results if (r.arm, r.metric) == ("echo", "pass@1")).against_first
    # In pairs the tasks do not differ; all three draws are of seed 0 with probability 1/27, more than 2.5 %.
    assert against == Interval(0.5, 0.25, 0.75)
    assert comparison.interval == "seeds and tasks"


def test_whole_curves_are_compared_not_their_ends_alone() -> None:
    first = {0: evaluation([0], [40.0]), 10: evaluation([1], [40.0]), 40: evaluation([2], [40.0])}
    other = {0: evaluation([0], [40.0]), 10: evaluation([3], [20.0]), 40: evaluation([2], [10.0])}
    short = {0: evaluation([0], [40.0]), 20: evaluation([4], [40.0])}
    runs = {("grpo", 0): first, ("echo", 0): other, ("short", 0): short}
    comparison = compare("demo", ("grpo", "echo", "short"), (0,), runs)
    curves = {
        arm: [(p.step, p.interval.value) for p in comparison.curves if (p.arm, p.metric) == (arm, "pass@1")]
        for arm in ("grpo", "echo", "short")
    }
    assert curves == {
        "grpo": [(0, 0.0), (10, 0.25), (40, 0.5)],
        "echo": [(0, 0.0), (10, 0.75), (40, 0.5)],
        "short": [(0, 0.0), (20, 1.0)],
    }
    results = {r.arm: r for r in comparison.results if r.metric == "pass@1"}
    echo = results["echo"]
    assert echo.against_first and echo.against_first.value == 0.0  # at the end they are the same
    # Areas: (0 + 0.75) / 2 * 10 + (0.75 + 0.5) / 2 * 30 = 22.5 of 40 steps; grpo 1.25 + 11.25 = 12.5.
    assert echo.over_run and echo.over_run.value == pytest.approx(22.5 / 40)
    assert echo.over_run_against_first and echo.over_run_against_first.value == pytest.approx(10 / 40)
    assert results["short"].against_first == Interval(0.5) and results["short"].over_run_against_first is None
    assert trapezoid_weights([5]) == [1.0]
    pair = next(pair for pair in comparison.pairs if pair.metric == "pass@1")
    assert (pair.arm, pair.minus, pair.after, pair.over_run) == ("short", "echo", Interval(0.5), None)
    runs["other", 0] = first
    pair = next(p for p in compare("demo", ("short", "echo", "other"), (0,), runs).pairs if p.metric == "pass@1")
    assert (pair.arm, pair.minus) == ("other", "echo")
    assert pair.after and pair.after.value == 0.0
    assert pair.over_run and pair.over_run.value == pytest.approx(-10 / 40)


def test_evaluations_without_invalid_calls_have_none() -> None:
    old = evaluation([1], [40.0])
    del old["tasks"][0]["invalid_calls"]
    comparison = compare("demo", ("grpo",), (0,), {("grpo", 0): {0: old, 4: old}})
    assert next(r for r in comparison.results if r.metric == "invalid calls").after is None


# ---------------------------------------------------------------- the file


def test_the_demo_is_three_arms_that_differ_in_the_world_term_alone() -> None:
    study = load_study("demo")
    assert list(study.arms) == ["grpo", "echo", "shuffled"]
    grpo, echo, shuffled = (study.config(arm, 0) for arm in study.arms)
    assert grpo.objective.world_model_coeff == 0.0
    assert isinstance(echo.objective.world_model_coeff, Share) and echo.objective.world.observations == "own"
    engine = (
        grpo.engine
    )  # the others' differs in how often gradients are measured, which changes nothing without a share
    assert replace(echo.engine, measure_gradients_every=None) == engine
    assert replace(echo, objective=replace(echo.objective, world_model_coeff=0.0), engine=engine) == grpo
    world = replace(shuffled.objective.world, observations="own")
    assert replace(shuffled, objective=replace(shuffled.objective, world=world)) == echo
    assert load_study("demo", seeds=[3, 4], overrides=["steps=2"]).config("echo", 4).steps == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("arms: {a: {}}\nseed: 3\n", r"unknown keys \['seed'\]"),
        ("base: triage\nsteps: 3\n", r"is a run, not a study; start it with: backtalk train"),
        ("base: triage\n", "needs arms"),
        ("arms: [1, 2]\n", "needs arms"),
        ("arms: [grpo, grpo]\n", r"\['grpo'\] twice"),
        ("arms: [grpo, shufled]\n", "did you mean 'shuffled'"),
        ("arms: {plain:}\n", "arm 'plain' is 'plain', which is no built-in arm; use one of grpo, echo"),
        ("arms: {a: {arm: 3}}\n", "arm 'a' is 3"),
        ("arms: {a: {}}\nseeds: []\n", "0 seeds"),
        ("arms: {a: {}}\nseeds: [1, 1]\n", "a seed twice"),
        ("arms: {a: {stpes: 3}}\n", "did you mean 'steps'"),
        ("base: demo\narms: {a: {}}\n", "is a study, not a run"),
        ("arms: {a: {sweep: {steps: 3}}}\n", r"arm 'a' sweeps \{'steps': 3\}"),
        ("arms: {a: {sweep: {steps: [3, 3]}}}\n", r"\['a_3'\] twice"),
    ],
)
def test_a_wrong_study_is_told_before_anything_runs(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_study(tmp_path / "study.yaml")


def test_arms_by_name_are_the_settings_of_the_study_but_for_one_thing(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(
        "settings: {objective.world_model_coeff: 0.03}\n"
        "arms: {grpo: , mine: echo, control: shuffled, world: env_only, paw: paw,\n"
        "  strong: {arm: shuffled, objective.world_model_coeff: 0.5}, own: {steps: 7}}\n"
    )
    study = load_study(tmp_path / "study.yaml")
    arms = {name: study.config(name, 3) for name in study.arms}
    echo = arms["mine"]
    assert (echo.objective.world_model_coeff, echo.objective.policy_coeff, echo.seed) == (0.03, 1.0, 3)
    assert arms["grpo"] == replace(echo, objective=replace(echo.objective, world_model_coeff=0.0))
    assert arms["world"] == replace(echo, objective=replace(echo.objective, policy_coeff=0.0))
    shuffled = replace(echo.objective, world=replace(echo.objective.world, observations="shuffled"))
    assert arms["control"] == replace(echo, objective=shuffled)
    assert arms["strong"] == replace(echo, objective=replace(shuffled, world_model_coeff=0.5))
    assert arms["paw"].objective.world.loss == "clipped_mae"
    assert arms["own"] == replace(echo, steps=7)


def test_arms_may_be_a_list_of_names(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("arms: [grpo, echo, shuffled]\n")
    study = load_study(tmp_path / "study.yaml")
    assert list(study.arms) == ["grpo", "echo", "shuffled"] and study.arms["echo"] == {}


def test_a_sweep_is_an_arm_for_each_value(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(
        "arms:\n  grpo:\n  echo: {sweep: {objective.world_model_coeff: [0.01, {share: 0.2}]}}\n"
        "  fake: {arm: shuffled, steps: 7, sweep: {objective.world_model_coeff: [0.01], tasks.levels: [[1], [1, 2]]}}\n"
    )
    study = load_study(tmp_path / "study.yaml")
    assert list(study.arms) == ["grpo", "echo_0.01", "echo_share0.2", "fake_0.01_1", "fake_0.01_1-2"]
    configs = {arm: study.config(arm, 0) for arm in study.arms}
    assert configs["echo_0.01"].objective.world_model_coeff == 0.01
    assert configs["echo_share0.2"].objective.world_model_coeff == Share(0.2)
    fake = configs["fake_0.01_1"]
    assert (fake.steps, fake.tasks.levels, fake.objective.world.observations) == (7, (1,), "shuffled")


def test_other_arms_and_seeds_of_a_folder_stay_in_the_study(tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text("seeds: [4]\nsettings: {steps: 3}\narms: [grpo, matched]\n")
    (tmp_path / "later.yaml").write_text("seeds: [0, 2]\nsettings: {steps: 3}\narms: [grpo, action_masked]\n")
    first, later = load_study(tmp_path / "first.yaml"), load_study(tmp_path / "later.yaml")
    for arm in first.arms:
        RunLog(tmp_path / "out" / f"{arm}_seed4").write_config(config_to_dict(first.config(arm, 4)))
    arms, seeds, configs = plan(later, tmp_path / "out")
    assert (arms, seeds) == (("grpo", "action_masked", "matched"), (0, 2, 4))
    assert list(configs) == [(arm, seed) for seed in seeds for arm in arms]
    assert configs["matched", 2] == first.config("matched", 2) and configs["grpo", 4] == first.config("grpo", 4)
    assert configs["action_masked", 4].objective.world.observations == "action_masked"
    assert configs["matched", 0].objective.world_model_coeff == Share(0.5)


# ---------------------------------------------------------------- a whole study


def write_study(folder: Path, *, model: Path, one_arm: bool = False, **changes: Any) -> Path:
    try:
        local_sandbox("auto")
        sandbox = "auto"
    except SandboxUnavailable:
        sandbox = "unsafe"
    settings = {
        "steps": 2,
        "tasks_per_step": 1,
        "group_size": 2,
        "sandbox": sandbox,
        "tasks": {"levels": [1]},
        "evaluation": {"tasks": 2, "samples_per_task": 1, "every": 1},
        "rollout": {"max_turns": 2, "max_tokens": 400, "max_tokens_per_turn": 12},
        "engine": {"model": str(model), "device": "cpu"},
    }
    arms = {"grpo": {"objective.world_model_coeff": 0}, "echo": {"objective.world_model_coeff": 0.1}}
    if one_arm:
        del arms["echo"]
    study = {"name": "tiny", "seeds": [0], "settings": {**settings, **changes}, "arms": arms}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return taught_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent / "src"))  # for the runs, which are processes of their own


@pytest.mark.slow
async def test_two_arms_are_trained_compared_and_not_trained_again(model: Path, tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path, model=model))
    events: list[StudyEvent] = []
    comparison = await run_study(study, tmp_path / "out", parallel=2, on_event=events.append)

    assert [type(e) for e in events if not isinstance(e, StudyProgress)] == [
        StudyStarted,
        StudyRunDone,
        StudyRunDone,
        StudyDone,
    ]
    assert {e.run for e in events if isinstance(e, StudyProgress)} == {"grpo_seed0", "echo_seed0"}
    assert RunLog(tmp_path / "out" / "echo_seed0").evaluation_steps() == [0, 1, 2]
    assert json.loads((tmp_path / "out" / "study.json").read_text()) == json.loads(json.dumps(comparison.to_dict()))
    assert {(row.unit, row.amount) for row in comparison.equal if row.unit == "rollouts"} == {("rollouts", 4)}
    assert {row.ended for row in comparison.reached if row.unit == "steps"} == {(2,)}
    assert {score.arm for score in comparison.scores} == {"grpo", "echo"}
    assert comparison.curves[0].spent and comparison.curves[0].spent["tokens"] == 0
    first = [r for r in comparison.results if r.metric == "env CE, own"]
    assert first[0].before == first[1].before  # one model and one seed, so one beginning

    assert {point.step for point in comparison.curves} == {0, 1, 2}
    page = write_study_report(tmp_path / "out").read_text()
    assert page.startswith("<!doctype html>") and '"/static/' not in page
    assert (tmp_path / "out" / "study.png").read_bytes().startswith(b"\x89PNG")

    events.clear()
    assert await run_study(study, tmp_path / "out", on_event=events.append) == comparison
    assert isinstance(events[0], StudyStarted) and len(events[0].finished) == 2
    assert [type(e) for e in events] == [StudyStarted, StudyDone]
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        await run_study(load_study(tmp_path / "tiny.yaml", overrides=["steps=3"]), tmp_path / "out")

    harder = tmp_path / "out" / "elsewhere" / "harder"
    harder.mkdir(parents=True)
    known = json.dumps(RunLog(tmp_path / "out" / "grpo_seed0").read_evaluation(0))
    for name in ("grpo_seed0_before", "grpo_seed0_after", "echo_seed0_before"):  # all but one are there already
        (harder / f"{name}.json").write_text(known)
    settings = {"tasks.levels": [2], "evaluation.tasks": 1}
    elsewhere = (await run_study(replace(study, elsewhere={"harder": settings}), tmp_path / "out")).elsewhere
    found = json.loads((harder / "echo_seed0_after.json").read_text())
    assert found["step"] == 2 and len(found["tasks"]) == 1 and found["tasks"] != json.loads(known)["tasks"]
    after = {r.arm: r.after for r in elsewhere["harder"] if r.metric == "env CE, own"}
    assert after["echo"] != after["grpo"] == first[0].before
    assert json.loads((tmp_path / "out" / "study.json").read_text())["elsewhere"].keys() == {"harder"}


async def test_a_run_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path, model=tmp_path / "absent", one_arm=True))
    with pytest.raises(BacktalkError, match=r"(?s)grpo_seed0 did not finish.*absent.*Start the study"):
        await run_study(study, tmp_path / "out")


async def test_a_study_that_runs_is_not_begun_a_second_time(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path, model=tmp_path / "absent"))
    with lock_folder(tmp_path / "out"), pytest.raises(ConfigError, match="out is being written by process"):
        await run_study(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
async def test_a_cancelled_study_stops_its_runs_and_can_go_on(model: Path, tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path, model=model, one_arm=True, steps=5))

    def on_event(event: StudyEvent) -> None:
        if isinstance(event, StudyProgress):
            running.cancel()

    running = asyncio.ensure_future(run_study(study, tmp_path / "out", parallel=1, on_event=on_event))
    with pytest.raises(asyncio.CancelledError):
        await running
    log = RunLog(tmp_path / "out" / "grpo_seed0")
    assert log.checkpoint_path.is_dir() and 0 <= log.last_step() < 4
    comparison = await run_study(study, tmp_path / "out")
    assert len(comparison.results) == 5
    assert [row["step"] for row in log.read_metrics()] == list(range(5))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends orphans on Linux only")
async def test_a_killed_study_ends_its_runs_and_goes_on_to_the_same_results(model: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, model=model, one_arm=True, steps=3 + KILLS, checkpoint_every=1)
    for number in range(KILLS):
        kill_midway(path, tmp_path / "out", Random(number))
    resumed = await run_study(load_study(path), tmp_path / "out")
    unbroken = await run_study(load_study(path), tmp_path / "unbroken")
    for name in ("results", "scores"):
        assert getattr(resumed, name) == getattr(unbroken, name)
    assert [(p.metric, p.step, p.interval) for p in resumed.curves] == [
        (p.metric, p.step, p.interval) for p in unbroken.curves
    ]


def kill_midway(path: Path, out: Path, draw: Random) -> None:
    """Start a study, kill it at a random moment after it began to train, and wait for its runs to end."""
    command = [sys.executable, "-m", "backtalk.cli", "study", str(path), "--out", str(out)]
    before = len(read_lines(out))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: len(read_lines(out)) > before or process.poll() is not None, 180)
        runs = children(process.pid) if process.poll() is None else []
        time.sleep(draw.uniform(0, 0.5))
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not any(map(is_alive, runs)), 60)


def read_lines(out: Path) -> list[str]:
    return [line for path in out.glob("*/metrics.jsonl") for line in path.read_text().splitlines()]


def wait_until(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listed.split()]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


async def test_runs_side_by_side_are_told_how_many_share_the_machine(tmp_path: Path) -> None:
    command = [sys.executable, "-c", f"import os; print(os.environ[{SHARED_BY!r}])"]
    for parallel in (2, 1):
        async with _process(command, tmp_path / "log", parallel) as process:
            await process.wait()
    assert (tmp_path / "log").read_text() == "2\n1\n"
