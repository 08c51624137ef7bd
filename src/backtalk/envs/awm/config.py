"""Settings of the Agent World Model environment: the ``options`` of a task source "awm:WHICH"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from backtalk.errors import ConfigError
from backtalk.sandboxes import SandboxChoice, SandboxLimits


@dataclass(frozen=True, kw_only=True, slots=True)
class AwmConfig:
    """How scenarios are played and scored."""

    # "code": a function says whether the task is done. "sql": one gathers facts, and a server's language model judges.
    verifier: Literal["code", "sql"] = "code"
    # Which answer carries the reward: that of ``verify``, or that of ``done`` where a server scores there.
    reward_at: Literal["verify", "done"] = "verify"
    show_verdict: bool = True  # as the observation of the last action; what is learned from it is ENV_OUTPUT
    # Where the programs and verifiers of a folder run; those of the worlds that ship with Backtalk run in this process.
    sandbox: SandboxChoice = "auto"
    limits: SandboxLimits = field(default_factory=SandboxLimits)  # of each such sandbox
    max_result_chars: int = 8000  # of one call; the middle of a longer result is left out
    call_timeout_s: float = 30.0
    reset: Mapping[str, Any] = field(default_factory=dict)  # further arguments of a server's reset, as llm_model
    headers: Mapping[str, str] = field(default_factory=dict)  # to a server; $NAME is the variable of that name

    def __post_init__(self) -> None:
        if self.max_result_chars < 2 or self.call_timeout_s <= 0:
            raise ConfigError(
                f"max_result_chars={self.max_result_chars} and call_timeout_s={self.call_timeout_s}: need at least 2 "
                "characters and more than 0 seconds"
            )
