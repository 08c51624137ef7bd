"""What the embedded engine must do on any device, here and on a GPU, each error beside its bound.

Every test runs on the CPU and, marked `gpu`, on CUDA. The errors are recorded as properties, which
`pytest --junitxml` writes and `scripts/gpu_check correctness` reads. None of them needs pytest-asyncio.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backtalk.engines.torch import head as torch_head
from backtalk.engines.torch.engine import TorchEngine
from backtalk.objective.coefficient import Share
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.samples import build_samples
from backtalk.rollout.sampler import SamplingParams
from backtalk.trajectory import Segment, TokenRole, Trajectory, TrajectoryGroup
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

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
Bounded = Callable[[str, float, float], None]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def bounded(request: pytest.FixtureRequest) -> Bounded:
    def check(name: str, error: float, bound: float) -> None:
        request.node.user_properties.append((name, f"{error:.3g} <= {bound:.3g}"))
        assert error <= bound, name

    return check


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Return the norm of the difference over the norm of the second, over all tensors together."""
    assert len(ours) == len(theirs)
    a, b = (torch.cat([t.detach().double().cpu().flatten() for t in some]) for some in (ours, theirs))
    return float((a - b).norm() / b.norm())


def in_float64(model_dir: Path, config: ObjectiveConfig = BOTH) -> tuple[float, list[Tensor]]:
    return gradients(make_engine(model_dir, dtype="float64"), build_samples(make_group(MIXED)), config)


def test_coefficient_zero_is_plain_grpo(model_dir: Path, device: str, bounded: Bounded) -> None:
    samples = build_samples(make_group(MIXED))
    loss, grads = gradients(make_engine(model_dir, device=device, packing="off"), samples, PLAIN)
    for name, head in (("the same head", fused_head), ("a plain head", plain_head)):
        model = make_engine(model_dir, device=device).model
        grpo = plain_grpo(model, samples, head)
        grpo.backward()
        bounded(f"loss, {name}", abs(loss - grpo.item()), 0.0 if head is fused_head else 1e-6)
        bounded(f"gradient, {name}", distance(grads, [p.grad for p in model.parameters()]), 1e-5)


