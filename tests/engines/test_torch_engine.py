"""The embedded engine on a tiny real model: same objective, same bits, complete checkpoints."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backtalk.engines.checkpoint import find_checkpoint, write_atomically
from backtalk.engines.torch import head as torch_head
from backtalk.engines.torch.config import TorchConfig
from backtalk.engines.torch.engine import TorchEngine
from backtalk.engines.torch.optimizer import StepOptimizer
from backtalk.errors import ConfigError, DataError
from backtalk.objective.config import ObjectiveConfig, WorldOptions
from backtalk.objective.samples import build_samples, to_samples
from backtalk.rollout.sampler import SamplingParams
from backtalk.trajectory import Failure, Segment, StopReason, TokenRole, Trajectory, TrajectoryGroup
from engine_help import (
    BOTH,
    EQUAL,
    MIXED,
    PLAIN,
    fused_head,
    gradients,
    make_engine,
    make_group,
    plain_grpo,
    plain_head,
    weights,
)
from tiny import tiny_model_dir

FULL = replace(BOTH, world=WorldOptions(zero_advantage_steps="full"))
CONTEXT, TEMPLATE, ACTION, ENV_OUTPUT, _ = TokenRole


def test_coefficient_zero_is_plain_grpo_bit_for_bit(model_dir: Path) -> None:
    samples = build_samples(make_group(MIXED))
    loss, grads = gradients(make_engine(model_dir, packing="off"), samples, PLAIN)

    for head, tolerance in ((fused_head, 0.0), (plain_head, 1e-7)):  # the gradient of softmax is rounded elsewhere
        model = make_engine(model_dir).model
        grpo = plain_grpo(model, samples, head)
        grpo.backward()
        assert loss == grpo.item()
        theirs = [p.grad for p in model.parameters()]
        assert len(grads) == len(theirs)
        for a, b in zip(grads, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


async def test_coefficient_zero_still_measures_the_world(model_dir: Path) -> None:
    samples = build_samples(make_group(MIXED))
    plain = await make_engine(model_dir).train_step(samples, PLAIN)
    both = await make_engine(model_dir).train_step(samples, BOTH)
    for name in ("target_ce", "env_output_ce", "warning_ce", "world_model_loss", "policy_loss"):
        assert plain[name] == pytest.approx(both[name], rel=1e-6)
    assert plain["target_ce"] == pytest.approx(math.log(488), abs=0.1)  # a random model is uniform
    assert plain.keys() == both.keys()


async def test_scores_are_the_models_own(model_dir: Path) -> None:
    engine = make_engine(model_dir, max_tokens_per_microbatch=100)
    group = make_group(MIXED)
    scores = await engine.score(list(group))
    for trajectory, row in zip(group, scores, strict=True):
        ids_1T = torch.tensor([trajectory.token_ids])
        with torch.no_grad():
            logprobs_TV = torch.log_softmax(engine.model(ids_1T).logits[0], -1)
        expected = [0.0] + [logprobs_TV[t - 1, ids_1T[0, t]].item() for t in range(1, len(trajectory))]
        assert row == pytest.approx(expected, abs=2e-6)
    assert await engine.score([]) == []


@pytest.mark.parametrize("packing", ["off", "on"])
async def test_what_was_expected_is_the_models_own_ranking(model_dir: Path, packing: str) -> None:
    engine = make_engine(model_dir, max_tokens_per_microbatch=100, packing=packing)
    group = make_group(MIXED)
    for trajectory, row in zip(group, await engine.score_tokens(list(group), 3), strict=True):
        with torch.no_grad():
            logprobs_TV = torch.log_softmax(engine.model(torch.tensor([trajectory.token_ids])).logits[0], -1)
        assert row.logprobs[0] == 0.0 and 0 not in row.expected
        for t in range(1, len(trajectory)):
            best = logprobs_TV[t - 1].topk(3)
            assert row.logprobs[t] == pytest.approx(logprobs_TV[t - 1, trajectory.token_ids[t]].item(), abs=2e-6)
            if best.indices[0] == trajectory.token_ids[t]:
                assert t not in row.expected
            else:
                assert [token for token, _ in row.expected[t]] == best.indices.tolist()
                assert [x for _, x in row.expected[t]] == pytest.approx(best.values.tolist(), abs=2e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
def test_micro_batches_change_nothing(model_dir: Path, dtype: str, tolerance: float) -> None:
    samples = build_samples(make_group(MIXED))
    loss, grads = gradients(make_engine(model_dir, dtype=dtype), samples, BOTH)
    for max_tokens in (1, 80):
        split = make_engine(model_dir, dtype=dtype, max_tokens_per_microbatch=max_tokens)
        split_loss, split_grads = gradients(split, samples[::-1], BOTH)
        assert split_loss == pytest.approx(loss, abs=tolerance)
        for a, b in zip(split_grads, grads, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_head_in_chunks_changes_nothing(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = build_samples(make_group(MIXED))
    loss, grads = gradients(make_engine(model_dir, dtype="float64"), samples, BOTH)
    monkeypatch.setattr(torch_head, "MAX_LOGITS", 488 * 7)
    chunk_loss, chunk_grads = gradients(make_engine(model_dir, dtype="float64"), samples, BOTH)
    assert chunk_loss == pytest.approx(loss, abs=1e-12)
    for a, b in zip(chunk_grads, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


async def test_temperature_is_the_actions_alone(model_dir: Path) -> None:
    group = make_group(MIXED)
    one = await make_engine(model_dir).train_step(build_samples(group), PLAIN)
    warm = await make_engine(model_dir).train_step(build_samples(group, temperature=2.0), PLAIN)
    assert warm["target_ce"] == one["target_ce"]
    assert warm["entropy"] != pytest.approx(one["entropy"], rel=1e-4)


async def test_sampler_and_trainer_agree(model_dir: Path) -> None:
    engine = make_engine(model_dir)
    prompt = tuple(range(20, 40))
    async with engine.sampler(SamplingParams(temperature=0.7, max_tokens=24)).session("a") as session:
        completion = await session.sample(prompt)
    segments = (Segment(CONTEXT, prompt), Segment(ACTION, completion.token_ids, completion.logprobs, turn=0))
    group = TrajectoryGroup(
        "t", tuple(Trajectory(task_id="t", sample_index=i, segments=segments, reward=float(i)) for i in range(2))
    )
    metrics = await engine.train_step(build_samples(group, temperature=0.7), PLAIN)
    assert 0 <= metrics["sampler_logprob_gap"] < 1e-4
    assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert engine.policy_version == 1 and engine.sampler(SamplingParams()).policy_version == 1


async def test_both_terms_are_learned(model_dir: Path) -> None:
    engine = make_engine(model_dir, learning_rate=3e-3)
    samples = build_samples(make_group(MIXED))
    first = await engine.train_step(samples, BOTH)
    for _ in range(10):
        last = await engine.train_step(samples, BOTH)
    assert last["target_ce"] < first["target_ce"] - 0.3
    assert last["policy_loss"] < first["policy_loss"]


async def test_verifier_free(model_dir: Path) -> None:
    samples = build_samples(make_group((None, None)))
    metrics = await make_engine(model_dir).train_step(samples, ObjectiveConfig(policy_coeff=0.0))
    assert (metrics["skipped"], metrics["update_scale"], metrics["policy_loss"]) == (0.0, 1.0, 0.0)
    assert metrics["world_pull_share"] == 1.0


@pytest.mark.parametrize("rewards", [(None, None), ()])
async def test_a_step_without_a_trained_token_changes_nothing(
    model_dir: Path, rewards: tuple[None, ...], caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(model_dir)
    before = weights(engine)
    with caplog.at_level(logging.WARNING):
        metrics = await engine.train_step(build_samples(make_group(rewards)) if rewards else [], PLAIN)
    assert metrics["skipped"] == 1.0 and engine.policy_version == 1
    assert torch.equal(weights(engine), before)
    assert "changed nothing" in caplog.text
    trained = await engine.train_step(build_samples(make_group(MIXED)), PLAIN)
    assert metrics.keys() | {"env_output_ce/bash"} == trained.keys()


async def test_a_step_without_targets_has_no_cross_entropy_of_them(model_dir: Path) -> None:
    samples = [
        replace(s, roles=s.roles.masked_fill(s.roles == ENV_OUTPUT, TEMPLATE)) for s in build_samples(make_group(MIXED))
    ]
    metrics = await make_engine(model_dir).train_step(samples, BOTH)
    assert metrics["target_tokens"] == 0 and math.isnan(metrics["target_ce"]) and metrics["skipped"] == 0.0


async def test_a_gradient_that_is_not_finite_changes_nothing(model_dir: Path) -> None:
    engine = make_engine(model_dir)
    before = weights(engine)
    samples = [replace(s, advantage=math.inf) for s in build_samples(make_group(MIXED))]
    metrics = await engine.train_step(samples, PLAIN)
    assert metrics["skipped"] == 1.0
    assert torch.equal(weights(engine), before)
    assert (await engine.train_step(build_samples(make_group(MIXED)), PLAIN))["skipped"] == 0.0


def test_a_row_without_tokens_counts_and_costs_nothing(model_dir: Path) -> None:
    samples = build_samples(make_group(MIXED))
    (empty,) = to_samples(
        Trajectory(task_id="t", sample_index=9, segments=(), stop_reason=StopReason.FAILED,
                   failure=Failure("reset", "SandboxError", "gone"))
    )  # fmt: skip
    loss, _ = gradients(make_engine(model_dir), samples, BOTH)
    with_empty, _ = gradients(make_engine(model_dir), [*samples, empty], BOTH)
    assert with_empty == pytest.approx(loss * 5 / 6, abs=1e-6)


def test_gradient_checkpointing_changes_nothing(model_dir: Path) -> None:
    samples = build_samples(make_group(MIXED))
    loss, grads = gradients(make_engine(model_dir), samples, BOTH)
    again, same = gradients(make_engine(model_dir, gradient_checkpointing=True), samples, BOTH)
    assert loss == again
    for a, b in zip(grads, same, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


async def test_warm_up_is_linear(model_dir: Path) -> None:
    engine, samples = make_engine(model_dir, learning_rate=1.0e-3, warmup_steps=4), build_samples(make_group(MIXED))
    rates = [(await engine.train_step(samples, PLAIN))["learning_rate"] for _ in range(5)]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])


async def distance_moved(model_dir: Path, coeff: float, steps: int, *, policy_coeff: float = 1.0) -> float:
    engine = make_engine(model_dir, learning_rate=1e-5, grad_clip_norm=math.inf)
    before, samples = weights(engine), build_samples(make_group(EQUAL))
    for _ in range(steps):
        await engine.train_step(samples, ObjectiveConfig(policy_coeff=policy_coeff, world_model_coeff=coeff))
    return (weights(engine) - before).norm().item()


async def test_twice_the_coefficient_moves_world_only_steps_twice_as_far(model_dir: Path) -> None:
    single, double = [await distance_moved(model_dir, coeff, 4) for coeff in (0.02, 0.04)]
    assert double / single == pytest.approx(2.0, rel=0.02)
    full = await distance_moved(model_dir, 1.0, 4)
    assert full / single == pytest.approx(50.0, rel=0.1)  # coefficient 1 is a full step
    # Unscaled, as in a run without a policy term to compare with, Adam cancels the coefficient.
    free_single, free_double = [await distance_moved(model_dir, c, 4, policy_coeff=0.0) for c in (0.02, 0.04)]
    assert free_double / free_single == pytest.approx(1.0, rel=0.02)


async def test_the_hold_lets_go_where_policy_steps_set_the_scale(model_dir: Path) -> None:
    engine = make_engine(model_dir, learning_rate=1e-7)  # so slow that no ratio ever leaves the clip range
    mixed, equal = build_samples(make_group(MIXED)), build_samples(make_group(EQUAL))
    config = ObjectiveConfig(world_model_coeff=0.05)
    for _ in range(30):
        assert (await engine.train_step(mixed, config))["update_scale"] == 1.0
    assert (await engine.train_step(equal, config))["update_scale"] > 0.8
    fresh = await make_engine(model_dir).train_step(equal, config)
    assert fresh["update_scale"] < 0.2
    assert fresh["learning_rate"] == pytest.approx(1e-4 * fresh["update_scale"])


async def test_a_full_world_only_step_is_plain_adam(model_dir: Path) -> None:
    """Compare with a run that has no policy term, whose steps are never scaled: the same weights to the bit."""
    samples, moved = build_samples(make_group(EQUAL)), []
    for config in (FULL, replace(BOTH, policy_coeff=0.0), BOTH):
        engine = make_engine(model_dir, learning_rate=1e-3, grad_clip_norm=math.inf)
        scales = [(await engine.train_step(samples, config))["update_scale"] for _ in range(3)]
        assert scales == ([1.0] * 3 if config is not BOTH else pytest.approx([0.3] * 3, rel=0.05))
        moved.append(weights(engine))
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], moved[2])


def test_scaled_and_full_world_only_steps_by_hand() -> None:
    """One weight and beta_1 = 0: with beta_2 = 0.5 the running mean of g^2 is that of the steps so far, by halves."""
    config = TorchConfig(learning_rate=0.1, betas=(0.0, 0.5), grad_clip_norm=10.0)
    moves = {}
    for name, ratio in (("scaled", 0.25), ("full", None)):
        weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer, places = StepOptimizer([weight], config), [0.0]
        for grad, world_only in ((0.5, True), (2.0, False), (0.5, True)):
            weight.grad = torch.full_like(weight, grad)
            optimizer.step(ratio if world_only else None)
            places.append(weight.item())
        moves[name] = [before - after for before, after in pairwise(places)]
    # Means of g^2, corrected for the start: 0.25; then (0.125 / 2 + 2) / 0.75 = 2.75; then (1.03125 + 0.125) / 0.875.
    full = [0.1, 0.1 * 2 / math.sqrt(2.75), 0.1 * 0.5 / math.sqrt(1.15625 / 0.875)]
    assert moves["full"] == pytest.approx(full, rel=1e-6)
    # At coefficient 1 the gradients of world-only steps are 0.5 / 0.25 = 2: means of 2, 3 and 3.5 beside those above.
    scales = [0.25, 1.0, math.sqrt(1.15625 / 3.5)]
    assert moves["scaled"] == pytest.approx([a * b for a, b in zip(full, scales, strict=True)], rel=1e-6)


async def test_same_seed_same_bits(model_dir: Path) -> None:
    async def run() -> tuple[list[dict[str, float]], Tensor]:
        engine = make_engine(model_dir)
        return [await engine.train_step(build_samples(make_group(MIXED, i)), BOTH) for i in range(3)], weights(engine)

    (first, first_weights), (second, second_weights) = await run(), await run()
    assert first == second
    assert torch.equal(first_weights, second_weights)


@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}, {"lora_rank": 4}, {"gradient_checkpointing": True}])
async def test_a_loaded_run_continues_to_the_bit(model_dir: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    steps = [(make_group(rewards, i), BOTH) for i, rewards in enumerate((MIXED, EQUAL, MIXED, EQUAL))]

    async def go(engine: TorchEngine, some: list[tuple[TrajectoryGroup, ObjectiveConfig]]) -> list[dict[str, float]]:
        return [await engine.train_step(build_samples(group), config) for group, config in some]

    whole = make_engine(model_dir, warmup_steps=3, learning_rate=1e-3, **settings)
    expected = await go(whole, steps)
    first = make_engine(model_dir, warmup_steps=3, learning_rate=1e-3, **settings)
    await go(first, steps[:2])
    first.save(tmp_path / "checkpoint")
    second = make_engine(model_dir, warmup_steps=3, learning_rate=1e-3, **settings)
    second.load(tmp_path / "checkpoint")
    assert second.policy_version == 2
    assert await go(second, steps[2:]) == expected[2:]
    assert torch.equal(weights(second), weights(whole))


async def test_bfloat16_keeps_updates_that_round_away(model_dir: Path) -> None:
    engine, samples = make_engine(model_dir, dtype="bfloat16", learning_rate=1e-6), build_samples(make_group(MIXED))
    before = torch.cat([m.detach().flatten() for m in engine._optimizer._masters])
    for _ in range(2):
        await engine.train_step(samples, BOTH)
    after = torch.cat([m.detach().flatten() for m in engine._optimizer._masters])
    assert after.dtype == torch.float32
    assert (after != before).float().mean() > 0.9
    assert next(engine.model.parameters()).dtype == torch.bfloat16


async def test_a_checkpoint_is_a_model_folder(model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for settings in ({}, {"lora_rank": 2}):
        engine = make_engine(model_dir, learning_rate=1e-2, **settings)
        await engine.train_step(build_samples(make_group(MIXED)), BOTH)
        write_atomically(tmp_path / "checkpoint", engine.save)  # the second one takes the place of the first
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint" / "model")
        ids_BT = torch.arange(30)[None]
        with torch.no_grad():
            torch.testing.assert_close(model(ids_BT).logits, engine.model(ids_BT).logits, rtol=0, atol=1e-5)
        assert len(AutoTokenizer.from_pretrained(tmp_path / "checkpoint" / "model")) == 488
        assert make_engine(tmp_path / "checkpoint" / "model").policy_version == 0  # to start from
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_failed_save_leaves_the_old_checkpoint(model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    write_atomically(folder, make_engine(model_dir).save)

    def full_disk(fresh: Path) -> None:
        (fresh / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="No space left"):
        write_atomically(folder, full_disk)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    make_engine(model_dir).load(folder)
    assert find_checkpoint(folder) == folder
    folder.rename(tmp_path / ".checkpoint.old")  # a crash between the two renames
    assert find_checkpoint(folder) == tmp_path / ".checkpoint.old"
    assert find_checkpoint(tmp_path / "other") is None


def test_checkpoints_that_do_not_fit_are_refused(model_dir: Path, tmp_path: Path) -> None:
    engine = make_engine(model_dir)
    with pytest.raises(DataError, match="no checkpoint"):
        engine.load(tmp_path)
    engine.save(tmp_path / "a")
    with pytest.raises(DataError, match="lora_rank=0"):
        make_engine(model_dir, lora_rank=2).load(tmp_path / "a")
    other = tiny_model_dir(tmp_path / "other", hidden_size=32)
    with pytest.raises(DataError, match="does not fit"):
        make_engine(other).load(tmp_path / "a")
    (tmp_path / "a" / "training.pt").write_bytes(b"junk")
    with pytest.raises(DataError, match="damaged"):
        engine.load(tmp_path / "a")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "./nowhere"}, "does not exist"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"grad_clip_norm": 0.0}, "inf"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"dtype": "float16"}, "bfloat16"),
        ({"device": "abacus"}, "abacus"),
        ({"threads": 0}, "threads=0"),
    ],
)
def test_settings_that_cannot_work_are_refused(model_dir: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TorchEngine(TorchConfig(**{"model": str(model_dir), **settings}))


@pytest.mark.parametrize(
    ("file", "instead"),
    [
        ("README.md", "pass one that holds a saved model"),
        ("adapter_config.json", "it holds an adapter: pass the model it was trained on"),
        ("model-Q4.gguf", "it holds a GGUF file, which cannot be trained"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, file: str, instead: str) -> None:
    (tmp_path / file).touch()
    with pytest.raises(ConfigError, match=f"without a config.*{instead}"):
        TorchEngine(TorchConfig(model=str(tmp_path)))


def test_a_model_with_code_of_its_own_is_refused_without_a_question(model_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_dir, tmp_path / "own"))
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": code}))
    with pytest.raises(ConfigError, match="is defined by Python code of its own"):
        make_engine(folder)


def test_lora_without_peft_says_what_to_install(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'backtalk\[lora\]'"):
        make_engine(model_dir, lora_rank=2)


async def test_lora_trains_adapters_only(model_dir: Path) -> None:
    engine = make_engine(model_dir, lora_rank=2, learning_rate=1e-2)
    names = {name for name, p in engine.model.named_parameters() if p.requires_grad}
    assert names and all("lora_" in name for name in names)
    frozen = {n: p.detach().clone() for n, p in engine.model.named_parameters() if n not in names}
    first = await engine.train_step(build_samples(make_group(MIXED)), BOTH)
    last = await engine.train_step(build_samples(make_group(MIXED)), BOTH)
    assert last["total_loss"] < first["total_loss"]
    assert all(torch.equal(dict(engine.model.named_parameters())[n], p) for n, p in frozen.items())


def test_weights_that_are_cut_off_are_refused(model_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_dir, tmp_path / "cut"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ConfigError, match=r"cannot be loaded as a causal language model.*cut off"):
        make_engine(folder)
    engine = make_engine(model_dir)
    engine.save(tmp_path / "checkpoint")
    shutil.copy(weights, tmp_path / "checkpoint" / "model")
    with pytest.raises(DataError, match=r"does not fit.*cut off"):
        engine.load(tmp_path / "checkpoint")


def test_a_name_without_a_network_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://127.0.0.1:9")  # nobody listens there
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match=r"nobody/nothing.*127.0.0.1 cannot be reached.*pass a folder"):
        TorchEngine(TorchConfig(model="nobody/nothing"))
