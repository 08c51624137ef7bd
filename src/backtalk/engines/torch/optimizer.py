"""AdamW with float32 master weights, which keeps the coefficient of a world-model term meaningful when it is alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from backtalk.engines.torch.config import TorchConfig
from backtalk.engines.update_scale import UpdateScale


class StepOptimizer:
    """AdamW (arXiv 1711.05101) with linear warm-up, clipping by global norm, and scaled world-only steps.

    Parameters in bfloat16 get float32 masters, as an update of 1e-6 would round away in them. Gradients of
    micro-batches are summed in the masters' precision.

    World-only steps are those whose policy gradient is 0 (all rewards equal). Adam divides by the gradient's own
    running size, so there it turns *any* coefficient of the world-model term into a full step. Unless
    ``objective.world.zero_advantage_steps`` is full, the step is that of coefficient 1, times the coefficient. So two
    running means with Adam's own beta_2 are kept: of |g|^2 as Adam saw it, and of |g|^2 as it would have been with both
    terms at equal coefficients in such steps. The learning rate of a world-only step is multiplied by the square root
    of their ratio. In a run of world-only steps that is the coefficient itself, so twice the coefficient moves the
    weights twice as far. Where other steps have set Adam's scale it tends to 1, and there plain Adam is proportional
    already. Steps with a policy gradient are plain AdamW, bit for bit.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: TorchConfig) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._masters: list[Tensor] = [
            p if p.dtype in (torch.float32, torch.float64) else p.detach().to(torch.float32, copy=True).requires_grad_()
            for p in self._parameters
        ]
        groups = [  # norms and biases do not decay
            {"params": [m for m in self._masters if m.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [m for m in self._masters if m.dim() < 2], "weight_decay": 0.0},
        ]
        self._config = config
        # One kernel for all weights on a GPU, where a kernel a weight would be most of the step of a small model.
        fused = True if self._masters and self._masters[0].device.type == "cuda" else None
        self._adam = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=config.learning_rate, betas=config.betas, fused=fused
        )
        self.updates = 0
        self._scale = UpdateScale(config.betas[1])

    def zero_grad(self) -> None:
        """Forget all gradients; call before the first micro-batch."""
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            parameter.grad = master.grad = None

    def accumulate(self) -> None:
        """Move a micro-batch's gradient to the masters; call after each backward pass."""
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if master is parameter or parameter.grad is None:
                continue
            grad = parameter.grad.to(master.dtype)
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            parameter.grad = None

    def set_gradients(self, gradients: Iterable[Tensor | None]) -> None:
        """Take the gradient of a whole step, one tensor a trained weight, in place of ``accumulate``."""
        for master, gradient in zip(self._masters, gradients, strict=True):
            master.grad = None if gradient is None else gradient.to(master.dtype)

    def step(self, world_coeff_ratio: float | None = None) -> dict[str, float]:
        """Update the weights and return metrics. A gradient that is not finite changes nothing and gives ``skipped`` 1.

        ``world_coeff_ratio`` is world_model_coeff / policy_coeff in a step that is to be scaled because its policy
        gradient is 0; None is plain AdamW.
        """
        grad_norm = float(nn.utils.clip_grad_norm_(self._masters, self._config.grad_clip_norm))
        if not math.isfinite(grad_norm):
            return self.idle_metrics() | {"grad_norm": grad_norm}
        scale = self._update_scale(grad_norm, world_coeff_ratio)
        warmup = min(1.0, (self.updates + 1) / max(self._config.warmup_steps, 1))
        rate = self._config.learning_rate * warmup * scale
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        with torch.no_grad():
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
        self.updates += 1
        return {"grad_norm": grad_norm, "learning_rate": rate, "update_scale": scale, "skipped": 0.0}

    @staticmethod
    def idle_metrics() -> dict[str, float]:
        """Return the metrics of a step without an update."""
        return {"grad_norm": 0.0, "learning_rate": 0.0, "update_scale": 0.0, "skipped": 1.0}

    def _update_scale(self, grad_norm: float, world_coeff_ratio: float | None) -> float:
        """Update both running means and return the factor on the learning rate of a world-only step."""
        max_norm = self._config.grad_clip_norm
        seen = min(grad_norm, max_norm)
        unit = seen if world_coeff_ratio is None else min(grad_norm / world_coeff_ratio, max_norm)
        scale = self._scale.update(seen, unit)
        return 1.0 if world_coeff_ratio is None else scale

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state except the parameters; masters are included where they are separate tensors."""
        pairs = zip(self._parameters, self._masters, strict=True)
        seen_square, unit_square = self._scale.state()
        return {
            "adam": self._adam.state_dict(),
            "masters": [master.detach() for parameter, master in pairs if master is not parameter],
            "updates": self.updates,
            "seen_square": seen_square,
            "unit_square": unit_square,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a ``state_dict``. Settings such as the learning rate stay those of this object."""
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self._adam.param_groups]
        self._adam.load_state_dict(state["adam"])
        for group, own in zip(self._adam.param_groups, settings, strict=True):
            group.update(own)
        masters = [m for p, m in zip(self._parameters, self._masters, strict=True) if m is not p]
        with torch.no_grad():
            for master, saved in zip(masters, state["masters"], strict=True):
                master.copy_(saved)
        self.updates = state["updates"]
        self._scale = UpdateScale(self._config.betas[1], state["seen_square"], state["unit_square"])
