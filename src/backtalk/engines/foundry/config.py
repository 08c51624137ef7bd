"""Settings of the Foundry engine, in a module that loads neither PyTorch nor the SDK."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from backtalk.engines.remote.config import RemoteConfig, check_address


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundryConfig(RemoteConfig):
    """Model, optimizer and project of the Foundry engine, which trains LoRA adapters in a fine-tuning session."""

    kind: Literal["foundry"] = "foundry"
    """Which engine: foundry."""
    endpoint: str | None = None
    """Address of the project, https://ACCOUNT.services.ai.azure.com/api/projects/PROJECT; null is
    AZURE_AI_PROJECT_ENDPOINT."""
    training_type: Literal["GlobalStandard", "DatazoneStandard", "DeveloperTier"] | None = None
    """Training tier; null leaves it to the service."""

    def __post_init__(self) -> None:
        RemoteConfig.__post_init__(self)
        check_address("endpoint", self.endpoint)
