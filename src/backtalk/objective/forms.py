"""Published variants of both terms as losses per token, which ``loss`` weighs and sums.

B samples, T tokens. *_BT is [B, T], *_B is [B], *_B1 is [B, 1]. Every function returns [B, T]; its values at tokens
without weight are finite and have no meaning.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from backtalk.errors import ConfigError
from backtalk.objective.config import PolicyLoss, WorldLoss

MAE_MARGIN = 0.2  # rho of PaW: tokens predicted with more than 1 - rho have no gradient


def policy_surrogate(
    logprobs_BT: Tensor,
    old_BT: Tensor,
    advantages_B: Tensor,
    trained_BT: Tensor,
    clip: tuple[float, float],
    loss: PolicyLoss,
) -> Tensor:
    """Return the policy loss of each token, by the name of the loss; ConfigError for an unknown one."""
    log_ratio_BT = (logprobs_BT - old_BT).masked_fill(~trained_BT, 0.0)
    adv_B1 = advantages_B[:, None].to(logprobs_BT.dtype)
    match loss:
        case "clip":
            return clipped_surrogate(log_ratio_BT.exp(), adv_B1, clip)
        case "gspo":
            return clipped_surrogate(sequence_ratio(log_ratio_BT, trained_BT), adv_B1, clip)
        case "cispo":
            return cispo_surrogate(logprobs_BT, log_ratio_BT.exp(), adv_B1, clip)
    raise ConfigError(f"policy.loss={loss!r} is unknown; use one of {list(get_args(PolicyLoss))}")


def clipped_surrogate(ratio_BT: Tensor, adv_B1: Tensor, clip: tuple[float, float]) -> Tensor:
    """Return -min(r adv, clip(r, 1 - eps_low, 1 + eps_high) adv) (GRPO, arXiv 2402.03300, eq. 3; DAPO, 2503.14476)."""
    return -torch.minimum(ratio_BT * adv_B1, ratio_BT.clamp(1 - clip[0], 1 + clip[1]) * adv_B1)


def sequence_ratio(log_ratio_BT: Tensor, trained_BT: Tensor) -> Tensor:
    """Return one ratio a sample, the geometric mean over its trained tokens (GSPO, arXiv 2507.18071, eq. 7)."""
    n_B1 = trained_BT.sum(-1, keepdim=True).clamp(min=1)
    return (log_ratio_BT.sum(-1, keepdim=True) / n_B1).exp().expand_as(log_ratio_BT)


def cispo_surrogate(logprobs_BT: Tensor, ratio_BT: Tensor, adv_B1: Tensor, clip: tuple[float, float]) -> Tensor:
    """Return -stop_gradient(clip(r)) adv logp: clipped tokens keep a gradient (CISPO, arXiv 2506.13585, eq. 4)."""
    return -ratio_BT.detach().clamp(1 - clip[0], 1 + clip[1]) * adv_B1 * logprobs_BT


def importance_weights(logprobs_BT: Tensor, sampling_BT: Tensor, trained_BT: Tensor, cap: float) -> Tensor:
    """Return min(p_trainer / p_sampler, cap) without a gradient, which corrects for a sampler of other numerics.

    Truncated importance sampling (Ionides 2008; for rollouts of another engine, Yao et al. 2025).
    """
    gap_BT = (logprobs_BT.detach() - sampling_BT).masked_fill(~trained_BT, 0.0)
    return gap_BT.exp().clamp(max=cap)


def kl_to_reference(logprobs_BT: Tensor, reference_BT: Tensor, trained_BT: Tensor) -> Tensor:
    """Estimate KL(policy || reference) as exp(d) - d - 1 with d = log q - log p, in nats; never negative.

    GRPO, arXiv 2402.03300, eq. 4 (Schulman's k3 estimator).
    """
    d_BT = (reference_BT - logprobs_BT).masked_fill(~trained_BT, 0.0)
    return d_BT.exp() - d_BT - 1


def world_token_loss(logprobs_BT: Tensor, target_BT: Tensor, loss: WorldLoss) -> Tensor:
    """Return the world-model loss of each token, by the name of the loss; ConfigError for an unknown one."""
    logprobs_BT = logprobs_BT.masked_fill(~target_BT, 0.0)
    match loss:
        case "cross_entropy":
            return -logprobs_BT
        case "clipped_mae":
            return clipped_mae(logprobs_BT)
    raise ConfigError(f"world.loss={loss!r} is unknown; use one of {list(get_args(WorldLoss))}")


def clipped_mae(logprobs_BT: Tensor) -> Tensor:
    """Return max(1 - p - rho, 0), whose slope in log p is -p: unpredictable tokens pull little.

    PaW (arXiv 2606.02388) names the loss and rho = 0.2. That it is 0 above p = 1 - rho, rather than above rho, is our
    reading of "tokens already predicted well stop contributing".
    """
    return (1 - logprobs_BT.exp() - MAE_MARGIN).clamp(min=0)
