"""Both terms' gradients over the trained weights, measured in the engine, and the share that follows from them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backtalk.engines.torch.config import TorchConfig
from backtalk.engines.torch.engine import TorchEngine
from backtalk.errors import ConfigError
from backtalk.objective import objective
from backtalk.objective.batch import TokenCounts, collate
from backtalk.objective.coefficient import Share
from backtalk.objective.config import ObjectiveConfig, PolicyOptions, WorldOptions
from backtalk.objective.samples import Sample, build_samples
from backtalk.trajectory import Segment, TokenRole, Trajectory, TrajectoryGroup
from tiny import tiny_model_dir

CONTEXT, TEMPLATE, ACTION, ENV_OUTPUT, WARNING = TokenRole
PLAIN = ObjectiveConfig(world_model_coeff=0.0)
BOTH = ObjectiveConfig(world_model_coeff=0.3)
FIFTH = ObjectiveConfig(world_model_coeff=Share(0.2))
MIXED, EQUAL = (1.0, 0.0, 0.5), (1.0, 1.0, 1.0)
MEASURED = ("policy_grad_norm_weights", "world_grad_norm_weights", "world_grad_share", "grad_cosine")


def make_engine(model_dir: Path, **settings: Any) -> TorchEngine:
    defaults: dict[str, Any] = {"dtype": "float64", "device": "cpu", "measure_gradients_every": 1}
    return TorchEngine(TorchConfig(model=str(model_dir), **{**defaults, **settings}))


def make_samples(rewards: Sequence[float] = MIXED, seed: int = 0) -> list[Sample]:
    noise = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(noise.randrange(7, 400) for _ in range(count))

    def one(index: int, reward: float) -> Trajectory:
        segments = [Segment(CONTEXT, ids(5))]
        for turn in range(2):
            n = noise.randrange(2, 6)
            segments += [Segment(ACTION, ids(n), (-6.2,) * n, turn=turn), Segment(TEMPLATE, ids(2), turn=turn)]
            segments += [
                Segment(ENV_OUTPUT, ids(noise.randrange(1, 9)), turn=turn),
                Segment(WARNING, ids(2), turn=turn),
            ]
        return Trajectory(task_id="t", sample_index=index, segments=tuple(segments), reward=reward)

    return build_samples(TrajectoryGroup("t", tuple(one(i, reward) for i, reward in enumerate(rewards))))


def weights(engine: TorchEngine) -> Tensor:
    return torch.cat([p.detach().flatten() for p in engine.model.parameters()])


def by_autograd(engine: TorchEngine, samples: list[Sample]) -> tuple[float, float, float]:
    """Return both norms and the cosine of ``gradients``."""
    policy, world = gradients(engine, samples)
    return policy.norm().item(), world.norm().item(), torch.cosine_similarity(policy, world, 0).item()


def gradients(engine: TorchEngine, samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Return both terms' gradients from the logits of the whole batch at once, one term at a time."""
    batch, counts = collate(samples, 0), TokenCounts.of(samples)
    logprobs_BTV = torch.log_softmax(engine.model(batch.token_ids_BT).logits, -1)
    inner_BT = logprobs_BTV[:, :-1].gather(-1, batch.token_ids_BT[:, 1:, None])[..., 0]
    trained = [p for p in engine.model.parameters() if p.requires_grad]
    flat = []
    for config in (PLAIN, ObjectiveConfig(policy_coeff=0.0, world_model_coeff=1.0)):
        loss, _ = objective(torch.nn.functional.pad(inner_BT, (1, 0)), batch, counts, config)
        flat.append(torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, trained, retain_graph=True)]))
    return flat[0], flat[1]


