"""The settings of a training run, and how a YAML file becomes them.

Each group of settings lives beside what it sets (rollout, objective, engine, terminal); this module
only puts them together. A key nobody knows is an error that names the nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from backtalk.engines.torch import TorchConfig
from backtalk.envs.terminal import TerminalConfig
from backtalk.errors import ConfigError
from backtalk.objective import ObjectiveConfig
from backtalk.rollout import RolloutLimits

T = TypeVar("T")

MAX_BASES = 20  # files in a chain of ``base``: more are a circle

# Fields of the settings below that a run does not offer: they follow from others (see _derived), or stay as they are.
NOT_OFFERED = frozenset(
    {
        "engine.seed",
        "engine.threads",
        "engine.betas",
        "engine.weight_decay",
        "objective.max_seq_len",
        "terminal.sandbox.output_bytes",
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """Which tasks a run trains on and is measured on; the split between them is by task id."""

    source: str = "triage"  # "triage", or a folder of Harbor tasks
    levels: tuple[int, ...] = (1, 2)  # of triage

    def __post_init__(self) -> None:
        if not self.levels:
            raise ConfigError("tasks.levels=[] leaves no task to train on; use levels such as [1, 2]")


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
    sandbox: Literal["auto", "bubblewrap", "unsafe"] = "auto"
    tasks: TaskConfig = field(default_factory=TaskConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
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


# ---------------------------------------------------------------- from YAML


def preset_names() -> list[str]:
    """The presets that ship with the package, runs and studies."""
    folder = resources.files("backtalk").joinpath("presets")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


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
    return build(TrainConfig, tree, derived=_derived(tree))


def _derived(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What follows from other settings; where those are wrong, building them says so."""
    rollout = tree.get("rollout")
    max_tokens = rollout.get("max_tokens") if isinstance(rollout, Mapping) else None
    return {"engine.seed": tree.get("seed", 0), "objective.max_seq_len": max_tokens or RolloutLimits().max_tokens}


def config_to_dict(config: Any, prefix: str = "") -> dict[str, Any]:
    """The offered settings as nested plain data, ready for YAML; the inverse of :func:`config_from_dict`."""
    tree: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        key, value = f"{prefix}{item.name}", getattr(config, item.name)
        if key in NOT_OFFERED:
            continue
        tree[item.name] = config_to_dict(value, f"{key}.") if dataclasses.is_dataclass(value) else _plain(value)
    return tree


def setting_keys(kind: Any = TrainConfig, prefix: str = "") -> list[str]:
    """Every setting by its dotted key."""
    keys: list[str] = []
    for name, hint in _hints(kind).items():
        key = f"{prefix}{name}"
        if key not in NOT_OFFERED:
            keys += setting_keys(hint, f"{key}.") if dataclasses.is_dataclass(hint) else [key]
    return keys


