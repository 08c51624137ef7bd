"""The settings of a training run.

Each group of settings lives beside what it sets (rollout, objective, engine, terminal); this module
only puts them together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from backtalk import settings
from backtalk.engines.torch import TorchConfig
from backtalk.envs.terminal import TerminalConfig
from backtalk.errors import ConfigError
from backtalk.objective_config import ObjectiveConfig
from backtalk.renderer import RendererConfig
from backtalk.rollout import RolloutLimits
from backtalk.sandboxes import SandboxChoice
from backtalk.settings import parse_overrides, read_settings, set_dotted

# Fields of the settings below that a run does not offer: they follow from others (see _derived), or stay as they are.
NOT_OFFERED = frozenset(
    {
        "engine.seed",
        "engine.threads",
        "engine.betas",
        "engine.weight_decay",
        "engine.packing",
        "objective.max_seq_len",
        "terminal.sandbox.output_bytes",
    }
)
# Groups that a run leaves alone unless it is about what they set; each counts as one choice.
OPTION_GROUPS = ("objective.policy", "objective.world", "renderer", "terminal")


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSource:
    """One of several sources of tasks, and how it is taken."""

    # triage, workbench, a folder, a .jsonl or .parquet file, hf:owner/name[:split], openenv:WHERE, awm:WHICH
    name: str
    weight: float = 1.0  # this over the sum of all weights is its share of the tasks of a step
    levels: tuple[int, ...] | None = None  # of triage; None is tasks.levels
    world_model_only: bool = False  # nobody scores them: they teach through the world-model term alone
    host_packages: bool = False  # leave out what installs packages: this machine has them already
    options: Mapping[str, Any] = field(default_factory=dict)  # of its world: OpenEnvConfig's, AwmConfig's

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ConfigError(
                f"tasks.source: weight={self.weight} of {self.name!r} is no share; use a number above 0, or leave the "
                "source out"
            )
        if self.levels == ():
            raise ConfigError(f"tasks.source: levels=[] of {self.name!r} leaves no task; use levels such as [1, 2]")


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """Which tasks a run trains on and is measured on; the split between them is by task id."""

    source: tuple[str | TaskSource, ...] = ("triage",)  # one or several
    levels: tuple[int, ...] = (1, 2)  # of triage

    def __post_init__(self) -> None:
        if not self.levels:
            raise ConfigError("tasks.levels=[] leaves no task to train on; use levels such as [1, 2]")
        if not self.source:
            raise ConfigError("tasks.source=[] leaves no task to train on; use triage, workbench or a folder of tasks")

    @property
    def sources(self) -> tuple[TaskSource, ...]:
        """The sources, each with its weight and its levels."""
        each = (one if isinstance(one, TaskSource) else TaskSource(name=one) for one in self.source)
        return tuple(replace(one, levels=one.levels or self.levels) for one in each)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """How the policy is measured on held-out tasks, before the first step and after the last."""

    tasks: int = 64  # 0 leaves evaluation out
    samples_per_task: int = 4
    every: int = 0  # steps between further evaluations; 0 is none
    recorded_path: str | None = None  # trajectories of another policy; None is the package's own, for its own model

    def __post_init__(self) -> None:
        if self.tasks < 0 or self.samples_per_task < 1 or self.every < 0:
            raise ConfigError(
                f"evaluation.tasks={self.tasks}, samples_per_task={self.samples_per_task}, every={self.every}: "
                "use tasks >= 0, samples_per_task >= 1, every >= 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """All settings of one training run."""

    seed: int = 0
    steps: int = 50
    tasks_per_step: int = 8
    group_size: int = 8
    temperature: float = 1.0
    checkpoint_every: int = 5
    sandbox: SandboxChoice = "auto"
    tasks: TaskConfig = field(default_factory=TaskConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    renderer: RendererConfig = field(default_factory=RendererConfig)
    rollout: RolloutLimits = field(default_factory=RolloutLimits)
    terminal: TerminalConfig = field(default_factory=TerminalConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    engine: TorchConfig = field(default_factory=TorchConfig)

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("tasks_per_step", 1), ("group_size", 1), ("checkpoint_every", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} cannot work; use {name} >= {least}")
        if self.temperature <= 0:
            raise ConfigError(
                f"temperature={self.temperature} samples the same attempt every time, so a group has nothing to "
                "compare; use temperature > 0, for example 1.0"
            )
        if self.group_size == 1 and self.objective.policy_coeff > 0:
            raise ConfigError(
                "group_size=1 makes every advantage 0, so the policy term learns nothing; "
                "use group_size >= 2, or set objective.policy_coeff=0 to learn from observations alone"
            )


def load_config(source: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> TrainConfig:
    """Settings from a preset's name or a YAML file, then ``overrides`` by dotted key.

    A file may name another as its ``base`` and say only what differs. Overrides are a mapping
    ``{"objective.world_model_coeff": 0.05}`` or strings ``"objective.world_model_coeff=0.05"``.

    Raises:
        ConfigError: no such file or preset, an unknown key, a value of the wrong kind, settings that cannot work.
    """
    tree = read_settings(source)
    for key, value in parse_overrides(overrides).items():
        set_dotted(tree, key, value)
    return config_from_dict(tree)


def config_from_dict(tree: Mapping[str, Any]) -> TrainConfig:
    """Settings from nested plain data, such as a run folder's config.yaml holds."""
    return settings.build(TrainConfig, tree, derived=_derived(tree), hidden=NOT_OFFERED)


def _derived(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What follows from other settings; where those are wrong, building them says so."""
    rollout = tree.get("rollout")
    max_tokens = rollout.get("max_tokens") if isinstance(rollout, Mapping) else None
    return {"engine.seed": tree.get("seed", 0), "objective.max_seq_len": max_tokens or RolloutLimits().max_tokens}


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """The offered settings as nested plain data, ready for YAML; the inverse of :func:`config_from_dict`."""
    return settings.to_plain(config, hidden=NOT_OFFERED)


def setting_keys() -> list[str]:
    """Every setting of a run by its dotted key."""
    return settings.setting_keys(TrainConfig, hidden=NOT_OFFERED)
