"""Measure a model's predictions of a terminal's output: nats, share of tokens right, and a few samples to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from backtalk.engines.metrics import copied_mask
from backtalk.engines.torch.engine import TorchEngine
from backtalk.objective.samples import to_samples
from backtalk.trajectory import TokenRole, Trajectory


@dataclass(frozen=True, slots=True)
class Measure:
    """Means over ENV_OUTPUT tokens, each given the true text before it."""

    nats_per_token: float
    nats_per_new_token: float  # without text that stands in the command it answers
    accuracy: float  # share of tokens that were the likeliest
    exact: float  # share of observations that greedy decoding gets right to the last token


@dataclass(frozen=True, slots=True)
class Prediction:
    """One observation: the command, its output, and the output that the model predicted."""

    command: str
    truth: str
    predicted: str


@torch.no_grad()
def measure(engine: TorchEngine, trajectories: Sequence[Trajectory]) -> Measure:
    """Measure trajectories; an observation is exact where each token is the likeliest after the true ones."""
    nats = new_nats = right = 0.0
    tokens = new_tokens = observations = exact = 0
    for trajectory in trajectories:
        (sample,) = to_samples(trajectory)
        logits = engine.model(input_ids=sample.token_ids[None, :-1].to(engine.device)).logits[0].float().log_softmax(-1)
        targets = sample.token_ids[1:].to(logits.device)
        loss, hit = -logits.gather(1, targets[:, None])[:, 0], logits.argmax(1) == targets
        said = sample.roles[1:] == TokenRole.ENV_OUTPUT
        new = said & ~copied_mask(sample)[1:]
        nats, tokens = nats + float(loss[said].sum()), tokens + int(said.sum())
        new_nats, new_tokens = new_nats + float(loss[new].sum()), new_tokens + int(new.sum())
        right += float(hit[said].sum())
        for start, end, segment in trajectory.spans():
            if segment.role is TokenRole.ENV_OUTPUT:
                observations, exact = observations + 1, exact + bool(hit[start - 1 : end - 1].all())
    return Measure(nats / tokens, new_nats / max(new_tokens, 1), right / tokens, exact / observations)


@torch.no_grad()
def predictions(engine: TorchEngine, trajectories: Sequence[Trajectory], count: int) -> list[Prediction]:
    """Return predictions for the first observation of ``count`` rollouts, decoded greedily to the true length."""
    found: list[Prediction] = []
    for trajectory in trajectories:
        said = next(((s, e) for s, e, segment in trajectory.spans() if segment.role is TokenRole.ENV_OUTPUT), None)
        if said is None or len(found) == count:
            continue
        start, end = said
        ids = list(trajectory.token_ids[:start])
        for _ in range(start, end):
            logits = engine.model(input_ids=torch.tensor([ids], device=engine.device)).logits[0, -1]
            ids.append(int(logits.argmax()))
        decode = engine.tokenizer.decode
        found.append(
            Prediction(
                command=_first_command(trajectory, decode),
                truth=decode(list(trajectory.token_ids[start:end])),
                predicted=decode(ids[start:]),
            )
        )
    return found


def _first_command(trajectory: Trajectory, decode: Callable[..., str]) -> str:
    action = next(segment for segment in trajectory.segments if segment.role is TokenRole.ACTION)
    return decode(list(action.token_ids), skip_special_tokens=True).strip()