def read_settings(source: str | Path, folder: Path | None = None, above: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML file or preset as nested data, with its ``base`` filled in beneath it.

    A relative path is looked for in ``folder`` first. ``above`` are the files that led here.
    """
    if len(above) > MAX_BASES:
        raise ConfigError(
            f"{above[0]} leads over base: to {', '.join(above[1:4])} and so on without an end; "
            "let one of them have no base, or a preset"
        )
    beside = folder / source if folder is not None else None
    tree, folder = read_yaml(beside if beside is not None and beside.is_file() else source)
    if "arms" in tree:
        raise ConfigError(f"{source} is a study, not a run; start it with: backtalk study {source}")
    base = tree.pop("base", None)
    return tree if base is None else _merge(read_settings(str(base), folder, [*above, str(source)]), tree)


def parse_overrides(overrides: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """``key=value`` strings, the values read as YAML; a mapping is taken as it is."""
    if isinstance(overrides, Mapping):
        return dict(overrides)
    parsed: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override {text!r} is no setting; write key=value, for example steps=100")
        parsed[key.strip()] = _parse_scalar(value.strip())
    return parsed


def set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    """Put one value into nested data by its dotted key; whether the key exists is checked when it is built."""
    *path, last = key.split(".")
    for name in path:
        below = tree.get(name)
        if not isinstance(below, dict):
            below = tree[name] = {}
        tree = below
    tree[last] = value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested plain data by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def read_yaml(source: str | Path) -> tuple[dict[str, Any], Path | None]:
    """A YAML file or preset as it is written, and the folder it lies in (None for a preset).

    Raises:
        ConfigError: there is no such file or preset, or it is not YAML.
    """
    path = Path(source)
    preset = resources.files("backtalk").joinpath("presets", f"{source}.yaml")
    if path.suffix not in (".yaml", ".yml") and preset.is_file():
        return _parse_yaml(preset.read_text(), f"preset {source}"), None
    if path.is_file():
        try:
            return _parse_yaml(path.read_text("utf-8"), str(path)), path.parent
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not text ({error}); pass a YAML file of settings, in UTF-8") from error
    near = difflib.get_close_matches(str(source), preset_names(), n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ConfigError(
        f"{str(source)!r} is neither a YAML file nor a preset{hint}; the presets are {', '.join(preset_names())}"
    )


def _parse_yaml(text: str, name: str) -> dict[str, Any]:
    import yaml

    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{name} holds a {type(tree).__name__}, not settings; write lines such as 'steps: 100'")
    return tree


def _parse_scalar(text: str) -> Any:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return text if isinstance(value, dict) and not text.startswith("{") else value  # "a: b" is a sentence here


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


# ---------------------------------------------------------------- plain data to checked dataclasses


def build(kind: type[T], tree: Any, prefix: str = "", derived: Mapping[str, Any] | None = None) -> T:
    """A settings dataclass from nested plain data, every key and kind of value checked.

    ``derived`` holds values of fields that are not offered, by dotted key.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{prefix.rstrip('.') or 'the file'} holds {tree!r}; write its settings indented beneath it")
    hints = _hints(kind)
    values = {name: derived[prefix + name] for name in hints if derived and prefix + name in derived}
    nested = {name: tree.get(name) for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    for name, value in {**nested, **tree}.items():
        key = f"{prefix}{name}"
        if name not in hints or key in NOT_OFFERED:
            raise ConfigError(_unknown(key))
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            values[name] = build(typing.cast(type, hint), {} if value is None else value, f"{key}.", derived)
        else:
            values[name] = _coerce(key, hint, value)
    try:
        return kind(**values)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"settings {prefix.rstrip('.') or 'of the run'} cannot work: {error}") from error


def _unknown(key: str) -> str:
    keys = setting_keys()
    sections = sorted({k.rsplit(".", 1)[0] for k in keys if "." in k})
    near = difflib.get_close_matches(key, [*keys, *sections], n=1, cutoff=0.6)
    if not near:  # right name, wrong place
        near = [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]][:1]
    hint = f"did you mean {near[0]!r}?" if near else f"the settings are {', '.join(keys)}"
    return f"unknown setting {key!r}; {hint}"


def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {item.name: hints[item.name] for item in dataclasses.fields(kind)}


def _coerce(key: str, hint: Any, value: Any) -> Any:
    """One value as its type hint wants it: numbers, text, choices, tuples, optionals."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    match hint:
        case _ if origin in (typing.Union, types.UnionType):
            if value is None and type(None) in arguments:
                return None
            return _coerce(key, next(a for a in arguments if a is not type(None)), value)
        case _ if origin is Literal:
            return _choice(key, value, {a: a for a in arguments})
        case _ if origin is tuple:
            if not isinstance(value, list | tuple):
                value = [value]
            inner = arguments[0] if arguments[-1] is Ellipsis else None
            if inner is None and len(value) != len(arguments):
                raise ConfigError(f"{key}={value!r} has {len(value)} values; write {len(arguments)}")
            return tuple(_coerce(key, inner or arguments[i], v) for i, v in enumerate(value))
        case _ if isinstance(hint, type) and issubclass(hint, enum.Enum):
            return _choice(key, value, {member.value: member for member in hint})
        case _ if hint is Path:
            return Path(str(value))
        case _:
            return _scalar(key, hint, value)


def _choice(key: str, value: Any, choices: Mapping[Any, Any]) -> Any:
    if value in choices:
        return choices[value]
    raise ConfigError(f"{key}={value!r} is no choice; use one of {', '.join(str(c) for c in choices)}")


def _scalar(key: str, hint: Any, value: Any) -> Any:
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-4, without a dot, as text
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isnan(number):  # which passes every check for a bound
            return number
    raise ConfigError(f"{key}={value!r} is not {wanted}")


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
