"""Coefficients in other libraries: the table of the documentation, and what is written for prime-rl and verl."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from backtalk.errors import ConfigError, DataError
from backtalk.exchange.write.pressure import Divisor, Reduction, Row, pressure, rows_of
from backtalk.exchange.write.trainers import to_prime_rl, to_verl, translate_coefficient, verl_settings
from backtalk.objective.advantages import group_advantages
from backtalk.objective.coefficient import Schedule, Share
from backtalk.objective.config import ObjectiveConfig, PolicyOptions, WorldOptions
from backtalk.trajectory import Segment, TokenRole, Trajectory

CONTEXT, TEMPLATE, ACTION, ENV, WARNING = TokenRole
PAGE = (Path(__file__).parents[2] / "docs/coefficients.md").read_text()
TOY = [Row(8, 10, 10), Row(4, 5, 2), Row(10, 0, 0), Row(4, 18, 18)]
OURS = Reduction(policy="sequence_mean", world="sequence_mean")


def rollout(row: Row, index: int, reward: float | None = None, task: str = "t") -> Trajectory:
    warnings = row.observations - row.targets
    observed = (Segment(WARNING, (7,) * warnings, turn=0), Segment(ENV, (8,) * row.targets, turn=0))
    return Trajectory(
        task_id=task,
        sample_index=index,
        segments=(
            Segment(CONTEXT, (1, 2)),
            Segment(TEMPLATE, (3,)),
            Segment(ACTION, (5,) * row.actions, (-0.5,) * row.actions, turn=0),
            Segment(TEMPLATE, (4,), turn=0),
            *(segment for segment in observed if len(segment)),
        ),
        messages=({"role": "user"}, {"role": "assistant"}, {"role": "tool"}),
        reward=reward,
    )


STEP = [rollout(row, index) for index, row in enumerate(TOY)]


def test_pressures_worked_out_by_hand() -> None:
    assert pressure(TOY, OURS) == pytest.approx((10 / 10 + 2 / 5 + 0 + 18 / 18) / 4)
    assert pressure(TOY, Reduction(policy="token_mean", world="action_tokens")) == pytest.approx(30 / 26)
    assert rows_of(STEP, "env_only", "grpo") == TOY
    # Advantages of 2 on 8 of 26 tokens and 0 on the others: the policy term weighs 16 / 26.
    uneven = [replace(row, advantage=2.0 if n == 0 else 0.0) for n, row in enumerate(TOY)]
    assert pressure(uneven, Reduction(policy="token_mean", world="token_mean")) == pytest.approx(26 / 16)


def test_the_table_of_the_documentation() -> None:
    lines = re.findall(r"^\| .* \| (\w+) \| (\w+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert len(lines) == 8
    divisors: Any = get_args(Divisor)
    for policy, world, shown, equal in lines:
        assert {policy, world} <= set(divisors)
        found = pressure(TOY, Reduction(policy=policy, world=world), max_seq_len=26)
        assert (f"{found:.4f}", f"{0.05 * pressure(TOY, OURS) / found:.4f}") == (shown, equal)


@pytest.mark.parametrize("policy", ["sequence_mean", "token_mean", "fixed_length"])
@pytest.mark.parametrize("world", ["sequence_mean", "sequence_mean_selected", "token_mean", "fixed_length"])
@pytest.mark.parametrize("target", ["env_only", "warning_plus_env", "full_observation"])
def test_our_pressure_is_that_of_the_weights_in_the_objective(policy: Any, world: Any, target: Any) -> None:
    import torch

    from backtalk.objective.batch import TokenCounts, collate
    from backtalk.objective.loss import policy_weights, world_weights
    from backtalk.objective.samples import build_samples
    from backtalk.trajectory import TrajectoryGroup

    rewards = (1.0, 0.0, 0.5, 0.0)
    rollouts = [rollout(row, n, reward) for n, (row, reward) in enumerate(zip(TOY, rewards, strict=True))]
    config = ObjectiveConfig(policy_normalizer=policy, world_normalizer=world, world_loss_target=target, max_seq_len=26)
    samples = build_samples(TrajectoryGroup("t", tuple(rollouts)), config)
    batch, counts = collate(samples, 0), TokenCounts.of(samples, target)
    p = policy_weights(batch, counts, config, torch.float64) * batch.advantages_B.double().abs()[:, None]
    w = world_weights(batch, counts, config, torch.float64)
    found = pressure(rows_of(rollouts, target, "grpo"), Reduction(policy=policy, world=world), 26)
    assert found == pytest.approx(float(w.sum() / p.sum()), rel=1e-6)


def test_the_toml_of_prime_rl_holds_what_the_page_says() -> None:
    (shown,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    written = to_prime_rl(STEP, ObjectiveConfig(world_model_coeff=0.05))
    assert tomllib.loads(written) == tomllib.loads(shown)
    algo = tomllib.loads(written)["orchestrator"]["train"]["algo"]
    assert algo == {"type": "echo", "roles": {"tool": {"alpha": pytest.approx(0.05 * 0.6)}}}
    off = tomllib.loads(to_prime_rl(STEP, ObjectiveConfig(world_model_coeff=0)))
    assert off["orchestrator"]["train"]["algo"] == {"type": "grpo"}
    as_user = [replace(t, messages=({"role": "assistant"}, {"role": "user"})) for t in STEP]
    roles = tomllib.loads(to_prime_rl(as_user, ObjectiveConfig()))["orchestrator"]["train"]["algo"]["roles"]
    assert list(roles) == ["user"]


def test_alpha_makes_up_for_the_advantage_that_prime_rl_does_not_divide() -> None:
    rows = [Row(4, 6, 6), Row(4, 6, 6)]
    solved = [rollout(row, n, float(n)) for n, row in enumerate(rows)]
    # Both terms are means here, and |advantage| is 0.7071 = 0.5 / std with us, 0.5 there.
    alpha = translate_coefficient(
        solved, ObjectiveConfig(world_model_coeff=0.1),
        Reduction(policy="token_mean", world="token_mean", advantage="dr_grpo"),
    )  # fmt: skip
    assert alpha == pytest.approx(0.1 * 0.5 / 0.70710678, rel=1e-5)
    assert group_advantages([0.0, 1.0])[1] == pytest.approx(0.70710678, rel=1e-5)
    # Other groups, and rollouts without a reward, change nothing; a policy coefficient of 2 halves it.
    more = [*solved, *(rollout(row, n, float(n), task="u") for n, row in enumerate(rows)), rollout(Row(9, 1, 1), 7)]
    theirs = Reduction(policy="token_mean", world="token_mean", advantage="dr_grpo")
    config = ObjectiveConfig(world_model_coeff=0.1, policy_coeff=2.0)
    assert translate_coefficient(more, config, theirs) == pytest.approx(alpha / 2)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"world_model_coeff": Schedule({0: 0.1, 9: 0.0})}, "a schedule or a share"),
        ({"world_model_coeff": Share(0.2)}, "a schedule or a share"),
        ({"world": WorldOptions(max_tokens_per_observation=9)}, "world.max_tokens_per_observation"),
        ({"world": WorldOptions(observations="shuffled")}, "world.observations"),
        ({"policy_coeff": 0.0}, "cannot switch the policy term off"),
        ({"world_loss_target": "warning_only"}, "learns whole bodies"),
        ({"world_loss_target": "full_observation"}, "learns whole bodies"),
    ],
)
def test_what_prime_rl_cannot_do_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        to_prime_rl(STEP, ObjectiveConfig(**changes))


def test_settings_and_rows_of_verl_press_as_hard_as_ours() -> None:
    config = ObjectiveConfig(world_model_coeff=0.05)
    settings = dict(line.lstrip("+").split("=") for line in verl_settings(STEP, config))
    assert settings["actor_rollout_ref.actor.loss_agg_mode"] == "seq-mean-token-mean"
    coeff = float(settings["actor_rollout_ref.echo_aux_token_loss_coeff"])
    assert f"echo_aux_token_loss_coeff={coeff:g}" in PAGE
    scored = [replace(t, reward=0.0) for t in STEP]
    rows = [row for t in scored for row in to_verl(t, "env_only")]
    # verl's seq-mean-token-mean of a loss of 1 nat a token: rows without such a token add 0 and count.
    world = sum(bool(sum(row["aux_token_loss_mask"])) for row in rows) / len(rows)
    policy = sum(bool(sum(row["response_mask"])) for row in rows) / len(rows)
    assert coeff * world / policy == pytest.approx(0.05 * pressure(TOY, OURS))
    by_token = verl_settings(STEP, replace(config, policy_normalizer="token_mean", world_normalizer="token_mean"))
    assert f"+actor_rollout_ref.echo_aux_token_loss_coeff={0.05 * 26 / 30:.6g}" in by_token
    assert "actor_rollout_ref.actor.loss_agg_mode=token-mean" in by_token
    options = replace(config, policy=PolicyOptions(advantage="dr_grpo"), clip=(0.2, 0.28))
    assert {
        "algorithm.norm_adv_by_std_in_grpo=False",
        "actor_rollout_ref.actor.clip_ratio_high=0.28",
    } <= set(verl_settings(STEP, options))
    with pytest.raises(ConfigError, match="another length"):
        verl_settings(STEP, replace(config, policy_normalizer="fixed_length", max_seq_len=9))


def test_rows_of_verl_by_hand() -> None:
    script = Segment(ACTION, (6,), turn=1)
    whole = rollout(Row(2, 3, 2), 4, reward=0.5)
    branch = (Segment(CONTEXT, (1, 5), branch=1), Segment(ENV, (8,), turn=1, branch=1))
    first, second = to_verl(replace(whole, segments=(*whole.segments, script, *branch)), "env_only")
    assert (first["prompt_ids"], first["response_ids"]) == ([1, 2, 3], [5, 5, 4, 7, 8, 8, 6])
    assert first["response_mask"] == [1, 1, 0, 0, 0, 0, 0]  # what a script wrote is not trained
    assert first["aux_token_loss_mask"] == [0, 0, 0, 0, 1, 1, 0]
    assert first["response_logprobs"] == [-0.5, -0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert (first["reward_score"], first["num_turns"], first["extra_fields"]["branch"]) == (0.5, 2, 0)
    assert (second["prompt_ids"], second["response_ids"], second["aux_token_loss_mask"]) == ([1, 5], [8], [1])
    (warned,) = to_verl(whole, "warning_plus_env")
    assert warned["aux_token_loss_mask"] == [0, 0, 0, 1, 1, 1]
    with pytest.raises(DataError, match="as from a reward of 0"):
        to_verl(replace(whole, reward=None), "env_only")
