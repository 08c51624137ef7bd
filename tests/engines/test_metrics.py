"""Metrics of a step, and steps without targets, actions or tokens."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backtalk.engines.metrics import StepRecord, copied_mask, token_metrics
from backtalk.engines.torch.config import TorchConfig
from backtalk.engines.torch.engine import TorchEngine
from backtalk.objective import objective
from backtalk.objective.batch import TokenCounts, collate
from backtalk.objective.config import ObjectiveConfig, PolicyOptions
from backtalk.objective.samples import Sample, build_samples, to_samples
from backtalk.run.rollouts import rollout_metrics
from backtalk.trajectory import Segment, TokenRole, Trajectory, TrajectoryGroup

CONTEXT, TEMPLATE, ACTION, ENV_OUTPUT, WARNING = TokenRole
BOTH = ObjectiveConfig(world_model_coeff=0.3)
PLAIN = ObjectiveConfig(world_model_coeff=0.0)


def action(ids: Sequence[int], turn: int = 0, tool: str | None = "bash", logprob: float = -2.0) -> Segment:
    return Segment(ACTION, tuple(ids), (logprob,) * len(ids), turn=turn, tool=tool)


def observed(ids: Sequence[int], turn: int = 0, tool: str | None = "bash", role: TokenRole = ENV_OUTPUT) -> Segment:
    return Segment(role, tuple(ids), turn=turn, tool=tool)


def trajectory(*segments: Segment, reward: float | None = 1.0, index: int = 0, **stats: float) -> Trajectory:
    return Trajectory(task_id="t", sample_index=index, segments=segments, reward=reward, stats=stats)


def only(value: Trajectory, advantage: float = 1.0) -> Sample:
    (sample,) = to_samples(value, advantage=advantage)
    return sample


def test_copied_tokens_by_hand() -> None:
    sample = only(
        trajectory(
            Segment(CONTEXT, (1, 2, 3)),
            action((5, 6, 7, 8, 9)),
            Segment(TEMPLATE, (5, 6, 7), turn=0),  # no observation
            #    5 6 7 8: a run of 4;  8 9: a run of 2, too short;  1 2 3: of the context;  7 8 9: ends the text
            observed((5, 6, 7, 8, 40, 8, 9, 41, 1, 2, 3, 7, 8, 9)),
            observed((6, 7, 8, 50), role=WARNING),
            action((20, 21), turn=1),
            observed((5, 6, 7), turn=1),  # of an earlier turn's action
        )
    )
    marks = "".join("x" if copied else "." for copied in copied_mask(sample).tolist())
    assert marks == "..." + "....." + "..." + "xxxx" + "......." + "xxx" + "xxx." + ".." + "..."


def test_text_is_copied_from_an_action_that_nobody_sampled_too() -> None:
    sample = only(trajectory(Segment(ACTION, (5, 6, 7), turn=0), observed((5, 6, 7, 8))))
    assert copied_mask(sample).tolist() == [False] * 3 + [True] * 3 + [False]


def test_runs_do_not_cross_the_edge_of_an_observation() -> None:
    sample = only(trajectory(action((5, 6, 7)), observed((5, 6)), observed((7,)), observed((4, 5, 6, 7, 5))))
    assert copied_mask(sample).tolist() == [False] * 6 + [False, True, True, True, False]
    assert copied_mask(only(trajectory())).tolist() == []


def recorded(samples: list[Sample], logprobs: list[Tensor], config: ObjectiveConfig) -> tuple[StepRecord, TokenCounts]:
    batch, counts, record = collate(samples, 0), TokenCounts.of(samples, config.world_loss_target), StepRecord()
    logprobs_BT = torch.nn.utils.rnn.pad_sequence(logprobs, batch_first=True).double().requires_grad_()
    objective(logprobs_BT, batch, counts, config)[0].backward()
    record.add(samples, batch, logprobs_BT)
    return record, counts


def test_metrics_by_hand() -> None:
    samples = [
        only(trajectory(Segment(CONTEXT, (1, 2)), action((5, 6, 7)), observed((5, 6, 7, 8, 9))), advantage=1.5),
        only(
            trajectory(
                Segment(CONTEXT, (1,)), action((5,)), observed((8, 9), tool="submit"), observed((3,), role=WARNING)
            )
        ),
    ]
    logprobs = [
        torch.tensor([0, 0, -2, -2, -2, -1, -1, -1, -3, -5.0]),  # copied -1, new -3 and -5
        torch.tensor([0, -2, -6, -6, -9.0]),
    ]
    config = ObjectiveConfig(world_model_coeff=0.3, policy_normalizer="token_mean", world_normalizer="token_mean")
    record, counts = recorded(samples, logprobs, config)
    record.add_states(torch.tensor([[3.0, 4.0], [0.0, 12.0], [0.0, 2.0]]), torch.tensor([True, True, False]))
    metrics = token_metrics(record, counts, config, ["bash", "submit", "unused"])

    expected = {
        "target_ce": (3 + 3 + 5 + 12) / 7,
        "env_output_ce": (3 + 3 + 5 + 12) / 7,
        "env_output_ce_copied": 1.0,
        "env_output_ce_new": (3 + 5 + 12) / 4,
        "env_output_ce/bash": 11 / 5,
        "env_output_ce/submit": 6.0,
        "env_output_ce/unused": math.nan,
        "warning_ce": 9.0,
        "template_ce": math.nan,
        "copied_share": 3 / 7,
        "context_share": 3 / 15,
        "template_share": 0.0,
        "action_share": 4 / 15,
        "env_output_share": 7 / 15,
        "warning_share": 1 / 15,
        "entropy": 2.0,
        "ratio_mean": 1.0,
        "clip_fraction": 0.0,
        "reference_kl": math.nan,
        "sampler_logprob_gap": 0.0,
        "effective_obs_weight": (0.3 / 7) / (1 / 4),
        "world_pull_share": 0.3 / (0.3 + (3 * 1.5 + 1) / 4),
        "policy_grad_norm": 13.0,  # of (3, 4) and (0, 12)
        "world_grad_norm": 2.0,
        "grad_norm_ratio": 2 / 13,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, nan_ok=True)
    assert metrics.keys() == expected.keys() | {"sequences", "rewarded_sequences", "policy_tokens", "action_tokens",
        "env_output_tokens", "warning_tokens", "target_tokens"}  # fmt: skip


def test_a_step_without_any_token_has_the_same_names() -> None:
    full, counts = recorded([only(trajectory(action((5, 6)), observed((7,))))], [torch.tensor([0, -1, -1.0])], BOTH)
    empty = token_metrics(StepRecord(), TokenCounts.of([]), BOTH, ["bash"])
    assert empty.keys() == token_metrics(full, counts, BOTH, ["bash"]).keys()
    assert math.isnan(empty["entropy"]) and empty["action_tokens"] == 0


def test_clip_fraction_follows_the_form_of_the_loss() -> None:
    """Use ratios e^0.5 and e^-0.5 with a positive advantage: one is beyond 1.2, and their geometric mean is 1."""
    samples = [only(trajectory(Segment(CONTEXT, (1,)), action((5, 6))))]
    logprobs = [torch.tensor([0, -1.5, -2.5])]
    for options, expected in (
        (PolicyOptions(), 0.5),
        (PolicyOptions(loss="cispo"), 0.5),
        (PolicyOptions(loss="gspo"), 0.0),
        (PolicyOptions(max_importance_ratio=2.0), 0.0),
    ):
        config = ObjectiveConfig(world_model_coeff=0.0, policy=options)
        record, counts = recorded(samples, logprobs, config)
        assert token_metrics(record, counts, config)["clip_fraction"] == expected


def test_role_confusion_and_cuts_are_shares_of_turns() -> None:
    one = trajectory(num_turns=3.0, role_confusions=1.0, cut_after_call=2.0)
    metrics = rollout_metrics([TrajectoryGroup("t", (one, trajectory(index=1, num_turns=5.0)))])
    assert (metrics["role_confusion"], metrics["cut_after_call"]) == (1 / 8, 2 / 8)
    assert math.isnan(rollout_metrics([TrajectoryGroup("t", (trajectory(),))])["role_confusion"])


def make_engine(model_dir: Path, **settings: Any) -> TorchEngine:
    return TorchEngine(TorchConfig(model=str(model_dir), device="cpu", **{"dtype": "float64", **settings}))


def make_samples(config: ObjectiveConfig, rewards: Sequence[float | None] = (1.0, 0.0, 1.0, 0.5)) -> list[Sample]:
    noise = random.Random(5)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(noise.randrange(7, 400) for _ in range(n))

    def one(index: int, reward: float | None) -> Trajectory:
        segments = [Segment(CONTEXT, ids(4))]
        for turn in range(2):
            segments += [action(ids(3), turn, logprob=-6.0), Segment(TEMPLATE, ids(2), turn=turn)]
            segments += [observed(ids(noise.randrange(1, 9)), turn), observed(ids(2), turn, role=WARNING)]
        return trajectory(*segments, reward=reward, index=index)

    group = TrajectoryGroup("t", tuple(one(i, reward) for i, reward in enumerate(rewards)))
    return build_samples(group, config)


async def test_gradient_norms_are_those_of_either_term_alone(model_dir: Path) -> None:
    """Compare with the gradient at the last hidden states of one term at a time, by autograd on all logits."""
    samples = make_samples(BOTH)
    metrics = await make_engine(model_dir, max_tokens_per_microbatch=60).train_step(samples, BOTH)

    model = make_engine(model_dir).model
    batch, counts = collate(samples, 0), TokenCounts.of(samples)
    states_BTD = model.model(batch.token_ids_BT).last_hidden_state.detach().requires_grad_()
    logprobs_BTV = torch.log_softmax(model.lm_head(states_BTD), -1)
    inner = logprobs_BTV[:, :-1].gather(-1, batch.token_ids_BT[:, 1:, None])[..., 0]
    logprobs_BT = torch.nn.functional.pad(inner, (1, 0))
    norms = []
    for config in (PLAIN, ObjectiveConfig(policy_coeff=0.0, world_model_coeff=0.3)):
        loss, _ = objective(logprobs_BT, batch, counts, config)
        norms.append(torch.autograd.grad(loss, states_BTD, retain_graph=True)[0].norm().item())
    assert metrics["policy_grad_norm"] == pytest.approx(norms[0], rel=1e-9)
    assert metrics["world_grad_norm"] == pytest.approx(norms[1], rel=1e-9)
    assert metrics["grad_norm_ratio"] == pytest.approx(norms[1] / norms[0], rel=1e-9)
    assert metrics["world_model_coeff"] == 0.3


async def test_a_term_that_is_absent_has_no_norm(model_dir: Path) -> None:
    engine = make_engine(model_dir)
    plain = await engine.train_step(make_samples(PLAIN), PLAIN)
    assert math.isnan(plain["world_grad_norm"]) and plain["policy_grad_norm"] > 0
    only_world = ObjectiveConfig(policy_coeff=0.0, world_model_coeff=0.3)
    alone = await engine.train_step(make_samples(only_world), only_world)
    assert math.isnan(alone["policy_grad_norm"]) and alone["world_grad_norm"] > 0
    equal = await engine.train_step(make_samples(BOTH, (1.0, 1.0)), BOTH)
    assert equal["policy_grad_norm"] == 0 and math.isnan(equal["grad_norm_ratio"]) and equal["update_scale"] < 1
    assert plain.keys() == alone.keys() == equal.keys()


def stripped(sample: Sample, *roles: TokenRole) -> Sample:
    gone = torch.isin(sample.roles, torch.tensor(roles, dtype=torch.int8))
    return replace(sample, roles=sample.roles.masked_fill(gone, CONTEXT), sampled=sample.sampled & ~gone, spans=())


@pytest.mark.parametrize("config", [BOTH, PLAIN, ObjectiveConfig(policy_coeff=0.0)])
@pytest.mark.parametrize("max_tokens", [1, 8192])
async def test_steps_without_targets_or_actions(model_dir: Path, config: ObjectiveConfig, max_tokens: int) -> None:
    """Check rows without targets or actions, alone and beside others, in one micro-batch or in several."""
    engine = make_engine(model_dir, max_tokens_per_microbatch=max_tokens)
    samples = make_samples(config)
    bare = [stripped(s, ENV_OUTPUT, WARNING) for s in samples]
    mute = [stripped(s, ACTION) for s in samples]
    empty = [stripped(s, ACTION, ENV_OUTPUT, WARNING) for s in samples]
    names = (await engine.train_step(samples, config)).keys()
    for step in (bare, mute, empty, [bare[0], samples[1]], [mute[0], samples[1]], [empty[0], samples[1], bare[2]]):
        metrics = await engine.train_step(step, config)
        assert metrics.keys() == names
        assert metrics["skipped"] == float(step is empty or (step is bare and config.policy_coeff == 0)
                                           or (step is mute and config.world_coeff == 0))  # fmt: skip
        assert all(math.isfinite(p.sum().item()) for p in engine.model.parameters())


async def test_a_row_without_targets_adds_nothing_to_the_world_term(model_dir: Path) -> None:
    samples = make_samples(BOTH)
    bare = stripped(samples[0], ENV_OUTPUT, WARNING)
    with_row = await make_engine(model_dir).train_step([bare, *samples[1:]], BOTH)
    without = await make_engine(model_dir).train_step(samples[1:], BOTH)
    assert with_row["world_model_loss"] == pytest.approx(without["world_model_loss"] * 3 / 4, rel=1e-12)
    assert with_row["target_ce"] == pytest.approx(without["target_ce"], rel=1e-12)


KL = ObjectiveConfig(world_model_coeff=0.0, policy=PolicyOptions(kl_coeff=0.5))


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2, "dtype": "float32"}, {"packing": "off"}])
async def test_the_reference_is_the_model_that_the_run_began_with(
    model_dir: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    def tempered(config: ObjectiveConfig) -> list[Sample]:
        return [replace(sample, temperature=0.7) for sample in make_samples(config)]

    engine = make_engine(model_dir, learning_rate=1e-2, **settings)
    plain = await make_engine(model_dir, learning_rate=1e-2, **settings).train_step(tempered(PLAIN), PLAIN)
    first = await engine.train_step(tempered(KL), KL)
    assert first["reference_kl"] == pytest.approx(0.0, abs=1e-12)
    assert first["policy_loss"] == pytest.approx(plain["policy_loss"], abs=1e-7)
    assert math.isnan(plain["reference_kl"])
    second = await engine.train_step(tempered(KL), KL)
    assert second["reference_kl"] > 1e-4

    engine.save(tmp_path / "checkpoint")
    resumed = make_engine(model_dir, learning_rate=1e-2, **settings)
    resumed.load(tmp_path / "checkpoint")
    third, again = await engine.train_step(tempered(KL), KL), await resumed.train_step(tempered(KL), KL)
    assert again == pytest.approx(third, rel=0, abs=0, nan_ok=True)
    trained = [p.requires_grad for p in resumed.model.parameters()]
    assert trained == [p.requires_grad for p in make_engine(model_dir, **settings).model.parameters()]