def test_the_world_term_adds_its_own_gradient(model_dir: Path, device: str, bounded: Bounded) -> None:
    samples = build_samples(make_group(MIXED))
    both, policy, world = (
        gradients(make_engine(model_dir, device=device), samples, config)[1]
        for config in (BOTH, PLAIN, ObjectiveConfig(policy_coeff=0.0, world_model_coeff=0.3))
    )
    bounded("gradient", distance(both, [p + w for p, w in zip(policy, world, strict=True)]), 1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("hint", [False, True])
def test_the_head_in_chunks_against_float64(
    device: str, dtype: str, bound: float, hint: bool, bounded: Bounded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_head, "MAX_LOGITS", 5000 * 37)  # chunks of 37 tokens
    noise = torch.Generator().manual_seed(0)
    states, weight = torch.randn(300, 64, generator=noise), torch.randn(5000, 64, generator=noise) / 8
    ids, upstream = torch.randint(5000, (300,), generator=noise), -torch.rand(300, generator=noise)
    temperature = torch.where(torch.rand(300, generator=noise) < 0.5, 0.7, 1.0)

    def results(where: str, kind: torch.dtype) -> list[Tensor]:
        s, w = (t.to(where, getattr(torch, dtype)).to(kind).requires_grad_() for t in (states, weight))
        known = upstream.masked_fill(torch.arange(300) % 4 == 0, 0.0).to(where) if hint else None
        given = ids.to(where), temperature.to(where)
        logprobs = torch_head.head_logprobs(s, w, None, *given, known)
        logprobs.backward(upstream.to(where, logprobs.dtype))
        assert s.grad is not None and w.grad is not None
        return [logprobs, s.grad, w.grad]

    def naive() -> list[Tensor]:
        s, w = (t.to(getattr(torch, dtype)).double().requires_grad_() for t in (states, weight))
        logprobs = torch.log_softmax(s @ w.T / temperature[:, None], -1).gather(-1, ids[:, None])[:, 0]
        return [logprobs, *torch.autograd.grad(logprobs, [s, w], upstream.double())]

    for name, ours, theirs in zip(
        ("log-probabilities", "gradient of states", "gradient of weights"),
        results(device, getattr(torch, dtype)),
        naive(),
        strict=True,
    ):
        bounded(name, distance([ours], [theirs]), bound)


@pytest.mark.parametrize(
    ("settings", "loss_bound", "gradient_bound"),
    [
        ({"dtype": "float32"}, 1e-6, 1e-5),
        ({"dtype": "float32", "gradient_checkpointing": True}, 1e-6, 1e-5),
        ({"dtype": "float32", "packing": "on"}, 1e-6, 1e-5),
        ({"dtype": "float32", "max_tokens_per_microbatch": 80}, 1e-6, 1e-5),
        ({"dtype": "bfloat16"}, 2e-3, 3e-2),
    ],
    ids=str,
)
def test_loss_and_gradient_against_float64_on_the_cpu(
    model_dir: Path, device: str, settings: dict[str, Any], loss_bound: float, gradient_bound: float, bounded: Bounded
) -> None:
    loss, grads = in_float64(model_dir)
    seen, ours = gradients(make_engine(model_dir, device=device, **settings), build_samples(make_group(MIXED)), BOTH)
    bounded("loss", abs(seen - loss), loss_bound)
    bounded("gradient", distance(ours, grads), gradient_bound)


def test_lora_in_bfloat16(model_dir: Path, device: str, bounded: Bounded) -> None:
    samples = build_samples(make_group(MIXED))
    settings: dict[str, Any] = {"lora_rank": 4, "learning_rate": 1e-2}
    _, exact = gradients(make_engine(model_dir, dtype="float64", **settings), samples, BOTH)
    engine = make_engine(model_dir, device=device, dtype="bfloat16", **settings)
    _, ours = gradients(engine, samples, BOTH)
    bounded("gradient of adapters", distance(ours, exact), 3e-2)
    trained = {n: p for n, p in engine.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32} and all("lora_" in name for name in trained)
    frozen = {n: p.detach().clone() for n, p in engine.model.named_parameters() if n not in trained}
    engine._optimizer.zero_grad()
    losses = [asyncio.run(engine.train_step(samples, BOTH))["total_loss"] for _ in range(4)]
    assert losses[-1] < losses[0] - 0.01
    now = dict(engine.model.named_parameters())
    assert all(torch.equal(now[name], before) for name, before in frozen.items())


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({"dtype": dtype, "batching": batching}, bound)
        for dtype, bound in (("float32", 1e-4), ("bfloat16", 0.03))
        for batching in ("wave", "continuous")
    ],
    ids=str,
)
def test_sampler_and_trainer_agree_over_turns(
    model_dir: Path, device: str, settings: dict[str, Any], bound: float, bounded: Bounded
) -> None:
    engine = make_engine(model_dir, device=device, **settings)

    async def rollout(index: int, sampler: Any) -> Trajectory:
        noise = random.Random(index)
        history = [noise.randrange(7, 400) for _ in range(10 + 7 * index)]
        segments = [Segment(TokenRole.CONTEXT, tuple(history))]
        async with sampler.session(f"{index}") as session:
            for turn in range(3):
                completion = await session.sample(history)
                said = tuple(noise.randrange(7, 400) for _ in range(5 + 9 * turn))
                history += [*completion.token_ids, *said]
                segments += [
                    Segment(TokenRole.ACTION, completion.token_ids, completion.logprobs, turn=turn),
                    Segment(TokenRole.ENV_OUTPUT, said, turn=turn),
                ]
        return Trajectory(task_id="t", sample_index=index, segments=tuple(segments), reward=float(index % 2))

    async def rollouts() -> TrajectoryGroup:
        sampler = engine.sampler(SamplingParams(temperature=0.7, max_tokens=12))
        return TrajectoryGroup("t", tuple(await asyncio.gather(*(rollout(i, sampler) for i in range(4)))))

    samples = build_samples(asyncio.run(rollouts()), temperature=0.7)
    metrics = asyncio.run(engine.train_step(samples, PLAIN))
    bounded("largest difference of a token's log-probability", metrics["sampler_logprob_gap"], bound)
    bounded("mean ratio, from 1", abs(metrics["ratio_mean"] - 1), bound / 10)


@pytest.mark.parametrize(
    "settings", [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "lora_rank": 4}], ids=str
)
def test_a_resumed_run_goes_on(
    model_dir: Path, tmp_path: Path, device: str, settings: dict[str, Any], bounded: Bounded
) -> None:
    """To the bit on a CPU; on a GPU up to the order in which its kernels add."""

    def go(engine: TorchEngine, first: int, last: int) -> list[float]:
        groups = [make_group(rewards, i) for i, rewards in enumerate((MIXED, EQUAL, MIXED, EQUAL))]
        return [asyncio.run(engine.train_step(build_samples(g), BOTH))["total_loss"] for g in groups[first:last]]

    def new() -> TorchEngine:
        return make_engine(model_dir, device=device, warmup_steps=3, learning_rate=1e-3, **settings)

    whole, first, second = new(), new(), new()
    expected = go(whole, 0, 4)
    go(first, 0, 2)
    first.save(tmp_path / "checkpoint")
    second.load(tmp_path / "checkpoint")
    assert torch.equal(weights(second), weights(first))
    exact = device == "cpu"
    losses = zip(go(second, 2, 4), expected[2:], strict=True)
    bounded("loss", max(abs(a - b) for a, b in losses), 0.0 if exact else 1e-3)
    bounded("weights", distance([weights(second)], [weights(whole)]), 0.0 if exact else 1e-3)


def test_a_share_is_kept_from_measured_gradients(model_dir: Path, device: str, bounded: Bounded) -> None:
    config = ObjectiveConfig(world_model_coeff=Share(0.25))
    engine = make_engine(model_dir, device=device, measure_gradients_every=1)
    samples = build_samples(make_group(MIXED))
    rows = [asyncio.run(engine.train_step(samples, config)) for _ in range(2)]
    bounded("share, from 0.25", abs(rows[-1]["world_grad_share"] - 0.25), 0.02)
