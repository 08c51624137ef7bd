"""d(loss)/d(logprob) of every token of a step, from log-probabilities that a service returned.

B samples, T tokens. *_BT is [B, T].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from backtalk.engines.metrics import StepRecord
from backtalk.errors import ConfigError
from backtalk.objective.batch import TokenCounts, collate
from backtalk.objective.coefficient import Share
from backtalk.objective.config import NO_SHARE, ObjectiveConfig
from backtalk.objective.loss import objective
from backtalk.objective.samples import Sample

ROWS = 64  # samples padded together; changes memory, not results


@dataclass(frozen=True, slots=True)
class StepGradients:
    """The loss of a step, and its derivative in each token's log-probability."""

    losses: dict[str, float]
    record: StepRecord
    norm: float  # L2 norm over all tokens
    policy_norm: float  # over sampled actions, the tokens of the policy term

    def rows(self) -> tuple[list[list[int]], list[list[float]], list[list[float]]]:
        """Return token ids, gradients and log-probabilities of the rows with a gradient, the last two without a
        row's first token.
        """
        zipped = zip(self.record.samples, self.record.gradients, self.record.logprobs, strict=True)
        kept = [(s.token_ids.tolist(), g[1:].tolist(), x[1:].tolist()) for s, g, x in zipped if bool(g[1:].any())]
        ids, gradients, logprobs = ([row[i] for row in kept] for i in range(3))
        return ids, gradients, logprobs


def check_objective(samples: Sequence[Sample], config: ObjectiveConfig) -> None:
    """Raise ConfigError for options of the objective that a service cannot keep."""
    if isinstance(config.world_model_coeff, Share):
        raise ConfigError(NO_SHARE)
    if config.policy.kl_coeff > 0:
        raise ConfigError(
            f"policy.kl_coeff={config.policy.kl_coeff} needs log-probabilities of the base model, which a model in "
            "training on a service does not return; use kl_coeff=0"
        )
    if odd := {sample.temperature for sample in samples} - {1.0}:
        raise ConfigError(
            f"the service trains on log-probabilities at temperature 1, and actions were sampled at {min(odd):g}, "
            "where the ratio would compare two temperatures; use temperature=1.0"
        )


def step_gradients(
    samples: Sequence[Sample], logprobs: Sequence[Sequence[float]], counts: TokenCounts, config: ObjectiveConfig
) -> StepGradients:
    """Return the gradient of the objective; ``logprobs`` holds one number a token, 0 for a sample's first."""
    losses = {"policy_loss": 0.0, "world_model_loss": 0.0, "total_loss": 0.0}
    record, square, policy_square = StepRecord(), 0.0, 0.0
    for start in range(0, len(samples), ROWS):
        part = samples[start : start + ROWS]
        batch = collate(part, 0)
        rows = [torch.tensor(row, dtype=torch.float64) for row in logprobs[start : start + ROWS]]
        logprobs_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).requires_grad_()
        loss, terms = objective(logprobs_BT, batch, counts, config)
        if loss.requires_grad:
            loss.backward()
        for name in losses:
            losses[name] += float(terms[name])
        record.add(part, batch, logprobs_BT)
        if logprobs_BT.grad is not None:
            square += float(logprobs_BT.grad.square().sum())
            policy_square += float(logprobs_BT.grad[batch.sampled_BT].square().sum())
    return StepGradients(losses, record, square**0.5, policy_square**0.5)
