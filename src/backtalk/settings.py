"""Nested plain data from YAML, and how it becomes checked settings.

A settings dataclass lives beside what it sets. A key nobody knows is an error that names the nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import types
import typing
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from backtalk.errors import ConfigError

T = TypeVar("T")

MAX_BASES = 20  # files in a chain of ``base``: more are a circle


def preset_names() -> list[str]:
    """The presets that ship with the package, runs and studies."""
    folder = resources.files("backtalk").joinpath("presets")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


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


# ---------------------------------------------------------------- plain data to checked dataclasses and back


def setting_keys(kind: Any, prefix: str = "", hidden: frozenset[str] = frozenset()) -> list[str]:
    """Every setting of a dataclass by its dotted key, but the ``hidden`` ones."""
    keys: list[str] = []
    for name, hint in _hints(kind).items():
        key = f"{prefix}{name}"
        if key not in hidden:
            keys += setting_keys(hint, f"{key}.", hidden) if dataclasses.is_dataclass(hint) else [key]
    return keys


def to_plain(value: Any, prefix: str = "", hidden: frozenset[str] = frozenset()) -> Any:
    """Settings as nested plain data, ready for YAML: the inverse of :func:`build`."""
    if dataclasses.is_dataclass(value):
        names = [item.name for item in dataclasses.fields(value) if f"{prefix}{item.name}" not in hidden]
        return {name: to_plain(getattr(value, name), f"{prefix}{name}.", hidden) for name in names}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def build(
    kind: type[T],
    tree: Any,
    prefix: str = "",
    *,
    derived: Mapping[str, Any] | None = None,
    hidden: frozenset[str] = frozenset(),
    known: Sequence[str] | None = None,
) -> T:
    """A settings dataclass from nested plain data, every key and kind of value checked.

    ``derived`` holds values of ``hidden`` fields, by dotted key. ``known`` are the keys to look for the nearest among.

    Raises:
        ConfigError: an unknown key, a value of the wrong kind, settings that cannot work.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{prefix.rstrip('.') or 'the file'} holds {tree!r}; write its settings indented beneath it")
    known = known or setting_keys(kind, prefix, hidden)
    hints = _hints(kind)
    values = {name: derived[prefix + name] for name in hints if derived and prefix + name in derived}
    nested = {name: tree.get(name) for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    for name, value in {**nested, **tree}.items():
        key = f"{prefix}{name}"
        if name not in hints or key in hidden:
            raise ConfigError(_unknown(key, known))
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            tree_below = {} if value is None else value
            below = build(typing.cast(type, hint), tree_below, f"{key}.", derived=derived, hidden=hidden, known=known)
            values[name] = below
        else:
            values[name] = _coerce(key, hint, value)
    try:
        return kind(**values)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"settings {prefix.rstrip('.') or 'of the run'} cannot work: {error}") from error


def _unknown(key: str, keys: Sequence[str]) -> str:
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
            groups = [a for a in arguments if dataclasses.is_dataclass(a)]
            if groups and isinstance(value, Mapping):  # a number, or a group of settings in its place
                return build(typing.cast(type, groups[0]), value, f"{key}.")
            return _coerce(key, next(a for a in arguments if a is not type(None) and a not in groups), value)
        case _ if origin is Literal:
            return _choice(key, value, {a: a for a in arguments})
        case _ if origin is tuple:
            if not isinstance(value, list | tuple):
                value = [value]
            inner = arguments[0] if arguments[-1] is Ellipsis else None
            if inner is None and len(value) != len(arguments):
                raise ConfigError(f"{key}={value!r} has {len(value)} values; write {len(arguments)}")
            return tuple(_coerce(key, inner or arguments[i], v) for i, v in enumerate(value))
        case _ if isinstance(origin, type) and issubclass(origin, Mapping):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{key}={value!r} is no mapping; write it as {{name: value}}")
            numbered = {int(k) if arguments[0] is int and str(k).isdigit() else k: v for k, v in value.items()}
            return {_coerce(key, arguments[0], k): _coerce(f"{key}.{k}", arguments[1], v) for k, v in numbered.items()}
        case _ if isinstance(hint, type) and issubclass(hint, enum.Enum):
            return _choice(key, value, {member.value: member for member in hint})
        case _ if hint is Any:
            return value
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
