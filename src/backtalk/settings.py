"""Build settings classes from nested plain data, checked, and describe them as JSON Schema.

A settings class is a frozen dataclass that lives beside what it sets. pydantic checks the data against its fields and
types; this module turns pydantic's errors into messages that say what to type instead. backtalk.run.settings_file reads
the YAML of a run.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import pkgutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache, reduce
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from backtalk.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

T = TypeVar("T")

# What a value is not, by the first word of pydantic's error type.
_WRONG_KIND = {
    "int": "is not a whole number",
    "float": "is not a number",
    "bool": "is not true or false",
    "string": "is not text",
    "dict": "is no mapping; write it as {name: value}",
    "mapping": "is no mapping; write it as {name: value}",
    "dataclass": "is no group of settings; write its settings indented beneath it",
    "model": "is no group of settings; write its settings indented beneath it",
}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested plain data by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def from_plain(kind: type[T], tree: Any, prefix: str = "") -> T:
    """Build settings of class ``kind`` (a dataclass or a pydantic model) from nested plain data, and check them.

    ``prefix`` is put before every key in messages.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or settings that cannot work.
    """
    from pydantic import ValidationError
    from pydantic_core import to_jsonable_python

    plain = to_jsonable_python(tree, fallback=str)  # dates and paths become text
    if isinstance(plain, dict):
        for key, value in flatten(plain).items():
            if value != value:  # nan passes every comparison with a bound
                raise ConfigError(f"{prefix}{key}={value!r} is not a number")
    while True:
        try:  # as JSON, because Python's strict mode refuses a list for a tuple
            return _adapter(kind).validate_json(json.dumps(plain), strict=True, extra="forbid")
        except ValidationError as error:
            mistakes = error.errors(include_url=False)
            if not any([_repair(plain, mistake) for mistake in mistakes]):
                raise _explain(kind, plain, mistakes, prefix) from None


def to_plain(value: Any, kind: Any = None) -> dict[str, Any]:
    """Return settings as nested plain data, ready for YAML: the inverse of :func:`from_plain`."""
    return _adapter(kind or type(value)).dump_python(value, mode="json", warnings=False)


def json_schema(kind: Any) -> dict[str, Any]:
    """Return the JSON Schema of settings class ``kind``; the string under a field becomes its description."""
    from pydantic import TypeAdapter

    # Of a list of them, because pydantic takes no configuration for a dataclass itself.
    settings_list: Any = list.__class_getitem__(kind)
    adapter = TypeAdapter(settings_list, config={"extra": "forbid", "use_attribute_docstrings": True})
    schema = adapter.json_schema(schema_generator=_schema_generator())
    return schema["$defs"].pop(schema["items"]["$ref"].rpartition("/")[2]) | {"$defs": schema["$defs"]}


@cache
def _schema_generator() -> Any:
    """Return pydantic's generator with the descriptions of inherited fields, which it leaves out."""
    from pydantic.json_schema import GenerateJsonSchema

    class Generator(GenerateJsonSchema):
        def dataclass_schema(self, schema: Any) -> dict[str, Any]:
            found = super().dataclass_schema(schema)
            for base in filter(is_dataclass, schema["cls"].__mro__[1:]):
                for name, item in json_schema(base)["properties"].items():
                    found["properties"][name] = {
                        "description": item.get("description", ""),
                        **found["properties"][name],
                    }
            return found

    return Generator


