"""Settings of the embedded engine, in a module that does not load PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from backtalk.engines.server.config import ServerConfig
from backtalk.errors import ConfigError
from backtalk.settings import check_choices


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchConfig:
    """Model and optimizer of the embedded engine: one process, one device."""

    kind: Literal["torch"] = "torch"
    """Which engine: torch, or the class of your own engine's settings as my_module:MyEngineConfig."""
    model: str = "base"
    """The embedded model (base, shop), a folder, or a Hugging Face name."""
    learning_rate: float = 1e-4
    """Learning rate of AdamW, constant after warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up, from learning_rate / warmup_steps."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Betas of AdamW."""
    grad_clip_norm: float = 1.0
    """Largest global L2 norm of the gradient; inf switches clipping off."""
    max_tokens_per_microbatch: int | Literal["auto"] = 8192
    """Tokens of a micro-batch, padding included; changes memory and speed, not results. auto is what fits on a GPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Type of the weights; auto is bfloat16 on a GPU, else float32."""
    device: str = "auto"
    """A device of PyTorch's, such as cuda:0; auto is the first GPU, else the CPU."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Put several samples into one row; auto does where attention is made for it."""
    gradient_checkpointing: bool = False
    """Use less memory, for one more forward pass."""
    measure_gradients_every: int | None = None
    """Steps between exact measurements of both terms' gradients over all trained weights; 0 for none, null is 12 with
    a share as the coefficient and 40 elsewhere."""
    lora_rank: int = 0
    """Rank of LoRA adapters; 0 trains every weight."""
    sampler: Literal["torch", "vllm"] | ServerConfig = "torch"
    """What samples: this engine itself, a vLLM started here, or a server by its settings (docs/samplers.md)."""
    batching: Literal["wave", "continuous"] = "wave"
    """How this engine samples: rollouts in step, which repeats to the bit, or each as soon as its command returns."""
    threads: int | None = None
    """CPU threads of PyTorch; null leaves its default."""

    def __post_init__(self) -> None:
        least = {
            "learning_rate": 0,
            "warmup_steps": 0,
            "weight_decay": 0,
            "max_tokens_per_microbatch": 1,
            "measure_gradients_every": 0,
            "lora_rank": 0,
            "threads": 1,
        }
        for name, lowest in least.items():
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not lowest <= value < math.inf:
                raise ConfigError(f"{name}={value} cannot work; use a number >= {lowest}")
        if not self.grad_clip_norm > 0:
            raise ConfigError(f"grad_clip_norm={self.grad_clip_norm} would stop every update; use > 0, or inf for none")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas={self.betas} cannot work; use two numbers in [0, 1), for example (0.9, 0.95)")
        check_choices(self)
