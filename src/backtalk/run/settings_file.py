"""Read the settings of a run as nested plain data: YAML files, presets, their bases, and overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backtalk.errors import ConfigError
from backtalk.settings import did_you_mean

PRESETS = Path(__file__).parents[1] / "presets"
MAX_BASES = 20  # a longer chain of ``base`` is taken for a circle


def preset_names() -> list[str]:
    """Return the names of the presets that ship with the package, runs and studies."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_yaml(source: str | Path, folder: Path | None = None) -> tuple[dict[str, Any], Path]:
    """Read one YAML file or preset; return its nested data and the folder it lies in.

    A relative path is looked for in ``folder`` first.

    Raises:
        ConfigError: there is no such file or preset, or it is not YAML.
    """
    import yaml

    places = [Path(source), PRESETS / f"{source}.yaml"]
    if Path(source).suffix not in (".yaml", ".yml"):
        places.reverse()  # a preset's name is not looked up in the current folder
    if folder is not None:
        places.insert(0, folder / source)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        names = preset_names()
        raise ConfigError(
            f"{str(source)!r} is neither a YAML file nor a preset; the presets are {', '.join(names)}"
            f"{did_you_mean(str(source), names)}"
        )
    try:
        tree = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError) as error:  # a ValueError for a date that does not exist
        raise ConfigError(f"{path} is not YAML; pass a file of settings, as text in UTF-8 ({error})") from error
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path} holds a {type(tree).__name__}, not settings; write lines such as 'steps: 100'")
    return tree or {}, path.parent


def read_settings(source: str | Path, folder: Path | None = None) -> dict[str, Any]:
    """Read a YAML file or preset as nested data, merged over its ``base``, that one's base, and so on.

    Raises:
        ConfigError: as of :func:`read_yaml`; a file is a study, or the bases lead in a circle.
    """
    trees: list[dict[str, Any]] = []
    base: Any = source
    while base is not None:
        tree, folder = read_yaml(str(base), folder)
        if "arms" in tree:
            raise ConfigError(f"{base} is a study, not a run; start it with: backtalk study {base}")
        if len(trees) > MAX_BASES:
            raise ConfigError(
                f"{source} has the base {trees[0]['base']}, that one {trees[1]['base']}, and so on without an end; let "
                "one of them have no base, or a preset"
            )
        trees.append(tree)
        base = tree.get("base")
    merged: dict[str, Any] = {}
    for tree in reversed(trees):
        tree.pop("base", None)
        engine = tree.get("engine")
        if isinstance(engine, Mapping) and "kind" in engine:
            _drop_other_engine(merged, engine["kind"])
        merged = _merge(merged, tree)
    return merged


def parse_overrides(overrides: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """Split ``key=value`` strings and read the values as YAML; return a mapping unchanged.

    Raises:
        ConfigError: a string without a key or an equals sign.
    """
    import yaml

    if isinstance(overrides, Mapping):
        return dict(overrides)
    parsed: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = (part.strip() for part in override.partition("="))
        if not equals:
            raise ConfigError(f"override {override!r} has no =; write {override}=VALUE, for example steps=100")
        if not key:
            raise ConfigError(f"override {override!r} is no setting; write key=value, for example steps=100")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):
            value = text
        is_sentence = isinstance(value, dict) and not text.startswith("{")  # "a: b" is text here, no mapping
        parsed[key] = text if is_sentence else value
    return parsed


def set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    """Put a value into nested data by its dotted key, which need not exist."""
    if key == "engine.kind":
        _drop_other_engine(tree, value)
    *groups, name = key.split(".")
    for group in groups:
        if not isinstance(tree.get(group), dict):
            tree[group] = {}
        tree = tree[group]
    tree[name] = value


def _drop_other_engine(tree: dict[str, Any], kind: Any) -> None:
    """Remove the engine's settings from ``tree`` if they belong to an engine of another kind."""
    engine = tree.get("engine")
    if isinstance(engine, Mapping) and engine.get("kind", "torch") != kind:
        del tree["engine"]


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
