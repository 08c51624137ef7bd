"""The objective on one page: GRPO on action tokens + lambda * cross-entropy on environment output (ECHO).

    policy = sum_t p_t * -min(r_t * adv, clip(r_t, 1 - eps_low, 1 + eps_high) * adv),  r_t = exp(logp_t - old_logp_t)
    world  = sum_t w_t * -logp_t
    total  = policy_coeff * policy + world_model_coeff * world

over sampled action tokens (p_t > 0) and target tokens (w_t > 0). The weights hold every denominator, and every
denominator comes from one row or from the ``TokenCounts`` of the whole optimizer step: B rows, A_i sampled
action tokens of row i, O_i its observation tokens (environment output + warnings), O'_i its target tokens, L =
``max_seq_len``. So the losses of micro-batches sum to the loss of the step.

    normalizer                p_t             w_t / s_t
    sequence_mean             1 / (B |A_i|)   1 / (B |O_i|)       the published one for the world term
    sequence_mean_selected    -               1 / (B |O'_i|)
    token_mean                1 / sum |A_i|   1 / sum |O'_i|
    fixed_length              1 / (B L)       1 / (B L)

s_t is the token's ``world_scale``, 1 unless ``WorldOptions`` say otherwise. Published variants of both terms have
names (``forms``). B samples, T tokens. *_BT is [B, T], *_B is [B]. Position t of ``logprobs_BT`` is log p(token t |
tokens before).
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from backtalk.errors import ConfigError
from backtalk.objective.batch import Batch, TokenCounts, policy_mask, target_mask
from backtalk.objective.config import ObjectiveConfig, WorldNormalizer, require_max_seq_len
from backtalk.objective.forms import importance_weights, kl_to_reference, policy_surrogate, world_token_loss
from backtalk.objective.roles import WorldLossTarget, has_target_role, is_observation, is_scaffold, roles_from_masks


def token_weights(
    selected_BT: Tensor,
    row_tokens_B: Tensor,
    row_selected_B: Tensor,
    *,
    normalizer: WorldNormalizer,
    sequences: int,
    selected_tokens: int,
    max_seq_len: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight of each token in the loss, 0 outside ``selected_BT``; [B, T].

    ``row_tokens_B`` counts the tokens that ``sequence_mean`` divides a row by, ``row_selected_B`` the selected ones.
    ``sequences`` and ``selected_tokens`` count the whole step. A row or step without such tokens gets zeros.
    """
    selected = selected_BT.to(dtype)
    match normalizer:
        case "sequence_mean":
            return selected / (sequences * row_tokens_B[:, None].clamp(min=1))
        case "sequence_mean_selected":
            return selected / (sequences * row_selected_B[:, None].clamp(min=1))
        case "token_mean":
            return selected / max(selected_tokens, 1)
        case "fixed_length":
            return selected / (sequences * require_max_seq_len(max_seq_len))
    raise ConfigError(f"normalizer={normalizer!r} is unknown; use one of {list(get_args(WorldNormalizer))}")


def policy_weights(batch: Batch, counts: TokenCounts, config: ObjectiveConfig, dtype: torch.dtype) -> Tensor:
    """Return p_t: the weight of each sampled action token in rows with a reward, 0 at other tokens; [B, T]."""
    row_actions_B = batch.sampled_BT.sum(-1) + batch.other_actions_B
    return token_weights(
        policy_mask(batch),
        row_actions_B,
        row_actions_B,
        normalizer=config.policy_normalizer,
        sequences=counts.sequences,
        selected_tokens=counts.action_tokens,
        max_seq_len=config.max_seq_len,
        dtype=dtype,
    )


def world_weights(batch: Batch, counts: TokenCounts, config: ObjectiveConfig, dtype: torch.dtype) -> Tensor:
    """Return w_t: the weight of each target token, 0 at other tokens; [B, T]."""
    target_BT = target_mask(batch, config)
    row_B = is_observation(batch.roles_BT).sum(-1) + batch.other_observations_B
    if config.world_loss_target == "full_observation":
        row_B = row_B + is_scaffold(batch.roles_BT, batch.turns_BT).sum(-1) + batch.other_scaffold_B
    weights_BT = token_weights(
        target_BT,
        row_B,
        target_BT.sum(-1) + batch.other_targets_B,
        normalizer=config.world_normalizer,
        sequences=counts.sequences,
        selected_tokens=counts.target_tokens,
        max_seq_len=config.max_seq_len,
        dtype=dtype,
    )
    return weights_BT * batch.world_scale_BT.to(dtype)


