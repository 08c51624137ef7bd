"""Warnings from the metrics of a run, and what they do to the coefficient."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from backtalk.errors import ConfigError
from backtalk.objective.coefficient import Schedule, Share
from backtalk.objective.config import ObjectiveConfig, OnTrouble, WorldOptions
from backtalk.run.config import TrainConfig
from backtalk.run.guard import Guard

GOOD = {
    "sequences": 8.0, "target_tokens": 90.0, "world_grad_share": 0.4, "effective_obs_weight": 0.1,
    "world_model_coeff": 0.3, "entropy": 1.0, "invalid_calls": 0.1, "role_confusion": 0.0,
}  # fmt: skip


def guard(on_trouble: OnTrouble = "warn") -> Guard:
    return Guard(ObjectiveConfig(world=WorldOptions(on_trouble=on_trouble)))


def read_all(guard: Guard, rows: list[dict[str, Any]], first: int = 0) -> list[list[str]]:
    """Return the metrics that each row's warnings begin with."""
    return [[line.partition("=")[0] for line in guard.read(first + i, GOOD | row)] for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("change", "begins", "says"),
    [
        ({"target_tokens": 0.0}, "target_tokens=0", "world_loss_target='env_only'"),
        ({"world_grad_share": 0.77}, "world_grad_share=0.77", "lower objective.world_model_coeff (now 0.3)"),
        ({"effective_obs_weight": 1.5}, "effective_obs_weight=1.5", "token_mean"),
    ],
)
def test_a_metric_beyond_a_fixed_bound_is_one_sentence(change: dict[str, float], begins: str, says: str) -> None:
    watching = guard()
    assert watching.read(0, GOOD) == []
    (line,) = watching.read(1, GOOD | change)
    assert line.startswith(f"{begins}:") and says in line
    assert watching.alarms == {*change}


@pytest.mark.parametrize(
    ("name", "fine", "bad", "says"),
    [  # the start is 1.0, 0.1 and 0.0; bounds 1.5 * 1 + 0.1, 0.2 * 1, 2 * 0.1 + 0.15 and 0.02
        ("entropy", 1.59, 1.61, "random"),
        ("entropy", 0.21, 0.19, "one and the same"),
        ("invalid_calls", 0.349, 0.351, "forgets how to call"),
        ("role_confusion", 0.019, 0.021, "begins to write observations itself"),
    ],
)
def test_five_steps_are_compared_with_the_first_five(name: str, fine: float, bad: float, says: str) -> None:
    still, moved = guard(), guard()
    for step in range(15):
        assert still.read(step, GOOD | ({name: fine} if step >= 5 else {})) == []
    lines = [moved.read(step, GOOD | ({name: bad} if step >= 5 else {})) for step in range(15)]
    assert lines[:9] == [[]] * 9 and lines[10:] == [[]] * 5  # told once, when all of the last five are beyond the bound
    ((line,),) = lines[9:10]
    start = GOOD[name]
    assert line.startswith(f"{name}={bad:.3g} over the last 5 steps, {start:.3g} over the first 5: ") and says in line
    assert line.endswith("lower objective.world_model_coeff (now 0.3) or the learning rate")


def test_a_great_change_is_seen_at_once() -> None:
    """Invalid calls of 0.1, 0.1, 0.1, 0.1 and 1.5 are 0.38 on average, above 0.35."""
    assert read_all(guard(), [{}] * 5 + [{"invalid_calls": 1.5}]) == [[]] * 5 + [["invalid_calls"]]


def test_an_alarm_is_told_when_it_begins_and_again_after_it_was_silent() -> None:
    bad, unknown = {"target_tokens": 0.0}, {"target_tokens": math.nan}
    told = read_all(guard(), [bad, bad, unknown, bad, {}, unknown, bad])
    assert told == [["target_tokens"], [], [], [], [], [], ["target_tokens"]]


def test_the_guard_is_silent_where_nothing_is_known() -> None:
    watching = guard("off")
    for step in range(8):
        assert watching.read(step, {}) == watching.read(step, dict.fromkeys(GOOD, math.nan)) == []
        assert watching.read(step, dict.fromkeys(GOOD)) == []
    no_term = GOOD | {"target_tokens": 0.0, "world_model_coeff": 0.0}
    assert watching.read(8, no_term) == watching.read(9, GOOD | {"target_tokens": 0.0, "sequences": 0.0}) == []
    assert watching.factor == 1.0


