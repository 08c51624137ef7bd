"""Rollouts of random tokens, and engines on a tiny model, for tests of the embedded engine."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backtalk.engines.torch.config import TorchConfig
from backtalk.engines.torch.engine import TorchEngine
from backtalk.engines.torch.head import head_logprobs
from backtalk.objective.batch import TokenCounts
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.samples import Sample
from backtalk.trajectory import Segment, TokenRole, Trajectory, TrajectoryGroup

CONTEXT, TEMPLATE, ACTION, ENV_OUTPUT, WARNING = TokenRole
PLAIN = ObjectiveConfig(world_model_coeff=0.0)
BOTH = ObjectiveConfig(world_model_coeff=0.3)
MIXED = (1.0, 0.0, 0.0, 1.0, 0.5)  # rewards of a group
EQUAL = (1.0, 1.0, 1.0)


def make_engine(model_dir: Path, **settings: Any) -> TorchEngine:
    return TorchEngine(TorchConfig(model=str(model_dir), **{"dtype": "float32", "device": "cpu", **settings}))


def make_trajectory(noise: random.Random, index: int, reward: float | None) -> Trajectory:
    def ids(count: int) -> tuple[int, ...]:
        return tuple(noise.randrange(7, 400) for _ in range(count))

    segments = [Segment(CONTEXT, ids(6)), Segment(TEMPLATE, ids(2))]
    for turn in range(2):
        n = noise.randrange(2, 7)
        segments += [
            Segment(ACTION, ids(n), tuple(-6.2 + noise.random() / 4 for _ in range(n)), turn=turn, tool="bash"),
            Segment(TEMPLATE, ids(2), turn=turn),
            Segment(ENV_OUTPUT, ids(noise.randrange(1, 12)), turn=turn, tool="bash"),
            Segment(WARNING, ids(2), turn=turn, tool="bash"),
        ]
    return Trajectory(task_id="t", sample_index=index, segments=tuple(segments), reward=reward)


def make_group(rewards: Sequence[float | None], seed: int = 0) -> TrajectoryGroup:
    noise = random.Random(seed)
    return TrajectoryGroup("t", tuple(make_trajectory(noise, i, reward) for i, reward in enumerate(rewards)))


def gradients(engine: TorchEngine, samples: list[Sample], config: ObjectiveConfig) -> tuple[float, list[Tensor]]:
    """Return loss and gradient of a step without an update."""
    engine._optimizer.zero_grad()
    losses, _, _ = engine._accumulate(samples, TokenCounts.of(samples, config.world_loss_target), config)
    return losses["total_loss"], [m.grad.clone() for m in engine._optimizer._masters if m.grad is not None]


def weights(engine: TorchEngine) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in engine.model.parameters()])


def plain_grpo(model: Any, samples: Sequence[Sample], head: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Compute GRPO alone on the model's own layers, without observations."""
    rows, device = sorted(samples, key=len, reverse=True), model.device
    ids_BT = torch.nn.utils.rnn.pad_sequence([s.token_ids for s in rows], batch_first=True).to(device)
    old_BT = torch.nn.utils.rnn.pad_sequence([s.sampling_logprobs for s in rows], batch_first=True).to(device)
    mask_BT = torch.nn.utils.rnn.pad_sequence([s.roles == ACTION for s in rows], batch_first=True).to(device)
    states_ND = model.model(ids_BT).last_hidden_state[:, :-1][mask_BT[:, 1:]]
    logprobs_BT = torch.zeros(ids_BT.shape, device=device)
    logprobs_BT[mask_BT] = head(states_ND, model.lm_head.weight, ids_BT[mask_BT])
    ratio_BT = torch.exp((logprobs_BT - old_BT) * mask_BT)
    adv_B1 = torch.tensor([s.advantage for s in rows], device=device)[:, None]
    gain_BT = torch.min(ratio_BT * adv_B1, ratio_BT.clamp(0.8, 1.2) * adv_B1)
    return -(gain_BT * (mask_BT / (len(rows) * mask_BT.sum(1, keepdim=True)))).sum()


def plain_head(states_ND: Tensor, weight_VD: Tensor, token_ids_N: Tensor) -> Tensor:
    return torch.log_softmax(states_ND @ weight_VD.T, -1).gather(-1, token_ids_N[:, None])[:, 0]


def fused_head(states_ND: Tensor, weight_VD: Tensor, token_ids_N: Tensor) -> Tensor:
    return head_logprobs(states_ND, weight_VD, None, token_ids_N, torch.ones_like(states_ND[:, 0]))
