"""Settings: nested plain data from YAML, and how it becomes checked classes.

A settings class is a frozen dataclass that lives beside what it sets. pydantic compares the data with its fields and
types; this module reads YAML, and says what to type instead where something is wrong.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, reduce
from importlib import import_module, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from backtalk.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

T = TypeVar("T")

MAX_BASES = 20  # files in a chain of ``base``: more are a circle


def preset_names() -> list[str]:
    """Return the names of the presets that ship with the package, runs and studies."""
    folder = resources.files("backtalk").joinpath("presets")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_settings(source: str | Path, folder: Path | None = None, above: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file or preset as nested data, with its ``base`` filled in beneath it.

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
    if base is None:
        return tree
    below = read_settings(str(base), folder, [*above, str(source)])
    if isinstance(engine := tree.get("engine"), Mapping) and "kind" in engine:
        _choose_engine(below, engine["kind"])
    return _merge(below, tree)


def parse_overrides(overrides: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """Split ``key=value`` strings and read the values as YAML; a mapping is taken as it is."""
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
    if key == "engine.kind":
        _choose_engine(tree, value)
    *path, last = key.split(".")
    for name in path:
        below = tree.get(name)
        if not isinstance(below, dict):
            below = tree[name] = {}
        tree = below
    tree[last] = value


def _choose_engine(tree: dict[str, Any], kind: Any) -> None:
    """Drop the settings of one engine where another is chosen, whose own they are not."""
    engine = tree.get("engine")
    if isinstance(engine, Mapping) and engine.get("kind", "torch") != kind:
        del tree["engine"]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested plain data by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def read_yaml(source: str | Path) -> tuple[dict[str, Any], Path | None]:
    """Read a YAML file or preset as it is written; return it and the folder it lies in (None for a preset).

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


# ---------------------------------------------------------------- plain data to checked settings and back


def from_plain(kind: type[T], tree: Any, prefix: str = "") -> T:
    """Return settings of class ``kind`` (a dataclass or a pydantic model) from nested plain data, all of it checked.

    ``prefix`` stands before every key in messages.

    Raises:
        ConfigError: an unknown key, a value of the wrong kind, settings that cannot work.
    """
    from pydantic import ValidationError

    if not isinstance(tree, Mapping):
        raise ConfigError(f"{prefix.rstrip('.') or 'the file'} holds {tree!r}; write its settings indented beneath it")
    plain = _plain(tree)
    for key, value in flatten(plain).items():
        if value != value:  # nan passes every check for a bound
            raise ConfigError(f"{prefix}{key}={value!r} is not a number")
    while True:
        try:
            return _adapter(kind).validate_json(json.dumps(plain), strict=True, extra="forbid")
        except ValidationError as error:
            mistakes = error.errors(include_url=False)
            if not any([_mend(plain, mistake) for mistake in mistakes]):
                raise _explain(kind, plain, mistakes, prefix) from None


def to_plain(value: Any, kind: Any = None) -> dict[str, Any]:
    """Return settings as nested plain data, ready for YAML: the inverse of :func:`from_plain`."""
    return _adapter(kind or type(value)).dump_python(value, mode="json", warnings=False)


def json_schema(kind: Any) -> dict[str, Any]:
    """Return the JSON Schema of the settings of class ``kind``; the string under a field describes it."""
    from pydantic import TypeAdapter

    # Of a list of them, because an adapter takes no configuration for a dataclass itself.
    several: Any = list.__class_getitem__(kind)
    schema = TypeAdapter(several, config={"extra": "forbid", "use_attribute_docstrings": True}).json_schema()
    return schema["$defs"].pop(schema["items"]["$ref"].rpartition("/")[2]) | {"$defs": schema["$defs"]}


