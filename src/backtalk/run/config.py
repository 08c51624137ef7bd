"""Put together the settings of a training run; each group of them stands beside the code that it sets."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from backtalk import settings
from backtalk.engines.choose import EngineConfig, engine_config_class
from backtalk.engines.torch.config import TorchConfig
from backtalk.envs.terminal import TerminalConfig
from backtalk.errors import ConfigError
from backtalk.language.renderer import RendererConfig
from backtalk.objective.config import ObjectiveConfig
from backtalk.rollout.limits import RolloutLimits
from backtalk.rollout.sampler import SamplingParams
from backtalk.run.settings_file import parse_overrides, read_settings, set_dotted
from backtalk.sandboxes import SandboxChoice
from backtalk.tasks.load import OnRefuse

# Groups of settings that most runs leave alone, each listed as one choice; NO_OPTIONS are listed by themselves.
OPTION_GROUPS = ("objective.policy", "objective.world", "renderer", "terminal", "engine")
NO_OPTIONS = ("engine.kind", "engine.model", "engine.learning_rate", "engine.lora_rank")

E = TypeVar("E", bound=EngineConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSource:
    """A source of tasks, its weight among several, and the options of its world."""

    name: str
    """triage, workbench, a folder, a .txt list of folders, a .jsonl or .parquet file, hf:owner/name[:split],
    openenv:WHERE, awm:WHICH, or the import path of a world of your own, package.module:World."""
    weight: float = 1.0
    """Divided by the sum of all weights, its share of the tasks of a step."""
    levels: tuple[int, ...] | None = None
    """Difficulties of triage; null is tasks.levels."""
    world_model_only: bool = False
    """Score none of its tasks: they teach through the world-model term alone."""
    host_packages: bool = False
    """Skip setup steps that install packages: this machine has them already."""
    on_refuse: OnRefuse = "stop"
    """What to do about task folders that cannot be read: stop, or skip them, each named with its reason."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Settings of its world: OpenEnvConfig's, AwmConfig's, or the arguments of a class of your own."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ConfigError(
                f"tasks.source: weight={self.weight} of {self.name!r} is no share; use a number above 0, or leave the "
                "source out"
            )
        if self.levels == ():
            raise ConfigError(f"tasks.source: levels=[] of {self.name!r} leaves no task; use levels such as [1, 2]")
        self.env_config()

    def env_config(self) -> Any:
        """Return the options as an OpenEnvConfig or AwmConfig, by the name of the source; None for any other.

        Raises:
            ConfigError: an option is unknown or has a value of the wrong kind, or the source takes no options.
        """
        match self.name.partition(":")[0]:
            case "openenv":
                from backtalk.envs.openenv.config import OpenEnvConfig

                return settings.from_plain(OpenEnvConfig, self.options, "tasks.source.options.")
            case "awm":
                from backtalk.envs.awm.config import AwmConfig

                return settings.from_plain(AwmConfig, self.options, "tasks.source.options.")
            case _ if self.options and (":" not in self.name or self.name.startswith("hf:")):
                raise ConfigError(
                    f"tasks.source: {self.name!r} takes no options, got {dict(self.options)}; leave them out"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """Which tasks a run trains on and is measured on; the split between them is by task id."""

    source: str | tuple[str | TaskSource, ...] = ("triage",)
    """One or several: triage, workbench, a folder or file of tasks, hf:NAME, openenv:WHERE, awm:WHICH, MODULE:WORLD."""
    levels: tuple[int, ...] = (1, 2)
    """Difficulty of triage."""

    def __post_init__(self) -> None:
        if not self.levels:
            raise ConfigError("tasks.levels=[] leaves no task to train on; use levels such as [1, 2]")
        if not self.source:
            raise ConfigError("tasks.source=[] leaves no task to train on; use triage, workbench or a folder of tasks")

    @property
    def sources(self) -> tuple[TaskSource, ...]:
        """Return the sources, each with its weight and its levels."""
        several = (self.source,) if isinstance(self.source, str) else self.source
        sources = (source if isinstance(source, TaskSource) else TaskSource(name=source) for source in several)
        return tuple(replace(source, levels=source.levels or self.levels) for source in sources)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Evaluation of the policy on held-out tasks, before the first step and after the last."""

    tasks: int = 64
    """Held-out tasks; 0 for no evaluation."""
    samples_per_task: int = 4
    """Rollouts of each task, the k of pass@k."""
    every: int = 0
    """Steps between further evaluations; 0 for none."""
    world_model: bool = False
    """Measure at each evaluation what the policy knows of its environment too, into world_model_step_*.json."""
    recorded_path: str | None = None
    """Parquet file of another policy's trajectories in this model's tokens; null is the package's own of triage."""

    def __post_init__(self) -> None:
        if self.tasks < 0 or self.samples_per_task < 1 or self.every < 0:
            raise ConfigError(
                f"evaluation.tasks={self.tasks}, samples_per_task={self.samples_per_task}, every={self.every}: "
                "use tasks >= 0, samples_per_task >= 1, every >= 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Generic[E]):
    """All settings of one training run; ``engine`` holds those of the engine that ``engine.kind`` names."""

    seed: int = 0
    """Seed of tasks, sampling and fresh adapters."""
    steps: int = 50
    """Optimizer steps."""
    tasks_per_step: int = 8
    """Tasks of a step, a group of rollouts each."""
    group_size: int = 8
    """Rollouts of each task."""
    temperature: float = 1.0
    """Temperature of sampling, above 0."""
    checkpoint_every: int = 5
    """Steps between checkpoints."""
    sandbox: SandboxChoice = "auto"
    """Sandbox of commands; auto is the best that works here, never unsafe."""
    tasks: TaskConfig = field(default_factory=TaskConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    renderer: RendererConfig = field(default_factory=RendererConfig)
    rollout: RolloutLimits = field(default_factory=RolloutLimits)
    terminal: TerminalConfig = field(default_factory=TerminalConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    engine: E = field(default_factory=TorchConfig)  # pyright: ignore[reportAssignmentType]

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("tasks_per_step", 1), ("group_size", 1), ("checkpoint_every", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} cannot work; use {name} >= {least}")
        if self.temperature <= 0:
            raise ConfigError(
                f"temperature={self.temperature} samples the same rollout every time, so a group has nothing to "
                "compare; use temperature > 0, for example 1.0"
            )
        if self.objective.policy_coeff == 0 and self.objective.world.on_trouble != "warn":
            raise ConfigError(
                f"objective.policy_coeff=0 with objective.world.on_trouble={self.objective.world.on_trouble!r}: the "
                "world-model term is all there is to learn from; use on_trouble='warn'"
            )
        if self.group_size == 1 and self.objective.policy_coeff > 0:
            raise ConfigError(
                "group_size=1 makes every advantage 0, so the policy term learns nothing; "
                "use group_size >= 2, or set objective.policy_coeff=0 to learn from observations alone"
            )

    @property
    def sampling_params(self) -> SamplingParams:
        """Return the parameters with which a run samples its actions."""
        max_tokens = self.rollout.max_tokens_per_turn
        return SamplingParams(temperature=self.temperature, max_tokens=max_tokens, seed=self.seed)


def load_config(source: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> TrainConfig:
    """Return settings from a preset's name or a YAML file, then ``overrides`` by dotted key.

    A file may name another as its ``base`` and say only what differs. Overrides are a mapping
    ``{"objective.world_model_coeff": 0.05}`` or strings ``"objective.world_model_coeff=0.05"``.

    Raises:
        ConfigError: no such file or preset, an unknown key, a value of the wrong kind, settings that cannot work.
    """
    return config_from_dict(read_settings(source), overrides)


def config_from_dict(tree: Mapping[str, Any], overrides: Mapping[str, Any] | Sequence[str] = ()) -> TrainConfig:
    """Return settings from nested plain data, such as a run folder's config.yaml holds, then ``overrides``."""
    tree = copy.deepcopy(dict(tree))
    for key, value in parse_overrides(overrides).items():
        set_dotted(tree, key, value)
    engine, rollout, objective = (tree.get(group) for group in ("engine", "rollout", "objective"))
    kind = engine.get("kind", "torch") if isinstance(engine, Mapping) else "torch"
    longest = rollout.get("max_tokens") if isinstance(rollout, Mapping) else None
    if objective is None or (isinstance(objective, Mapping) and objective.get("max_seq_len") is None):
        tree["objective"] = {**(objective or {}), "max_seq_len": longest or RolloutLimits().max_tokens}
    return settings.from_plain(TrainConfig[engine_config_class(kind)], tree)


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return settings as nested plain data, ready for YAML; the inverse of :func:`config_from_dict`."""
    return settings.to_plain(config, TrainConfig[type(config.engine)])


def setting_schemas(kind: str = "torch") -> dict[str, dict[str, Any]]:
    """Return the JSON Schema of every setting of a run by its dotted key, with the settings of one kind of engine."""
    return settings.setting_schemas(TrainConfig[engine_config_class(kind)])


def option_group(key: str) -> str | None:
    """Return the group of options that a setting belongs to; None for those that most runs are about."""
    return next((name for name in OPTION_GROUPS if key.startswith(f"{name}.") and key not in NO_OPTIONS), None)


def json_schema(kind: str = "torch") -> dict[str, Any]:
    """Return the JSON Schema of a file of settings, for editors."""
    schema = settings.json_schema(TrainConfig[engine_config_class(kind)])
    schema["properties"]["base"] = {"type": "string", "description": "A preset or file that this one differs from."}
    return schema