def setting_schemas(kind: Any, prefix: str = "", *, alternatives: bool = False) -> dict[str, dict[str, Any]]:
    """Return the JSON Schema of each setting by its dotted key.

    A setting that takes a value or a group (a coefficient or its schedule) is one setting; ``alternatives`` adds the
    settings of such groups.
    """
    top = json_schema(kind)

    def visit(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if "$ref" in node:
            node = top["$defs"][node["$ref"].rpartition("/")[2]]
        for name, item in node.get("properties", {}).items():
            if "$ref" not in item:
                yield f"{prefix}{name}", item
            for group in _references(item) if "$ref" in item or alternatives else ():
                yield from visit(group, f"{prefix}{name}.")

    return dict(visit(top, prefix))


def import_object(path: str, key: str) -> Any:
    """Import what ``package.module:Name`` names, from the current folder too; ``key`` is the setting that holds it.

    Raises:
        ConfigError: there is no such module, or no such name in it.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as for `python -m`
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{key}={path!r} cannot be imported ({error}); write package.module:Name, and start from the folder that "
            "holds the package, or install it"
        ) from error


def check_choices(config: Any) -> None:
    """Refuse a value that a field's Literal does not list, in settings that were made in Python.

    Raises:
        ConfigError: there is such a value.
    """
    for name, hint in _hints(type(config)).items():
        if get_origin(hint) is Literal and getattr(config, name) not in get_args(hint):
            choices = ", ".join(map(str, get_args(hint)))
            raise ConfigError(f"{name}={getattr(config, name)!r} is no choice; use one of {choices}")


_hints = cache(get_type_hints)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _references(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the groups of settings that a value of this schema may be, or may list."""
    if "$ref" in node:
        yield node
    for item in (*node.get("anyOf", ()), *([node["items"]] if "items" in node else ())):
        yield from _references(item)


def _path(plain: Any, mistake: ErrorDetails) -> list[Any]:
    """Return the keys that lead to a mistake; pydantic's location also names members of unions, which are left out."""
    path: list[Any] = []
    part: Any
    for part in mistake["loc"]:
        if part in (plain if isinstance(plain, dict) else range(len(plain)) if isinstance(plain, list) else ()):
            plain = plain[part]
            path.append(part)
    return path


def _repair(plain: Any, mistake: ErrorDetails) -> bool:
    """Replace a value that YAML read otherwise than a person meant it; return whether it was one."""
    value, path = mistake["input"], _path(plain, mistake)
    meant: Any
    match mistake["type"]:
        case "float_type" if isinstance(value, str):  # 1e-4, without a dot, is text in YAML 1.1
            try:
                meant = float(value)
            except ValueError:
                return False
        case "string_type" if isinstance(value, int | float) and not isinstance(value, bool):
            meant = str(value)
        case "tuple_type" | "list_type" if not isinstance(value, list):
            meant = [value]
        case "dataclass_type" | "model_type" if value is None:  # a heading with nothing beneath it
            meant = {}
        case _:
            return False
    if meant != meant or not path:
        return False
    reduce(lambda node, part: node[part], path[:-1], plain)[path[-1]] = meant
    return True


def _explain(kind: Any, plain: Any, mistakes: list[ErrorDetails], prefix: str) -> ConfigError:
    """Return the error to raise for the deepest mistake, as a union gives one for each of its members."""
    mistakes = _of_nearest_alternatives(plain, mistakes)
    paths = [_path(plain, mistake) + [*mistake["loc"][-1:]] * (mistake["type"] == "missing") for mistake in mistakes]
    telling = ("value_error", "extra_forbidden", "unexpected_keyword_argument")
    deepest = max(range(len(paths)), key=lambda n: (len(paths[n]), mistakes[n]["type"] in telling))
    mistake, path = mistakes[deepest], paths[deepest]
    key, value, context = (prefix + ".".join(map(str, path))).rstrip("."), mistake["input"], mistake.get("ctx", {})
    match mistake["type"]:
        case "value_error" if isinstance(context["error"], ConfigError):
            return context["error"]
        case "value_error":
            message = f"settings {key or 'of the run'} cannot work: {context['error']}"
        case "extra_forbidden" | "unexpected_keyword_argument":
            message = _unknown_setting(kind, key, prefix)
        case "missing" if isinstance(value, list):
            message = f"{key.rpartition('.')[0]}={value!r} has {len(value)} values, which is too few"
        case "missing":
            message = f"{key} is missing; write it too"
        case "too_long":
            message = f"{key}={value!r} has {len(value)} values; write {context['max_length']}"
        case "literal_error" | "enum":
            choices = context["expected"].replace("'", "").replace(" or ", ", ")
            message = (
                f"{key}={value!r} is no choice; use one of {choices}{did_you_mean(str(value), choices.split(', '))}"
            )
        case other:
            problem = _WRONG_KIND.get(other.partition("_")[0], f"cannot work: {mistake['msg']}")
            message = f"{key or 'the file'}={value!r} {problem}"
    return ConfigError(message)


def _of_nearest_alternatives(plain: Any, mistakes: list[ErrorDetails]) -> list[ErrorDetails]:
    """Leave out the mistakes of an alternative, such as a schedule, whose keys the data has less of than another's."""
    wrong_keys: dict[tuple[Any, ...], dict[Any, float]] = defaultdict(lambda: defaultdict(float))
    places: list[tuple[tuple[Any, ...], Any]] = []
    for mistake in mistakes:  # at a key of the data, then the name of the alternative, or nothing
        loc, depth = mistake["loc"], 0
        while depth < len(loc) and _path(plain, {**mistake, "loc": loc[: depth + 1]}) == [*loc[: depth + 1]]:
            depth += 1
        place, name = loc[:depth], loc[depth] if depth < len(loc) else None
        places.append((place, name))
        if mistake["type"].endswith("_type") and depth == len(loc) - 1:
            wrong_keys[place][name] = math.inf
        else:
            wrong_keys[place][name] += mistake["type"] in ("missing", "extra_forbidden", "unexpected_keyword_argument")
    least = {place: min(names.values()) for place, names in wrong_keys.items()}
    return [m for m, (place, name) in zip(mistakes, places, strict=True) if wrong_keys[place][name] == least[place]]


def _unknown_setting(kind: Any, key: str, prefix: str) -> str:
    """Return the message about a key that is no setting, with the nearest that is one."""
    settings = list(setting_schemas(kind, prefix))
    known = [*setting_schemas(kind, prefix, alternatives=True), *{name.rpartition(".")[0] for name in settings}]
    wanted = ".".join(part for part in key.split(".") if not part.isdigit())
    same_name = [name for name in known if name.rpartition(".")[2] == wanted.rpartition(".")[2]]
    hint = did_you_mean(wanted, known) or did_you_mean("".join(same_name[:1]), same_name)
    return f"unknown setting {key!r}{hint or '; the settings are ' + ', '.join(settings)}"


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return a question about the nearest known word, to append to a message; empty if none is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
