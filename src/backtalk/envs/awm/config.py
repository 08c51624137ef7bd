"""Settings of the Agent World Model environment: the ``options`` of a task source "awm:WHICH"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from backtalk.errors import ConfigError
from backtalk.sandboxes import SandboxChoice, SandboxLimits


@dataclass(frozen=True, kw_only=True, slots=True)
class AwmConfig:
    """Settings of how scenarios are run and scored."""

    verifier: Literal["code", "sql"] = "code"
    """code: a function returns whether the task is complete. sql: one returns facts that a server's LLM judges."""
    reward_at: Literal["verify", "done"] = "verify"
    """Call whose reward is the rollout's: verify, or done for a server that scores there."""
    show_verdict: bool = True
    """Show the verdict as the last observation, with role ENV_OUTPUT."""
    sandbox: SandboxChoice = "auto"
    """Sandbox for the programs and verifiers of a folder; scenarios that ship with Backtalk run in this process."""
    limits: SandboxLimits = field(default_factory=SandboxLimits)
    """Limits of each such sandbox."""
    max_result_chars: int = 8000
    """Longest result of a call that is shown whole; the middle of a longer one is left out."""
    call_timeout_s: float = 30.0
    """Time limit of one call."""
    reset: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of a server's reset, such as llm_model."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """HTTP headers sent to a server; $NAME is replaced by the environment variable NAME."""

    def __post_init__(self) -> None:
        if self.max_result_chars < 2 or self.call_timeout_s <= 0:
            raise ConfigError(
                f"max_result_chars={self.max_result_chars} and call_timeout_s={self.call_timeout_s}: need at least 2 "
                "characters and more than 0 seconds"
            )
