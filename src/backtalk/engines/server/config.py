"""Settings of a sampler behind a server, in a module that loads neither PyTorch nor an HTTP client."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from backtalk.errors import ConfigError
from backtalk.settings import check_choices


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """A server that samples: vLLM, SGLang, or another with token ids and log-probabilities."""

    kind: Literal["vllm", "sglang", "command"] = "vllm"
    """How it takes new weights: vLLM's or SGLang's own request, or a command of yours."""
    base_url: str | None = None
    """Its address up to /v1, such as http://127.0.0.1:8000/v1; null starts vLLM on this machine."""
    model: str | None = None
    """The model's name there; null is the first that the server lists."""
    update_command: tuple[str, ...] = ()
    """Under kind command: the program and arguments that load a folder of weights, whose path is appended."""
    weights_folder: str | None = None
    """Where weights are handed over, a folder that the server sees too; null is a temporary one."""
    max_logprob_gap: float | None = None
    """Largest mean |server - trainer| in nats a token before the run stops; null is 0.001 where both compute in float32
    or better, else 0.05."""
    python: str | None = None
    """Python of an environment with vLLM, for a server started here; null is this one."""
    arguments: tuple[str, ...] = ()
    """Further arguments of a server started here, such as --gpu-memory-utilization=0.4."""
    start_timeout_s: float = 600.0
    """Longest wait for a server started here."""
    timeout_s: float = 300.0
    """Longest wait for one answer."""
    attempts: int = 5
    """Requests before a server that is busy, broken or away is given up."""
    retry_wait_s: float = 1.0
    """Wait before the second of them; doubled each time."""

    def __post_init__(self) -> None:
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            raise ConfigError(
                f"engine.sampler.base_url={self.base_url!r} is no address; use one such as http://127.0.0.1:8000/v1"
            )
        if self.base_url is None and self.kind != "vllm":
            raise ConfigError(
                f"engine.sampler.kind={self.kind!r} without base_url: only vLLM is started from here; start the server "
                "and give its address as engine.sampler.base_url=http://127.0.0.1:8000/v1"
            )
        if (self.kind == "command") != bool(self.update_command):
            raise ConfigError(
                f"engine.sampler.kind={self.kind!r} with update_command={list(self.update_command)}: the two belong "
                "together; use kind=command and the program that loads a folder of weights into your server"
            )
        for name in ("start_timeout_s", "timeout_s", "attempts", "retry_wait_s", "max_logprob_gap"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"engine.sampler.{name}={value} cannot work; use a number above 0")
        check_choices(self)
