"""The objective on one page: GRPO on actions + lambda * cross-entropy on what the world answered (ECHO).

    policy = sum_t p_t * -min(r_t * adv, clip(r_t, 1 - eps_low, 1 + eps_high) * adv),  r_t = exp(logp_t - old_logp_t)
    world  = sum_t w_t * -logp_t
    total  = policy_coeff * policy + world_model_coeff * world

over action tokens (p_t > 0) and target tokens (w_t > 0). The weights hold every denominator, and every
denominator comes from one row or from the ``TokenCounts`` of the whole optimizer step: B rows, A_i action
tokens of row i, O_i its observation tokens (environment output + warnings), O'_i its target tokens, L =
``max_seq_len``. So losses of micro-batches add up to the loss of the step.

    normalizer                p_t             w_t
    sequence_mean             1 / (B |A_i|)   1 / (B |O_i|)       the published one for the world term
    sequence_mean_selected    -               1 / (B |O'_i|)
    token_mean                1 / sum |A_i|   1 / sum |O'_i|
    fixed_length              1 / (B L)       1 / (B L)

B sequences, T tokens. *_BT is [B, T], *_B is [B]. Position t of ``logprobs_BT`` is log p(token t | tokens before).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from backtalk.errors import ConfigError
from backtalk.samples import Batch, TokenCounts, WorldLossTarget, is_action, is_observation, is_target, roles_from_masks

PolicyNormalizer = Literal["sequence_mean", "token_mean", "fixed_length"]
WorldNormalizer = Literal["sequence_mean", "sequence_mean_selected", "token_mean", "fixed_length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """What is minimised. ``policy_coeff=0`` learns from observations alone and needs no verifier."""

    policy_coeff: float = 1.0
    world_model_coeff: float = 0.05  # lambda
    eps_low: float = 0.2
    eps_high: float = 0.2
    policy_normalizer: PolicyNormalizer = "sequence_mean"
    world_normalizer: WorldNormalizer = "sequence_mean"
    world_loss_target: WorldLossTarget = "env_only"
    max_seq_len: int | None = None  # tokens; the L of fixed_length, and used by nothing else

    def __post_init__(self) -> None:
        coefficients = (self.policy_coeff, self.world_model_coeff)
        if not all(c >= 0 for c in coefficients) or not any(coefficients):
            raise ConfigError(
                f"policy_coeff={self.policy_coeff}, world_model_coeff={self.world_model_coeff}: a negative coefficient "
                "unlearns what its term teaches, and two zeros leave nothing to learn; use >= 0 and one of them above 0"
            )
        if not 0 <= self.eps_low < 1 or self.eps_high < 0:
            raise ConfigError(f"eps_low={self.eps_low}, eps_high={self.eps_high}: use 0 <= eps_low < 1, eps_high >= 0")
        for name, known in (
            ("policy_normalizer", PolicyNormalizer),
            ("world_normalizer", WorldNormalizer),
            ("world_loss_target", WorldLossTarget),
        ):
            if getattr(self, name) not in get_args(known):
                raise ConfigError(f"{name}={getattr(self, name)!r} is unknown; use one of {list(get_args(known))}")
        if "fixed_length" in (self.policy_normalizer, self.world_normalizer):
            _length(self.max_seq_len)


def _length(max_seq_len: int | None) -> int:
    if max_seq_len is None or max_seq_len < 1:
        raise ConfigError(
            f"normalizer 'fixed_length' divides by max_seq_len, got {max_seq_len}; "
            "set it to the longest sequence that a rollout may reach, in tokens"
        )
    return max_seq_len


def token_weights(
    selected_BT: Tensor,
    row_tokens_BT: Tensor,
    *,
    normalizer: WorldNormalizer,
    sequences: int,
    selected_tokens: int,
    max_seq_len: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """Weight of every token in the loss, 0 outside ``selected_BT``; [B, T].

    ``row_tokens_BT`` are the tokens that ``sequence_mean`` divides a row by. ``sequences`` and
    ``selected_tokens`` are counts of the whole step. A row or step without such tokens gets zeros.
    """
    selected = selected_BT.to(dtype)
    match normalizer:
        case "sequence_mean":
            return selected / (sequences * row_tokens_BT.sum(-1, keepdim=True).clamp(min=1))
        case "sequence_mean_selected":
            return selected / (sequences * selected_BT.sum(-1, keepdim=True).clamp(min=1))
        case "token_mean":
            return selected / max(selected_tokens, 1)
        case "fixed_length":
            return selected / (sequences * _length(max_seq_len))
    raise ConfigError(f"normalizer={normalizer!r} is unknown; use one of {list(get_args(WorldNormalizer))}")


def policy_weights(batch: Batch, counts: TokenCounts, config: ObjectiveConfig, dtype: torch.dtype) -> Tensor:
    """p_t: weight of every action token of rows that have a reward, 0 elsewhere; [B, T]."""
    action_BT = is_action(batch.roles_BT)
    return token_weights(
        action_BT & batch.has_reward_B[:, None],
        action_BT,
        normalizer=config.policy_normalizer,
        sequences=counts.sequences,
        selected_tokens=counts.action_tokens,
        max_seq_len=config.max_seq_len,
        dtype=dtype,
    )


def world_weights(batch: Batch, counts: TokenCounts, config: ObjectiveConfig, dtype: torch.dtype) -> Tensor:
    """w_t: weight of every target token, 0 elsewhere; [B, T]."""
    target_BT = is_target(batch.roles_BT, batch.turns_BT, config.world_loss_target)
    return token_weights(
        target_BT,
        is_observation(batch.roles_BT) | target_BT,  # full_observation counts its scaffold too
        normalizer=config.world_normalizer,
        sequences=counts.sequences,
        selected_tokens=counts.target_tokens,
        max_seq_len=config.max_seq_len,
        dtype=dtype,
    )


def policy_loss(
    logprobs_BT: Tensor, old_BT: Tensor, advantages_B: Tensor, weights_BT: Tensor, eps_low: float, eps_high: float
) -> Tensor:
    """Clipped policy gradient (GRPO, arXiv 2402.03300, eq. 3 without KL); reads nothing where the weight is 0."""
    ratio_BT = (logprobs_BT - old_BT).masked_fill(weights_BT == 0, 0.0).exp()
    adv_B1 = advantages_B[:, None].to(logprobs_BT.dtype)
    surrogate_BT = torch.minimum(ratio_BT * adv_B1, ratio_BT.clamp(1 - eps_low, 1 + eps_high) * adv_B1)
    return -(surrogate_BT * weights_BT).sum()


def world_model_loss(logprobs_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """Weighted negative log-likelihood of target tokens, in nats (ECHO, eq. 3)."""
    return -(logprobs_BT.masked_fill(weights_BT == 0, 0.0) * weights_BT).sum()


def world_model_loss_from_masks(
    logprobs_BT: Tensor,
    env_mask_BT: Tensor,
    warning_mask_BT: Tensor,
    *,
    normalizer: WorldNormalizer,
    target: WorldLossTarget = "env_only",
    max_seq_len: int | None = None,
) -> Tensor:
    """The world-model term from bare tensors, where all rows of the step are given at once; scalar, in nats.

    The masks are bool and disjoint, aligned with ``logprobs_BT``: column t speaks of token t. Template roles
    are not known here, so ``full_observation`` is refused with ConfigError.
    """
    if target == "full_observation":
        raise ConfigError("target='full_observation' needs the roles of template tokens; use objective() on a Batch")
    roles_BT = roles_from_masks(env_mask_BT, warning_mask_BT, shape=logprobs_BT.shape)
    target_BT = is_target(roles_BT, roles_BT, target)
    weights_BT = token_weights(
        target_BT,
        is_observation(roles_BT),
        normalizer=normalizer,
        sequences=len(logprobs_BT),
        selected_tokens=int(target_BT.sum()),
        max_seq_len=max_seq_len,
        dtype=logprobs_BT.dtype,
    )
    return world_model_loss(logprobs_BT, weights_BT)


def objective(
    logprobs_BT: Tensor, batch: Batch, counts: TokenCounts, config: ObjectiveConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one micro-batch, and both terms before their coefficients; all add up over the step.

    A term whose coefficient is 0 is measured and takes no part in the graph: with ``world_model_coeff=0``
    the total is plain GRPO bit for bit.
    """
    p_BT = policy_weights(batch, counts, config, logprobs_BT.dtype)
    w_BT = world_weights(batch, counts, config, logprobs_BT.dtype)
    old_BT = batch.sampling_logprobs_BT.to(logprobs_BT.dtype)
    with torch.set_grad_enabled(torch.is_grad_enabled() and config.policy_coeff > 0):
        policy = policy_loss(logprobs_BT, old_BT, batch.advantages_B, p_BT, config.eps_low, config.eps_high)
    with torch.set_grad_enabled(torch.is_grad_enabled() and config.world_model_coeff > 0):
        world = world_model_loss(logprobs_BT, w_BT)
    total = policy if config.policy_coeff == 1 else config.policy_coeff * policy
    if config.world_model_coeff > 0:
        world_part = config.world_model_coeff * world
        total = world_part if config.policy_coeff == 0 else total + world_part
    terms = {"policy_loss": policy, "world_model_loss": world, "total_loss": total}
    return total, {name: value.detach() for name, value in terms.items()}