@pytest.mark.parametrize("coeff", [0.0, 0.3])
@pytest.mark.parametrize("settings", [{}, {"max_tokens_per_microbatch": 1}, {"gradient_checkpointing": True}])
async def test_norms_and_cosine_are_those_of_autograd(model_dir: Path, coeff: float, settings: dict[str, Any]) -> None:
    engine, samples = make_engine(model_dir, **settings), make_samples()
    policy, world, cosine = by_autograd(make_engine(model_dir), samples)
    metrics = await engine.train_step(samples, ObjectiveConfig(world_model_coeff=coeff))
    share = coeff * world / (coeff * world + policy)
    assert [metrics[name] for name in MEASURED] == pytest.approx([policy, world, share, cosine], rel=1e-6)
    total = policy**2 + (coeff * world) ** 2 + 2 * coeff * policy * world * cosine
    assert metrics["grad_norm"] == pytest.approx(math.sqrt(total), rel=1e-6)  # as the optimizer saw it


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
async def test_narrow_weights_measure_the_same(model_dir: Path, dtype: str, tolerance: float) -> None:
    policy, world, _ = by_autograd(make_engine(model_dir), make_samples())
    metrics = await make_engine(model_dir, dtype=dtype, max_tokens_per_microbatch=60).train_step(make_samples(), BOTH)
    assert [metrics[name] for name in MEASURED[:2]] == pytest.approx([policy, world], rel=tolerance)


async def test_lora_measures_its_adapters_alone(model_dir: Path) -> None:
    pytest.importorskip("peft")
    engine, samples = make_engine(model_dir, lora_rank=2, max_tokens_per_microbatch=60), make_samples()
    await engine.train_step(samples, BOTH)  # before it one half of each adapter is 0
    expected = by_autograd(engine, samples)
    metrics = await engine.train_step(samples, BOTH)
    found = [metrics[name] for name in ("policy_grad_norm_weights", "world_grad_norm_weights", "grad_cosine")]
    assert found == pytest.approx(expected, rel=1e-4)  # adapters are float32
    assert metrics["policy_grad_norm_weights"] > 0


@pytest.mark.parametrize("config", [PLAIN, BOTH, ObjectiveConfig(policy=PolicyOptions(kl_coeff=0.1))])
async def test_measuring_changes_no_bit_of_the_update(model_dir: Path, config: ObjectiveConfig) -> None:
    on, off = (make_engine(model_dir, dtype="float32", measure_gradients_every=n) for n in (1, 0))
    for seed in range(3):
        measured = await on.train_step(make_samples(seed=seed), config)
        plain = await off.train_step(make_samples(seed=seed), config)
        assert all(math.isnan(plain.pop(name)) for name in MEASURED)
        assert {name: measured[name] for name in plain} == pytest.approx(plain, rel=0, abs=0, nan_ok=True)
    assert torch.equal(weights(on), weights(off))


async def test_a_share_is_that_share_from_the_first_step(model_dir: Path) -> None:
    engine, samples = make_engine(model_dir, max_tokens_per_microbatch=60), make_samples()
    first = await engine.train_step(samples, FIFTH)
    assert first["world_grad_share"] == pytest.approx(0.2)
    same = await make_engine(model_dir).train_step(
        samples, ObjectiveConfig(world_model_coeff=first["world_model_coeff"])
    )
    # Its update is the sum of the two measured gradients. The model's norms compute in float32.
    assert same.pop("grad_cosine") == pytest.approx(first.pop("grad_cosine"))
    assert first == pytest.approx(same, rel=1e-6, abs=1e-9, nan_ok=True)
    assert first["world_pull_share"] > 0 and first["world_grad_norm"] > 0


async def test_the_update_of_a_measured_share_is_that_of_the_number(model_dir: Path) -> None:
    by_share, by_number = (make_engine(model_dir, learning_rate=1e-3) for _ in range(2))
    for seed in range(3):
        chosen = await by_share.train_step(make_samples(seed=seed), FIFTH)
        await by_number.train_step(
            make_samples(seed=seed), ObjectiveConfig(world_model_coeff=chosen["world_model_coeff"])
        )
    assert torch.allclose(weights(by_share), weights(by_number), rtol=0, atol=1e-6)


