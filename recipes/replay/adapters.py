"""LoRA adapters in and out of a model with PEFT's layers, under the names that a Tinker service gives them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def begin_with(model: nn.Module, adapters: Mapping[str, Tensor]) -> None:
    """Give a model with PEFT's layers the adapters of a service, and share the matrices that are one there."""
    shared: dict[bytes, nn.Module] = {}
    for name, module in model.named_modules():
        for matrix in ("lora_A", "lora_B") if hasattr(module, "lora_A") else ():
            layer = getattr(module, matrix)["default"]
            value = adapters[f"{_key(name)}.{matrix}.weight"]
            with torch.no_grad():
                layer.weight.copy_(value)
            if bool(value.any()):
                getattr(module, matrix)["default"] = shared.setdefault(value.numpy().tobytes(), layer)


def adapters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapters of a model under the names of a service."""
    return {
        f"{_key(name)}.{matrix}.weight": getattr(module, matrix)["default"].weight.detach().float().clone()
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
        for matrix in ("lora_A", "lora_B")
    }


def _key(name: str) -> str:
    return "base_model.model.model." + name[name.index("layers.") :]