def policy_loss(logprobs_BT: Tensor, batch: Batch, weights_BT: Tensor, config: ObjectiveConfig) -> Tensor:
    """Compute the clipped policy loss, or a variant of ``PolicyOptions``; ignores tokens of weight 0."""
    options, trained_BT = config.policy, weights_BT > 0
    sampled_BT, cap = batch.sampling_logprobs_BT.to(logprobs_BT.dtype), options.max_importance_ratio
    # With a cap the ratio compares policies of the trainer, and the gap between trainer and sampler is a weight.
    old_BT = sampled_BT if cap is None else logprobs_BT.detach()
    loss_BT = policy_surrogate(logprobs_BT, old_BT, batch.advantages_B, trained_BT, config.clip, options.loss)
    if cap is not None:
        loss_BT = loss_BT * importance_weights(logprobs_BT, sampled_BT, trained_BT, cap)
    if options.kl_coeff > 0:
        loss_BT = loss_BT + options.kl_coeff * kl_to_reference(logprobs_BT, _reference(batch), trained_BT)
    return (loss_BT * weights_BT).sum()


def _reference(batch: Batch) -> Tensor:
    """Return the reference log-probabilities; ConfigError where the batch has none."""
    if batch.reference_logprobs_BT is None:
        raise ConfigError(
            "policy.kl_coeff > 0 needs the reference policy's log-probabilities, and this batch has none; "
            "set reference_logprobs_BT, or kl_coeff=0"
        )
    return batch.reference_logprobs_BT


def world_model_loss(logprobs_BT: Tensor, weights_BT: Tensor, config: ObjectiveConfig | None = None) -> Tensor:
    """Compute the weighted negative log-likelihood of target tokens, in nats (ECHO, eq. 3)."""
    loss = "cross_entropy" if config is None else config.world.loss
    return (world_token_loss(logprobs_BT, weights_BT > 0, loss) * weights_BT).sum()


def world_model_loss_from_masks(
    logprobs_BT: Tensor,
    env_mask_BT: Tensor,
    warning_mask_BT: Tensor,
    *,
    normalizer: WorldNormalizer,
    target: WorldLossTarget = "env_only",
    max_seq_len: int | None = None,
) -> Tensor:
    """Compute the world-model term from plain tensors that hold all rows of the step; scalar, in nats.

    The masks are bool and disjoint, aligned with ``logprobs_BT``: column t describes token t. Template roles are not
    known here, so ``full_observation`` is refused with ConfigError.
    """
    if target == "full_observation":
        raise ConfigError("target='full_observation' needs the roles of template tokens; use objective() on a Batch")
    roles_BT = roles_from_masks(env_mask_BT, warning_mask_BT, shape=logprobs_BT.shape)
    target_BT = has_target_role(roles_BT, torch.zeros_like(roles_BT), target)
    weights_BT = token_weights(
        target_BT,
        is_observation(roles_BT).sum(-1),
        target_BT.sum(-1),
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
    """Compute the loss of a micro-batch and, as metrics, both terms before their coefficients; all sum over the step.

    A term whose coefficient is 0 is measured without a graph: with ``world_model_coeff=0`` the total is plain GRPO bit
    for bit.
    """
    p_BT = policy_weights(batch, counts, config, logprobs_BT.dtype)
    w_BT = world_weights(batch, counts, config, logprobs_BT.dtype)
    with torch.set_grad_enabled(torch.is_grad_enabled() and config.policy_coeff > 0):
        policy = policy_loss(logprobs_BT, batch, p_BT, config)
    with torch.set_grad_enabled(torch.is_grad_enabled() and config.world_coeff > 0):
        world = world_model_loss(logprobs_BT, w_BT, config)
    total = policy if config.policy_coeff == 1 else config.policy_coeff * policy
    if config.world_coeff > 0:
        world_part = config.world_coeff * world
        total = world_part if config.policy_coeff == 0 else total + world_part
    terms = {"policy_loss": policy, "world_model_loss": world, "total_loss": total}
    return total, {name: value.detach() for name, value in terms.items()}
