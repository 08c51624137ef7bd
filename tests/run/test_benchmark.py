"""A policy on a dataset that others wrote, by the command that a user types."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from backtalk.cli.app import app
from backtalk.errors import ConfigError, TaskError
from backtalk.rollout.limits import RolloutLimits
from backtalk.run.benchmark import Benchmark, benchmark_tasks, pass_at_every_k, run_benchmark
from backtalk.run.config import config_from_dict
from backtalk.run.evaluate import Evaluation, TaskResult
from backtalk.run.history import fit_history
from backtalk.run.log import read_trajectories
from backtalk.run.worlds import open_worlds
from backtalk.sandboxes.machine import capacity
from sandbox_help import backend_or_skip
from tiny import tiny_model_dir

SMALL = ("rollout.max_turns=2", "rollout.max_tokens=900", "rollout.max_tokens_per_turn=12")


def task_result(solved: int, rollouts: int = 5, scored: int = 5) -> TaskResult:
    return TaskResult("t", rollouts, scored, solved, float(solved), 0.0, 0)


def test_every_attempt_counts() -> None:
    """Of 5 attempts 2 solved, and of 5 (one of which the world broke) 0: pass@1 = (2/5 + 0) / 2 = 0.2;
    pass@2 = ((1 - C(3,2)/C(5,2)) + 0) / 2 = (1 - 3/10) / 2 = 0.35; pass@5 = (1 + 0) / 2."""
    nothing: dict = dict.fromkeys(("pass_at_1", "pass_at_k", "reward", "env_ce_recorded", "env_ce_own"))
    evaluation = Evaluation(
        step=0,
        samples_per_task=5,
        per_rollout={},
        stop_reasons={},
        no_reward=1,
        seconds=0.0,
        tasks=(task_result(2), task_result(0, scored=4)),
        recorded=(),
        **nothing,
    )
    found = pass_at_every_k(evaluation)
    assert [round(found[k].value, 9) for k in (1, 2, 5)] == [0.2, 0.35, 0.5]


async def test_tasks_are_chosen_by_pattern_and_number() -> None:
    every = await benchmark_tasks(Benchmark(dataset="workbench"))
    some = await benchmark_tasks(Benchmark(dataset="workbench", names=("csv-*", "*ledger")))
    assert [task.id.split("/")[-1] for task in some] == ["csv-join", "sqlite-ledger"]
    assert await benchmark_tasks(Benchmark(dataset="workbench", count=2)) == every[:2]
    with pytest.raises(ConfigError, match="none of the"):
        await benchmark_tasks(Benchmark(dataset="workbench", names=("nothing-*",)))
    with pytest.raises(ConfigError, match="--environment docker"):
        await benchmark_tasks(Benchmark(dataset="terminal-bench@2.0"))


async def test_folders_that_install_or_cannot_be_read(tmp_path: Path) -> None:
    for name, line in {"installs": "RUN pip install pip", "bad": "USER nobody-made-it"}.items():
        for path, text in {
            "task.toml": "",
            "instruction.md": "Do it.\n",
            "environment/Dockerfile": f"FROM ubuntu\n{line}\n",
            "tests/test.sh": "echo 1 >/logs/verifier/reward.txt\n",
        }.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
    said: list[str] = []
    with pytest.raises(TaskError, match=r"pass --host-packages(.|\n)*--on-refuse skip"):
        await benchmark_tasks(Benchmark(dataset=str(tmp_path)))
    chosen = Benchmark(dataset=str(tmp_path), host_packages=True, on_refuse="skip")
    assert [task.id for task in await benchmark_tasks(chosen, said.append)] == ["installs"]
    assert len(said) == 2 and "'bad' is left out" in said[0] and said[1].startswith("1 of 2 task folders")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--host-packages",), "about the tasks of a --dataset"),
        (("--dataset", "workbench", "--model", "x", "--on-refuse", "perhaps"), "use stop or skip"),
    ],
)
def test_options_about_folders_are_of_a_dataset(options: tuple[str, ...], reason: str) -> None:
    result = CliRunner().invoke(app, ["evaluate", *options])
    assert result.exit_code != 0 and reason in str(result.exception)


async def test_as_many_rollouts_at_once_as_in_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both go by what a sandbox may use here: 9,282 MiB * 7/8 / (4 + 2,048/8) = 31; of 512 MiB it would be 119."""
    room = capacity.Resources(cores=64.0, memory_mb=9282.0, processes=100_000, open_files=100_000)
    monkeypatch.setattr(capacity, "available_resources", lambda: room)
    used: list[RolloutLimits] = []

    async def measure(*_: object, limits: RolloutLimits, **__: object) -> None:
        used.append(limits)
        raise EndsHere

    monkeypatch.setattr("backtalk.run.benchmark.evaluate", measure)
    config = config_from_dict(
        {
            "sandbox": "unsafe",
            "terminal": {"sandbox": {"memory_mb": 2048}},
            "engine": {"model": str(tiny_model_dir(tmp_path / "tiny"))},
        }
    )
    with pytest.raises(EndsHere):
        await run_benchmark(config, Benchmark(dataset="workbench", count=1))
    async with open_worlds(fit_history(config, lambda _: None)) as training:
        assert used == [training.fit_concurrency(lambda _: None)]
    assert used[0].concurrency == 31


class EndsHere(Exception):
    """Raised in place of a measurement."""


def test_the_command_plays_a_dataset_and_writes_what_it_saw(tmp_path: Path) -> None:
    backend_or_skip()
    model = tiny_model_dir(tmp_path / "tiny")
    files = {"--json": tmp_path / "out.json", "--trajectories": tmp_path / "out.parquet"}
    command = ["evaluate", "--model", str(model), "--dataset", "workbench", "--task", "csv-join", "--samples", "2"]
    command += [str(word) for option in files.items() for word in option]
    done = CliRunner().invoke(app, [*command, *(word for one in SMALL for word in ("--set", one))])
    assert done.exit_code == 0, done.output
    assert "pass@2" in done.output and "0 of 2 rollouts solved" in done.output
    result = json.loads((tmp_path / "out.json").read_text())
    assert sorted(result["pass_at"]) == ["1", "2"]
    attempts = read_trajectories(tmp_path / "out.parquet")
    assert [one.sample_index for one in attempts] == [0, 1]
    assert all(one.reward == 0.0 and one.failure is None for one in attempts)  # scored, by the tests of the task


def test_what_is_missing_is_named() -> None:
    for more, said in (((), "name a RUN"), (("--dataset", "x"), "--model NAME")):
        done = CliRunner().invoke(app, ["evaluate", *more])
        assert isinstance(done.exception, ConfigError) and said in str(done.exception)
