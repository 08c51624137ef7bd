"""Settings of the Tinker engine, in a module that loads neither PyTorch nor the SDK."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from backtalk.engines.remote.config import RemoteConfig, check_address


@dataclass(frozen=True, kw_only=True, slots=True)
class TinkerConfig(RemoteConfig):
    """Model, optimizer and service of the Tinker engine, which trains LoRA adapters over HTTP."""

    kind: Literal["tinker"] = "tinker"
    """Which engine: tinker."""
    base_url: str | None = None
    """Address of the service; null is TINKER_BASE_URL, or else hosted Tinker. The key is read from TINKER_API_KEY."""

    def __post_init__(self) -> None:
        RemoteConfig.__post_init__(self)
        check_address("base_url", self.base_url)