def setting_schemas(kind: Any, prefix: str = "", *, alternatives: bool = False) -> dict[str, dict[str, Any]]:
    """Return the JSON Schema of every setting by its dotted key.

    A value that may also be a group of settings is one setting, unless ``alternatives`` asks for those of the group.
    """
    top = json_schema(kind)

    def below(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, item in _resolve(node, top).get("properties", {}).items():
            key = f"{prefix}{name}"
            if "$ref" in item:
                yield from below(item, f"{key}.")
                continue
            yield key, item
            for group in _references(item) if alternatives else ():
                yield from below(group, f"{key}.")

    return dict(below(top, prefix))


def import_object(path: str, key: str) -> Any:
    """Return what ``package.module:Name`` names; modules in the current folder are found too.

    Raises:
        ConfigError: there is no such module, or no such name in it. ``key`` is the setting that holds the path.
    """
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as for `python -m`
    try:
        return reduce(getattr, name.split("."), import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{key}={path!r} cannot be imported ({error}); write package.module:Name, and start from the folder that "
            "holds the package, or install it"
        ) from error


def check_choices(config: Any) -> None:
    """Refuse a value that a field's Literal does not list, in settings made in Python, which no reader has checked."""
    for name, hint in _hints(type(config)).items():
        if get_origin(hint) is Literal and getattr(config, name) not in get_args(hint):
            choices = ", ".join(map(str, get_args(hint)))
            raise ConfigError(f"{name}={getattr(config, name)!r} is no choice; use one of {choices}")


_hints = cache(get_type_hints)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON can hold it: a date or a path as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or type(value) in (bool, int, float, str) else str(value)


def _resolve(node: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    return top["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def _references(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "$ref" in node:
        yield node
    for item in (*node.get("anyOf", ()), *([node["items"]] if "items" in node else ())):
        yield from _references(item)


def _path(plain: Any, mistake: ErrorDetails) -> list[Any]:
    """Return where a mistake is: its place without the names of a union's members, which are none of the data's."""
    path: list[Any] = []
    part: Any
    for part in mistake["loc"]:
        if part in (plain if isinstance(plain, dict) else range(len(plain)) if isinstance(plain, list) else ()):
            plain = plain[part]
            path.append(part)
    return path


def _mend(plain: dict[str, Any], mistake: ErrorDetails) -> bool:
    """Put the value in that a person meant and YAML read otherwise; False where there is none."""
    value, path = mistake["input"], _path(plain, mistake)
    match mistake["type"]:
        case "float_type" if isinstance(value, str):  # 1e-4, without a dot, is text in YAML 1.1
            try:
                meant: Any = float(value)
            except ValueError:
                return False
            if meant != meant:
                return False
        case "string_type" if isinstance(value, int | float) and not isinstance(value, bool):
            meant = str(value)
        case "tuple_type" | "list_type" if not isinstance(value, list):  # a list of one
            meant = [value]
        case "dataclass_type" | "model_type" if value is None:  # a heading with nothing beneath it
            meant = {}
        case _:
            return False
    holder: Any = reduce(lambda node, part: node[part], path[:-1], plain)
    holder[path[-1]] = meant
    return True


def _explain(kind: Any, plain: dict[str, Any], mistakes: list[ErrorDetails], prefix: str) -> ConfigError:
    """Return what to tell a person about the weightiest mistake; a union has one of each of its members."""
    order = ("value_error", "extra_forbidden", "unexpected_keyword_argument", "literal_error", "missing")
    ranks = [order.index(one["type"]) if one["type"] in order else len(order) for one in mistakes]
    paths = [_path(plain, one) for one in mistakes]
    best = min(range(len(mistakes)), key=lambda n: (ranks[n], -len(paths[n])))
    mistake, value = mistakes[best], mistakes[best]["input"]
    key = prefix + ".".join(map(str, paths[best]))
    context = mistake.get("ctx", {})
    match mistake["type"]:
        case "value_error":
            error = context["error"]
            where = key.rstrip(".") or "of the run"
            return error if isinstance(error, ConfigError) else ConfigError(f"settings {where} cannot work: {error}")
        case "extra_forbidden" | "unexpected_keyword_argument":
            return ConfigError(_unknown(kind, key.removeprefix(prefix), prefix))
        case "missing" if isinstance(value, list):
            return ConfigError(f"{key}={value!r} has {len(value)} values, which is too few")
        case "missing":
            return ConfigError(f"{'.'.join(filter(None, [key, str(mistake['loc'][-1])]))} is missing; write it too")
        case "too_long":
            return ConfigError(f"{key}={value!r} has {len(value)} values; write {context['max_length']}")
        case "literal_error" | "enum":
            choices = context["expected"].replace("'", "").replace(" or ", ", ")
            near = difflib.get_close_matches(str(value), choices.split(", "), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return ConfigError(f"{key}={value!r} is no choice; use one of {choices}{hint}")
        case "dataclass_type" | "model_type":
            return ConfigError(f"{key} holds {value!r}; write its settings indented beneath it")
        case "dict_type" | "mapping_type":
            return ConfigError(f"{key}={value!r} is no mapping; write it as {{name: value}}")
        case other:
            wanted = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text"}
            named = wanted.get(other.partition("_")[0])
            return ConfigError(f"{key}={value!r} is not {named}" if named else f"{key}={value!r}: {mistake['msg']}")


def _unknown(kind: Any, key: str, prefix: str) -> str:
    """Return what to tell a person about a key that is no setting, with the nearest that is one."""
    keys = list(setting_schemas(kind, prefix))
    known = [*setting_schemas(kind, prefix, alternatives=True), *{k.rpartition(".")[0] for k in keys}]
    plain_key = ".".join(part for part in (prefix + key).split(".") if not part.isdigit())
    near = difflib.get_close_matches(plain_key, known, n=1, cutoff=0.6)
    if not near:  # right name, wrong place
        near = [k for k in known if k.rpartition(".")[2] == plain_key.rpartition(".")[2]][:1]
    hint = f"did you mean {near[0]!r}?" if near else f"the settings are {', '.join(keys)}"
    return f"unknown setting {prefix + key!r}; {hint}"
