"""Evaluations of a study's runs in another world than the one they were trained in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from backtalk.errors import BacktalkError, ConfigError
from backtalk.evidence.compare import compare
from backtalk.evidence.elsewhere import Elsewhere, read_elsewhere
from backtalk.evidence.study import load_study

RUNS = {("grpo", 0): (Path("out/grpo_seed0"), 25), ("echo", 0): (Path("out/echo_seed0"), 25)}
SOLVED = {"grpo_seed0_before": 2, "grpo_seed0_after": 1, "echo_seed0_before": 2, "echo_seed0_after": 3}  # of 4


class Recorder:
    """Takes the commands of evaluations and writes their results, two tasks of four rollouts each."""

    def __init__(self) -> None:
        self.commands: list[Sequence[str]] = []

    async def __call__(self, command: Sequence[str], log_path: Path) -> None:
        self.commands.append(command)
        path = Path(command[command.index("--json") + 1])
        task = {"solved": SOLVED[path.stem], "scored": 4, "rollouts": 4, "reward_sum": float(SOLVED[path.stem])}
        task |= {"env_nats": 20.0, "env_tokens": 10, "invalid_calls": 0.0}
        path.write_text(json.dumps({"tasks": [task | {"task_id": name} for name in "ab"], "recorded": []}))


async def test_runs_are_compared_elsewhere_by_hand_and_not_evaluated_again(tmp_path: Path) -> None:
    place, recorder = Elsewhere(tmp_path / "harder", {"tasks.levels": [3, 4]}), Recorder()
    found = await place.evaluate(RUNS, recorder)
    assert [command[:2] for command in recorder.commands] == [
        ["evaluate", f"out/{arm}_seed0"] for arm in ("grpo", "grpo", "echo", "echo")
    ]
    assert ["--base" in command for command in recorder.commands] == [True, False, True, False]
    assert all(command[-2:] == ["--set", "tasks.levels=[3, 4]"] for command in recorder.commands)
    results = {r.arm: r for r in compare("harder", ("grpo", "echo"), (0,), found).results if r.metric == "pass@1"}
    grpo, echo = results["grpo"], results["echo"]
    assert grpo.change and grpo.change.value == -0.25  # 2 of 4 to 1 of 4
    assert echo.change and echo.change.value == 0.25
    assert echo.against_first and echo.against_first.value == 0.5

    assert await place.evaluate(RUNS, recorder) == found and len(recorder.commands) == 4
    with pytest.raises(ConfigError, match="holds evaluations under other settings; give this place another name"):
        await Elsewhere(tmp_path / "harder", {"tasks.levels": [4]}).evaluate(RUNS, recorder)


async def test_an_evaluation_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    async def fails(command: Sequence[str], log_path: Path) -> None:
        log_path.write_text("no such model")

    with pytest.raises(BacktalkError, match=r"(?s)grpo_seed0_before, grpo_seed0_after could not.*no such model"):
        await Elsewhere(tmp_path / "harder", {"seed": 1}).evaluate(dict(list(RUNS.items())[:1]), fails)


@pytest.mark.parametrize("places", [["a"], {"a": {}}, {"a": 3}, {"a/b": {"seed": 1}}])
def test_what_is_no_place_is_refused(places: Any) -> None:
    with pytest.raises(ConfigError, match="give names with the settings of an evaluation"):
        read_elsewhere(places, "study.yaml")


def test_a_setting_that_no_run_has_is_told_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("arms: [grpo]\nelsewhere: {harder: {tasks.lvels: [3]}}\n")
    with pytest.raises(ConfigError, match=r"did you mean 'tasks\.levels'"):
        load_study(tmp_path / "study.yaml")
    (tmp_path / "study.yaml").write_text("arms: [grpo]\nelsewhere: {harder: {tasks: {levels: [3]}}}\n")
    assert load_study(tmp_path / "study.yaml").elsewhere == {"harder": {"tasks.levels": [3]}}