def test_halving_waits_five_steps_for_what_the_last_one_did() -> None:
    bad = {"world_grad_share": 0.8}
    watching, factors = guard("halve"), []
    for step in range(13):
        lines = watching.read(step, GOOD | ({} if step in (7, 8) else bad))
        factors.append(watching.factor)
        if step == 2:  # told at step 0 that it is high, and that the coefficient is halved
            assert lines == []
        if step == 5:
            (line,) = lines
            assert line.startswith("world_model_coeff=0.3: halved from step 6 on, because of world_grad_share ")
    assert factors == [0.5] * 5 + [0.25] * 5 + [0.125] * 3


def test_a_share_that_was_not_measured_halves_nothing() -> None:
    rows = [{"world_grad_share": 0.8}] + [{"world_grad_share": math.nan}] * 9 + [{"world_grad_share": 0.8}]
    watching = guard("halve")
    assert read_all(watching, rows[:10])[1:] == [[]] * 9 and watching.factor == 0.5
    assert read_all(watching, rows[10:], first=10) == [["world_model_coeff"]] and watching.factor == 0.25


def test_a_step_without_a_policy_gradient_says_nothing_of_the_share() -> None:
    alone = {"world_grad_share": 1.0, "policy_grad_norm_weights": 0.0}
    assert read_all(guard("off"), [alone, alone | {"policy_grad_norm_weights": 0.01}])[0] == []


def test_off_is_for_good_and_warnings_go_on() -> None:
    watching = guard("off")
    told = read_all(watching, [{}] * 4 + [{"world_grad_share": 0.8}])
    assert told == [[]] * 4 + [["world_grad_share", "world_model_coeff"]] and watching.factor == 0.0
    told = read_all(watching, [{"world_model_coeff": 0.0, "world_grad_share": 0.0, "invalid_calls": 2.0}] * 2, first=5)
    assert told == [["invalid_calls"], []] and watching.factor == 0.0


def test_what_a_lower_coefficient_does_not_answer_lowers_nothing() -> None:
    watching = guard("halve")
    read_all(watching, [{"target_tokens": 0.0, "effective_obs_weight": 2.0}] * 3)
    assert watching.alarms == {"target_tokens", "effective_obs_weight"} and watching.factor == 1.0


def test_reading_the_record_again_gives_the_same_state() -> None:
    rows = [
        GOOD | {"invalid_calls": 0.1 + step / 7, "world_grad_share": 0.3 + step / 40, "entropy": math.inf}
        for step in range(20)
    ]
    watching = guard("halve")
    lines = [watching.read(step, row) for step, row in enumerate(rows)]
    again = guard("halve")
    for step, row in enumerate(rows[:12]):
        recorded = {name: value if math.isfinite(value) else None for name, value in row.items()}
        again.read(step, json.loads(json.dumps(recorded)))
    assert [again.read(step, row) for step, row in enumerate(rows[12:], 12)] == lines[12:]
    assert (again.factor, again.alarms) == (watching.factor, watching.alarms) and watching.factor < 1


def test_the_factor_is_on_a_number_a_schedule_or_a_share() -> None:
    number = ObjectiveConfig(world_model_coeff=0.2)
    assert number.times(1.0) == number
    assert number.times(0.25).world_coeff == 0.05
    schedule = Schedule({0: 0.2, 10: 0.0})
    assert ObjectiveConfig(world_model_coeff=schedule).times(0.5).at(5).world_coeff == 0.05
    share = ObjectiveConfig(world_model_coeff=Share(0.2, min=0.01, max=0.5, initial=0.04))
    assert share.times(0.5).world_model_coeff == Share(0.1, min=0.005, max=0.5, initial=0.02)
    assert ObjectiveConfig(world_model_coeff=Share(schedule)).times(0.5).world_model_coeff == Share(
        Schedule({0: 0.1, 10: 0.0}), initial=0.025
    )
    for config in (number, share, ObjectiveConfig(world_model_coeff=schedule)):
        assert not config.times(0.0).has_world_term(3)


@pytest.mark.parametrize("on_trouble", ["halve", "off"])
def test_a_term_that_is_alone_is_not_switched_off(on_trouble: OnTrouble) -> None:
    objective = ObjectiveConfig(policy_coeff=0.0, world=WorldOptions(on_trouble=on_trouble))
    with pytest.raises(ConfigError, match=rf"policy_coeff=0 with objective.world.on_trouble='{on_trouble}': .*'warn'"):
        TrainConfig(objective=objective)
