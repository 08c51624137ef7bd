"""Metrics at a dashboard, read back with the dashboard's own reader where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from backtalk.errors import ConfigError
from backtalk.run.estimates import Interval
from backtalk.run.evaluate import Evaluation
from backtalk.run.events import EvaluationDone, Notice, StepDone
from backtalk.run.track import _forward, tracking

EVALUATION = Evaluation(
    step=4,
    samples_per_task=2,
    pass_at_1=Interval(0.25),
    pass_at_k=Interval(0.5),
    reward=None,
    env_ce_recorded=Interval(1.5),
    env_ce_own=None,
    per_rollout={},
    stop_reasons={},
    no_reward=0,
    seconds=1.0,
    tasks=(),
    recorded=(),
)


def test_steps_are_counted_by_updates_and_gaps_are_left_out() -> None:
    seen: list[tuple[int, dict[str, float]]] = []
    for event in (
        StepDone(3, 10, {"reward": 0.5, "warning_ce": float("nan")}),
        EvaluationDone(EVALUATION),
        Notice("nothing to draw"),
    ):
        _forward(event, lambda step, metrics: seen.append((step, dict(metrics))))
    assert seen == [
        (4, {"train/reward": 0.5}),
        (4, {"held_out/pass_at_1": 0.25, "held_out/pass_at_k": 0.5, "held_out/env_ce_recorded": 1.5}),
    ]


def test_an_unknown_dashboard_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trackio, wandb, tensorboard"), tracking("tensorbord", tmp_path, {}):
        pass


@pytest.mark.parametrize(("name", "extra"), [("trackio", "track"), ("wandb", "wandb")])
def test_a_package_that_is_not_installed_is_named(
    name: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # what Python does for a module that cannot be found
    with pytest.raises(ConfigError, match=rf"backtalk\[{extra}\]"), tracking(name, tmp_path, {}):
        pass


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tracking("tensorboard", tmp_path, {}) as tell:
        tell(StepDone(0, 2, {"reward": 0.25}))
        tell(StepDone(1, 2, {"reward": 0.75}))
        tell(EvaluationDone(EVALUATION))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/reward")] == [(1, 0.25), (2, 0.75)]
    assert [(e.step, e.value) for e in events.Scalars("held_out/pass_at_1")] == [(4, 0.25)]
