"""Settings of an OpenEnv environment: the ``options`` of a task source "openenv:WHERE"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from backtalk.errors import ConfigError
from backtalk.trajectory import TokenRole

ROLES: dict[str, TokenRole | None] = {
    "env_output": TokenRole.ENV_OUTPUT,
    "warning": TokenRole.WARNING,
    "context": TokenRole.CONTEXT,
    "none": None,  # not shown
}
# What no rule names is env_output. tool_name and error.error_type are fields of OpenEnv's MCP observations.
DEFAULT_ROLES = {
    "done": "none",
    "reward": "none",
    "metadata": "none",
    "warning": "warning",
    "tool_name": "none",
    "error.error_type": "none",
}
FOLDS = ("train", "held_out")


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenEnvConfig:
    """How an OpenEnv environment is started, played, read and scored."""

    # What the policy is told before the first observation, beside the tools.
    system_prompt: str = "You act in an environment by calling tools."
    instruction: str = ""
    # "tools": MCP tools, listed anew in each episode; "typed": the action schema is one tool; "auto": by the schema.
    actions: Literal["auto", "tools", "typed"] = "auto"
    tool: str = "act"  # the name of that one tool
    # Who said an observation's field, by dotted path: env_output, warning, context, or none to leave it out.
    # Taken on top of DEFAULT_ROLES; a field inside an object takes the object's role unless it has its own.
    roles: Mapping[str, str] = field(default_factory=dict)
    max_observation_chars: int = 8000  # of one field; the middle of a longer one is left out
    # The reward of an episode from those of its steps. "done": that of the step which ended it.
    score: Literal["sum", "last", "max", "done"] = "sum"
    unfinished: float | None = None  # the reward where that rule finds none; None is no reward, not 0
    # "fail": an exception in the environment's step costs the rollout. "observe": its message is what the world said.
    exceptions: Literal["fail", "observe"] = "fail"
    # Tasks: the rows of a JSONL file {id, instruction, reset, fold}, else one for each seed.
    tasks: str | None = None
    reset: Mapping[str, Any] = field(default_factory=dict)  # arguments of every reset
    folds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # more of them, for train and for held_out
    seeds: int = 10_000  # seeds are below this
    seed_argument: str = "seed"  # of reset; "index" where an environment numbers its tasks
    # The server.
    step_timeout_s: float = 60.0
    start_timeout_s: float = 120.0
    headers: Mapping[str, str] = field(default_factory=dict)  # for a URL; $NAME is the variable of that name
    env: Mapping[str, str] = field(default_factory=dict)  # variables of a server that is started here, with values
    pass_env: tuple[str, ...] = ()  # names of variables of this process that it gets too; their values are not stored
    provider: str | None = None  # who runs a container: "module:Class" of an OpenEnv provider; None is local Docker
    provider_options: Mapping[str, Any] = field(default_factory=dict)  # of its constructor

    def __post_init__(self) -> None:
        for name in ("max_observation_chars", "seeds", "step_timeout_s", "start_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} leaves nothing; use a number above 0")
        for path, role in self.roles.items():
            if role not in ROLES:
                raise ConfigError(f"roles: {path}={role!r} is no role; use one of {', '.join(ROLES)}")
        if self.folds and (set(self.folds) != set(FOLDS) or self.tasks is not None):
            raise ConfigError(
                f"folds={dict(self.folds)} has to name reset arguments for train and for held_out, and goes with "
                "seeds, not with a tasks file, whose rows say their fold themselves"
            )
