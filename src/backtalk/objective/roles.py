"""Token roles as the objective reads them: which tokens are observations, scaffold or targets of the world-model term.

Exporters use the same rule, so PyTorch is loaded only by the functions that make a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from backtalk.errors import ConfigError
from backtalk.trajectory import TokenRole

if TYPE_CHECKING:
    from torch import Size, Tensor

WorldLossTarget = Literal["env_only", "warning_only", "warning_plus_env", "full_observation"]
TARGET_ROLES: Mapping[str, tuple[TokenRole, ...]] = {
    "env_only": (TokenRole.ENV_OUTPUT,),
    "warning_only": (TokenRole.WARNING,),
    "warning_plus_env": (TokenRole.ENV_OUTPUT, TokenRole.WARNING),  # "all" in RFC 010 of OpenEnv
    "full_observation": (TokenRole.ENV_OUTPUT, TokenRole.WARNING, TokenRole.TEMPLATE),
}


def is_target(role: TokenRole, turn: int | None, target: WorldLossTarget) -> bool:
    """Return whether the world-model term learns the tokens of a role, in a turn or before the first (None).

    ``full_observation`` adds the scaffold that follows an action up to the next one, which holds the generation
    prompt too. The scaffold of the prompt, given text and actions are never targets.

    Raises:
        ConfigError: an unknown target.
    """
    if target not in TARGET_ROLES:
        raise ConfigError(f"world_loss_target={target!r} is unknown; use one of {list(TARGET_ROLES)}")
    return role in TARGET_ROLES[target] and not (role is TokenRole.TEMPLATE and turn is None)


def has_target_role(roles: Tensor, turns: Tensor, target: WorldLossTarget) -> Tensor:
    """Apply ``is_target`` to tensors of roles and of turns (-1 before the first action); bool, of their shape."""
    import torch

    learned = [[is_target(role, turn, target) for role in TokenRole] for turn in (None, 0)]
    return torch.tensor(learned, device=roles.device)[(turns >= 0).long(), roles.long()]


def is_observation(roles: Tensor) -> Tensor:
    """Return which tokens are the body of an observation, O: environment output and warnings; bool."""
    return (roles == TokenRole.ENV_OUTPUT) | (roles == TokenRole.WARNING)


def is_scaffold(roles: Tensor, turns: Tensor) -> Tensor:
    """Return which tokens the chat template put around observations, the generation prompt included; bool."""
    return (roles == TokenRole.TEMPLATE) & (turns >= 0)


def roles_from_masks(env_mask_BT: Tensor, warning_mask_BT: Tensor, *, shape: Size) -> Tensor:
    """Make roles from two disjoint bool masks of ``shape`` [B, T]; every other token is CONTEXT. int8 [B, T].

    Raises:
        ValueError: masks of another type or shape, or a token in both.
    """
    import torch

    if not env_mask_BT.dtype == warning_mask_BT.dtype == torch.bool:
        raise ValueError(f"masks must be bool, got {env_mask_BT.dtype} and {warning_mask_BT.dtype}; use mask.bool()")
    if not env_mask_BT.shape == warning_mask_BT.shape == shape or len(shape) != 2:
        raise ValueError(
            f"logprobs {tuple(shape)}, env mask {tuple(env_mask_BT.shape)} and warning mask "
            f"{tuple(warning_mask_BT.shape)} must share one shape [B, T]"
        )
    if (env_mask_BT & warning_mask_BT).any():
        raise ValueError("a token is in both masks; environment output and harness warnings exclude each other")
    roles_BT = torch.zeros_like(env_mask_BT, dtype=torch.int8)
    return roles_BT.masked_fill(env_mask_BT, TokenRole.ENV_OUTPUT).masked_fill(warning_mask_BT, TokenRole.WARNING)