async def test_a_measurement_waits_for_a_policy_gradient(model_dir: Path) -> None:
    engine = make_engine(model_dir, measure_gradients_every=2)
    rows = [
        await engine.train_step(make_samples(r, i), FIFTH) for i, r in enumerate((EQUAL, MIXED, MIXED, EQUAL, MIXED))
    ]
    assert [not math.isnan(row["world_grad_share"]) for row in rows] == [False, True, False, False, True]
    coeffs = [row["world_model_coeff"] for row in rows]
    assert coeffs[0] == 0.05 and coeffs[1] == coeffs[2] == coeffs[3] != coeffs[4]
    assert rows[0].keys() == rows[1].keys()


async def test_a_share_is_measured_more_often(model_dir: Path) -> None:
    samples, due = make_samples(), {}
    for config in (BOTH, FIFTH):
        engine = make_engine(model_dir, measure_gradients_every=None)
        engine._measured_at = 5
        for engine._policy_version in range(5, 50):
            if engine._is_measured(samples, config):
                due.setdefault(config, engine._policy_version)
    assert due == {BOTH: 45, FIFTH: 17}


async def test_a_resumed_controller_goes_on_to_the_bit(model_dir: Path, tmp_path: Path) -> None:
    steps = [make_samples(rewards, i) for i, rewards in enumerate((MIXED, EQUAL, MIXED, MIXED, MIXED))]
    settings: dict[str, Any] = {"measure_gradients_every": 2, "learning_rate": 1e-3, "dtype": "float32"}
    whole, first = make_engine(model_dir, **settings), make_engine(model_dir, **settings)
    expected = [await whole.train_step(step, FIFTH) for step in steps]
    for step in steps[:2]:
        await first.train_step(step, FIFTH)
    first.save(tmp_path / "checkpoint")
    second = make_engine(model_dir, **settings)
    second.load(tmp_path / "checkpoint")
    again = [await second.train_step(step, FIFTH) for step in steps[2:]]
    assert [row["world_model_coeff"] for row in again] == [row["world_model_coeff"] for row in expected[2:]]
    assert len({row["world_model_coeff"] for row in expected}) == 3
    assert again == expected[2:] and torch.equal(weights(second), weights(whole))


