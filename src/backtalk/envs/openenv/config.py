"""Settings of an OpenEnv environment: the ``options`` of a task source "openenv:WHERE"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from backtalk.errors import ConfigError
from backtalk.tasks.task import Split
from backtalk.trajectory import TokenRole

ROLES: dict[str, TokenRole | None] = {
    "env_output": TokenRole.ENV_OUTPUT,
    "warning": TokenRole.WARNING,
    "context": TokenRole.CONTEXT,
    "none": None,  # not shown
}
# Fields without a rule are env_output. tool_name and error.error_type belong to OpenEnv's MCP observations.
DEFAULT_ROLES = {
    **dict.fromkeys(("done", "reward", "metadata", "tool_name", "error.error_type"), "none"),
    "warning": "warning",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenEnvConfig:
    """Settings of how an OpenEnv environment is started, played, read and scored."""

    system_prompt: str = "You act in an environment by calling tools."
    """System message, beside the tools; empty for none."""
    instruction: str = ""
    """Text before the first observation, in the user message."""
    actions: Literal["auto", "tools", "typed"] = "auto"
    """tools: MCP tools, listed anew in each rollout. typed: the action schema is one tool. auto: by the schema."""
    tool: str = "act"
    """Name of that one tool."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """Role by a field's dotted path, over the defaults: env_output, warning, context, or none to leave it out."""
    max_observation_chars: int = 8000
    """Longest field that is shown whole; the middle of a longer one is left out."""
    score: Literal["sum", "last", "max", "done"] = "sum"
    """Rollout's reward from those of its steps; done is the reward of the step that ended it."""
    unfinished: float | None = None
    """Reward where no step gave one; null is no reward, not 0."""
    exceptions: Literal["fail", "observe"] = "fail"
    """Exception in the environment's step: fail the rollout, or observe its message as the environment's output."""
    tasks: str | None = None
    """JSONL file of tasks, rows of id, instruction, reset and fold; null makes a task of each seed."""
    reset: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of every reset."""
    folds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further arguments of a reset, by fold: train and held_out."""
    seeds: int = 10_000
    """Seeds are 0 to this less one."""
    seed_argument: str = "seed"
    """Argument of reset that takes the seed, such as index."""
    step_timeout_s: float = 60.0
    """Time limit of the server's answer to a step or reset."""
    start_timeout_s: float = 120.0
    """Time limit of a server's start."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """HTTP headers sent to a URL; $NAME is replaced by the environment variable NAME."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of a server that is started here."""
    pass_env: tuple[str, ...] = ()
    """Names of further variables of this process that it gets; their values are not stored."""
    provider: str | None = None
    """module:Class of an OpenEnv provider that runs a container; null is local Docker."""
    provider_options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the provider's constructor."""

    def __post_init__(self) -> None:
        for name in ("max_observation_chars", "seeds", "step_timeout_s", "start_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} leaves nothing; use a number above 0")
        for path, role in self.roles.items():
            if role not in ROLES:
                raise ConfigError(f"roles: {path}={role!r} is no role; use one of {', '.join(ROLES)}")
        if self.folds and (set(self.folds) != set(Split) or self.tasks is not None):
            raise ConfigError(
                f"folds={dict(self.folds)} has to name reset arguments for train and for held_out, and goes with "
                "seeds, not with a tasks file, whose rows say their fold themselves"
            )
