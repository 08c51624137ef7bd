"""Settings of the Tinker engine, in a module that loads neither PyTorch nor the SDK."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from backtalk.engines.remote.config import RemoteConfig, check_address
from backtalk.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class TinkerConfig(RemoteConfig):
    """Model, optimizer and service of the Tinker engine, which trains LoRA adapters over HTTP."""

    kind: Literal["tinker"] = "tinker"
    """Which engine: tinker."""
    base_url: str | None = None
    """Address of the service; null is TINKER_BASE_URL, or else hosted Tinker. The key is read from TINKER_API_KEY."""
    grad_clip_norm: float = 1.0
    """Largest global L2 norm of the gradient, asked of the service; inf asks for none."""

    def __post_init__(self) -> None:
        RemoteConfig.__post_init__(self)
        check_address("base_url", self.base_url)
        if not self.grad_clip_norm > 0:
            raise ConfigError(f"grad_clip_norm={self.grad_clip_norm} would stop every update; use > 0, or inf for none")

    def clip_norm(self) -> float:
        """Return the norm to clip at."""
        return self.grad_clip_norm if math.isfinite(self.grad_clip_norm) else 0.0