@pytest.mark.parametrize("rewards", [(1.0, 0.0, 0.5), (0.0, 1.0, 0.5)])
@pytest.mark.parametrize("coeff", [0.3, Share(0.5)])
async def test_a_projected_update_keeps_of_the_world_what_does_not_pull_against_the_policy(
    model_dir: Path, rewards: tuple[float, ...], coeff: float | Share
) -> None:
    """Of opposite rewards the policy gradients are opposite too, so one of them conflicts with the world's."""
    config = ObjectiveConfig(world_model_coeff=coeff, world=WorldOptions(conflict="project"))
    engine, samples = make_engine(model_dir, measure_gradients_every=40), make_samples(rewards)
    policy, world = gradients(engine, samples)
    metrics = await engine.train_step(samples, config)
    inner = float(policy @ world)
    left = world - min(inner, 0.0) / float(policy @ policy) * policy
    expected = policy + metrics["world_model_coeff"] * left
    assert metrics["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-9)
    if inner < 0:
        assert abs(float(left @ policy)) < 1e-12 and float(left.norm()) < float(world.norm())
    assert metrics["grad_cosine"] == pytest.approx(inner / float(policy.norm() * world.norm()), rel=1e-9)


def by_head(engine: TorchEngine, samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Return both terms' gradients where no target token has one through the output embedding."""
    model, head = engine.model, engine.model.get_output_embeddings().weight
    batch, counts = collate(samples, 0), TokenCounts.of(samples)
    states_BTD = model.get_decoder()(batch.token_ids_BT).last_hidden_state
    flat = []
    for weight_VD, config in ((head, PLAIN), (head.detach(), ObjectiveConfig(policy_coeff=0.0, world_model_coeff=1.0))):
        logprobs_BTV = torch.log_softmax(states_BTD @ weight_VD.T, -1)
        inner_BT = logprobs_BTV[:, :-1].gather(-1, batch.token_ids_BT[:, 1:, None])[..., 0]
        loss, _ = objective(torch.nn.functional.pad(inner_BT, (1, 0)), batch, counts, config)
        found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, materialize_grads=True)
        flat.append(torch.cat([gradient.flatten() for gradient in found]))
    return flat[0], flat[1]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("settings", [{}, {"max_tokens_per_microbatch": 1}, {"packing": "on"}])
@pytest.mark.parametrize("coeff", [0.3, Share(0.5)])
async def test_the_terms_gradient_is_kept_off_the_output_embedding(
    tmp_path: Path, tied: bool, settings: dict[str, Any], coeff: float | Share
) -> None:
    config = ObjectiveConfig(world_model_coeff=coeff, world=WorldOptions(head="keep"))
    folder = tiny_model_dir(tmp_path / "model", tie_word_embeddings=tied)
    engine, samples = make_engine(folder, **settings), make_samples()
    policy, world = by_head(make_engine(folder), samples)
    whole = gradients(make_engine(folder), samples)[1]
    metrics = await engine.train_step(samples, config)
    assert metrics["world_grad_norm_weights"] == pytest.approx(float(world.norm()), rel=1e-6)
    assert float(world.norm()) < 0.99 * float(whole.norm())
    used = metrics["world_model_coeff"]
    assert metrics["grad_norm"] == pytest.approx(float((policy + used * world).norm()), rel=1e-6)


@pytest.mark.parametrize("rewards", [MIXED, EQUAL])
async def test_a_kept_head_does_not_move_by_the_term_alone(tmp_path: Path, rewards: tuple[float, ...]) -> None:
    """At coefficient 0, and with rewards that teach nothing, the option changes no bit of the head's update."""
    folder = tiny_model_dir(tmp_path / "model", tie_word_embeddings=False)
    engines = [make_engine(folder, dtype="float32") for _ in range(3)]
    kept, plain = WorldOptions(head="keep"), WorldOptions()
    configs = [ObjectiveConfig(world_model_coeff=c, world=w) for c, w in ((0.3, kept), (0.0, kept), (0.0, plain))]
    for engine, config in zip(engines, configs, strict=True):
        await engine.train_step(make_samples(rewards), config)
    assert torch.equal(weights(engines[1]), weights(engines[2]))
    assert not torch.equal(weights(engines[0]), weights(engines[2]))
    heads = [engine.model.get_output_embeddings().weight for engine in engines]
    if rewards is EQUAL:
        assert torch.equal(heads[0], heads[2])


async def test_a_model_that_changes_its_logits_cannot_keep_its_head(model_dir: Path) -> None:
    engine = make_engine(model_dir)
    engine._scorer.has_separate_head = False
    with pytest.raises(
        ConfigError, match=r"world\.head='keep' needs an engine that applies the output embedding itself"
    ):
        await engine.train_step(make_samples(), ObjectiveConfig(world=WorldOptions(head="keep")))


@pytest.mark.parametrize("coeff", [0.3, Share(0.2)])
async def test_a_term_of_every_other_step_is_measured_too(model_dir: Path, coeff: float | Share) -> None:
    engine = make_engine(model_dir)
    config = ObjectiveConfig(world_model_coeff=coeff, world=WorldOptions(every=2))
    first, second = [await engine.train_step(make_samples(), config) for _ in range(2)]
    assert first["world_model_coeff"] == 0.0 == first["world_grad_share"] and first["world_grad_norm_weights"] > 0
    assert second["world_model_coeff"] > 0 and second["world_grad_share"] > 0


async def test_observations_alone_have_nothing_to_compare(model_dir: Path) -> None:
    metrics = await make_engine(model_dir).train_step(make_samples(), ObjectiveConfig(policy_coeff=0.0))
    assert all(math.isnan(metrics[name]) for name in MEASURED)


async def test_an_engine_that_measures_nothing_refuses_a_share(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="measure_gradients_every above 0"):
        await make_engine(model_dir, measure_gradients_every=0).train_step(make_samples(), FIFTH)
