"""However a step is split over ranks, micro-batches and rows, its loss and gradient are the same.

The model is a small causal attention layer in float64. Ranks are real gloo processes, which see their own rows
alone and exchange two things: the token counts of the step, and gradients, summed.
"""

from __future__ import annotations

import random
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional

from backtalk.objective import objective
from backtalk.objective.batch import Batch, TokenCounts, collate
from backtalk.objective.config import ObjectiveConfig, PolicyOptions, WorldOptions
from backtalk.objective.samples import Sample, build_samples
from backtalk.trajectory import Segment, TokenRole, Trajectory, TrajectoryGroup

CONTEXT, TEMPLATE, ACTION, ENV_OUTPUT, WARNING = TokenRole
VOCAB = 23

CONFIGS = {
    "paper": ObjectiveConfig(world_model_coeff=0.3),
    "token_mean": ObjectiveConfig(
        world_model_coeff=0.3, policy_normalizer="token_mean", world_normalizer="token_mean", clip=(0.2, 0.28)
    ),
    "selected": ObjectiveConfig(
        world_model_coeff=0.3,
        world_normalizer="sequence_mean_selected",
        world=WorldOptions(weights={"tool:bash": 0.5}, max_tokens_per_observation=3),
    ),
    "fixed_length": ObjectiveConfig(
        world_model_coeff=0.3,
        policy_normalizer="fixed_length",
        world_normalizer="fixed_length",
        world_loss_target="full_observation",
        max_seq_len=64,
        policy=PolicyOptions(loss="gspo", advantage="rloo"),
    ),
}


