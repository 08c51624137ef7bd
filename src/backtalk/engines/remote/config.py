"""Settings that the engines over a service share, in a module that loads neither PyTorch nor an SDK."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from backtalk.errors import ConfigError
from backtalk.settings import check_choices

Reduction = Literal["sum", "row_mean"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteConfig:
    """Model, optimizer and prices of an engine whose LoRA adapters are trained on a service."""

    kind: str
    """Which engine."""
    model: str = "Qwen/Qwen3-8B"
    """The base model, by the service's name for it."""
    tokenizer: str | None = None
    """Folder or Hugging Face name of its tokenizer; null is the model's name."""
    learning_rate: float = 1e-4
    """Learning rate of AdamW, constant after warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up, from learning_rate / warmup_steps."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Betas of AdamW."""
    lora_rank: int = 32
    """Rank of the LoRA adapters."""
    reduction: Literal["auto", "sum", "row_mean"] = "auto"
    """How the service reduces the losses of tokens: their sum, or the mean over rows of each row's weighted mean; auto
    measures it before the first step."""
    timeout_s: float = 1800.0
    """Longest wait for one answer, the SDK's own retries included."""
    max_logprob_gap: float = 0.05
    """Largest mean |forward pass - sampler| over the actions of a step, in nats a token; above it no update is made."""
    prefill_price: float | None = None
    """US dollars for a million tokens of prompts and forward passes; null where unknown."""
    sample_price: float | None = None
    """US dollars for a million sampled tokens."""
    train_price: float | None = None
    """US dollars for a million trained tokens."""

    def __post_init__(self) -> None:
        least = {"learning_rate": 0, "warmup_steps": 0, "weight_decay": 0, "lora_rank": 1}
        least |= dict.fromkeys(("prefill_price", "sample_price", "train_price"), 0)
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and not lowest <= value < math.inf:
                raise ConfigError(f"{name}={value} cannot work; use a number >= {lowest}")
        if not self.max_logprob_gap > 0:
            raise ConfigError(
                f"max_logprob_gap={self.max_logprob_gap} would refuse every step; use a number of nats above 0, or inf"
            )
        if not 0 < self.timeout_s < math.inf:
            raise ConfigError(f"timeout_s={self.timeout_s} cannot work; use a number of seconds above 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas={self.betas} cannot work; use two numbers in [0, 1), for example (0.9, 0.95)")
        check_choices(self)

    def clip_norm(self) -> float:
        """Return the largest L2 norm of the gradient to ask of the service; 0 asks for none."""
        return 0.0


def check_address(name: str, value: str | None) -> None:
    """Raise ConfigError for a setting that is no address of a server."""
    if value is not None and not value.startswith(("http://", "https://")):
        raise ConfigError(f"{name}={value!r} is no address; use one such as http://127.0.0.1:8000")