class Attention(nn.Module):
    """A tiny language model: token embeddings, one causal attention and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 8)
        self.mix = nn.Linear(8, 24)
        self.head = nn.Linear(8, VOCAB)

    def logprobs(self, token_ids_BT: Tensor) -> Tensor:
        x = self.embedding(token_ids_BT)
        q, k, v = self.mix(x).split(8, -1)
        states = x + functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        logprobs_BT = functional.log_softmax(self.head(states[:, :-1]), -1)
        logprobs_BT = logprobs_BT.gather(-1, token_ids_BT[:, 1:, None])[..., 0]
        return functional.pad(logprobs_BT, (1, 0))


def model() -> Attention:
    torch.manual_seed(0)
    return Attention().double()


def step_samples(config: ObjectiveConfig) -> list[Sample]:
    """Make two groups of four rows of all lengths, one each without an observation, an action and a reward."""
    noise = random.Random(1)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(noise.randrange(1, VOCAB) for _ in range(n))

    def rollout(task: str, i: int) -> Trajectory:
        segments = [Segment(CONTEXT, ids(3)), Segment(TEMPLATE, ids(1))]
        for turn in range(0 if (task, i) == ("b", 2) else 1 + i):
            n = 1 + noise.randrange(4)
            segments.append(Segment(ACTION, ids(n), tuple(-noise.uniform(2, 4) for _ in range(n)), turn=turn))
            segments.append(Segment(TEMPLATE, ids(2), turn=turn, tool="bash"))
            if (task, i) != ("a", 0):
                segments.append(Segment(ENV_OUTPUT, ids(noise.randrange(7)), turn=turn, tool="bash"))
                segments.append(Segment(WARNING, ids(1), turn=turn, tool="bash"))
        reward = None if (task, i) == ("b", 1) else float(i % 3)
        return Trajectory(task_id=task, sample_index=i, segments=tuple(segments), reward=reward)

    groups = [TrajectoryGroup(task, tuple(rollout(task, i) for i in range(4))) for task in "ab"]
    return [sample for group in groups for sample in build_samples(group, config)]


def accumulate(
    net: Attention, samples: list[Sample], counts: TokenCounts, config: ObjectiveConfig, parts: int
) -> float:
    """Accumulate the gradients of the samples in ``parts`` micro-batches and return their loss."""
    loss = 0.0
    for part in (samples[i::parts] for i in range(parts)):
        if part:
            batch = collate(part, 0)
            total, _ = objective(net.logprobs(batch.token_ids_BT), batch, counts, config)
            total.backward()
            loss += total.item()
    return loss


def flat_gradient(net: Attention) -> Tensor:
    return torch.cat(
        [torch.zeros(p.numel()).double() if p.grad is None else p.grad.flatten() for p in net.parameters()]
    )


def whole_step(name: str) -> tuple[float, Tensor]:
    net, config = model(), CONFIGS[name]
    samples = step_samples(config)
    counts = TokenCounts.of(samples, config.world_loss_target)
    loss = accumulate(net, samples, counts, config, 1)
    return loss, flat_gradient(net)


def rank_step(rank: int, world_size: int, store: str, results: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    found: dict[str, Any] = {}
    for name, config in CONFIGS.items():
        net, everyone = model(), step_samples(config)
        # The last rank of four has one row alone, the one without an action or observation.
        shards = [everyone[r : len(everyone) - 2 : world_size] for r in range(world_size)]
        shards[-1] = [*everyone[-2:-1], *(shards[-1] if world_size < 4 else [])]
        shards[0] = [*shards[0], everyone[-1], *(everyone[3:-2:4] if world_size == 4 else [])]
        mine = shards[rank]
        counted: list[Any] = [None] * world_size
        dist.all_gather_object(counted, TokenCounts.of(mine, config.world_loss_target))
        counts = sum(counted[1:], counted[0])
        loss = torch.tensor([accumulate(net, mine, counts, config, 1 + rank % 2)], dtype=torch.float64)
        gradient = flat_gradient(net)
        dist.all_reduce(loss)
        dist.all_reduce(gradient)
        found[name] = (loss.item(), gradient)
    if rank == 0:
        torch.save(found, results)
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))])
def test_ranks_add_up_to_the_step(world_size: int, tmp_path: Path) -> None:
    results = tmp_path / "results.pt"
    mp.spawn(rank_step, (world_size, str(tmp_path / "store"), str(results)), nprocs=world_size)  # type: ignore
    found = torch.load(results)
    for name in CONFIGS:
        loss, gradient = whole_step(name)
        assert found[name][0] == pytest.approx(loss, abs=1e-12), name
        torch.testing.assert_close(found[name][1], gradient, rtol=0, atol=1e-12)
        assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_gradient_accumulation_and_order_change_nothing(name: str, parts: int) -> None:
    loss, gradient = whole_step(name)
    net, config = model(), CONFIGS[name]
    samples = step_samples(config)
    counts = TokenCounts.of(samples, config.world_loss_target)
    random.Random(parts).shuffle(samples)
    assert accumulate(net, samples, counts, config, parts) == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(flat_gradient(net), gradient, rtol=0, atol=1e-12)


def left_padded(batch: Batch, extra: int) -> Batch:
    """Move the padding of a batch to the front, and add ``extra`` columns of it."""
    padding = {
        "token_ids_BT": 0,
        "roles_BT": int(CONTEXT),
        "turns_BT": -1,
        "sampled_BT": 0,
        "sampling_logprobs_BT": 0,
        "world_scale_BT": 0,
    }
    shift = (batch.lengths_B.max() - batch.lengths_B).tolist()
    moved = {}
    for field in fields(Batch):
        if field.name in padding:
            rows = [row.roll(n) for row, n in zip(getattr(batch, field.name), shift, strict=True)]
            moved[field.name] = functional.pad(torch.stack(rows), (extra, 0), value=padding[field.name])
    return replace(batch, **moved)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("extra", [0, 5])
def test_the_side_and_amount_of_padding_change_nothing(name: str, extra: int) -> None:
    config = CONFIGS[name]
    samples = step_samples(config)
    batch, counts = collate(samples, 0), TokenCounts.of(samples, config.world_loss_target)
    noise = torch.Generator().manual_seed(0)
    logprobs_BT = -3 * torch.rand(batch.token_ids_BT.shape, generator=noise, dtype=torch.float64)
    left = left_padded(batch, extra)
    real_BT = torch.arange(batch.token_ids_BT.shape[1]) < batch.lengths_B[:, None]
    moved_BT = torch.full(left.token_ids_BT.shape, -99.0, dtype=torch.float64)
    for row, n in enumerate(batch.lengths_B.tolist()):
        moved_BT[row, -n:] = logprobs_BT[row, :n]
    one_BT, other_BT = logprobs_BT.requires_grad_(), moved_BT.requires_grad_()
    total, _ = objective(one_BT, batch, counts, config)
    again, _ = objective(other_BT, left, counts, config)
    total.backward()
    again.backward()
    assert again.item() == pytest.approx(total.item(), abs=1e-12)
    assert one_BT.grad is not None and other_BT.grad is not None
    assert not one_BT.grad[~real_BT].any()
    for row, n in enumerate(batch.lengths_B.tolist()):
        torch.testing.assert_close(other_BT.grad[row, -n:], one_BT.grad[row, :n], rtol=0, atol=1e-12)
        assert not other_BT.grad[row, :-n].any()
