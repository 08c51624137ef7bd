"""Argument values: strict JSON, text typed by a JSON schema, and whether a call is what its tool takes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from backtalk.language.tool_formats.base import excerpt, names
from backtalk.messages import ToolCall, ToolSpec, clean_text

MAX_DEPTH = 32  # of nested arrays and objects in one call
MAX_DIGITS = 400  # of one number

_PYTHON_WORDS = {"True": True, "False": False, "None": None}  # as templates that print values write them


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {excerpt(twice)} comes twice in one object")
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"the number {digits[:8]}... has {len(digits)} digits, at most {MAX_DIGITS} are read")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:24]} is too large")
    return value


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_number, parse_constant=_constant
)


def read_json(text: str, start: int = 0) -> tuple[Any, int]:
    """One JSON value and where it ends; strict: no key twice, no NaN, no endless number or nesting.

    Raises:
        ValueError: what is wrong, with the position where there is one.
    """
    try:
        value, end = _DECODER.raw_decode(text, start)
        return clean_value(value), end
    except json.JSONDecodeError as error:
        hint = r"; a line end in a string is written \n" if error.msg.startswith("Invalid control character") else ""
        at = f"at character {error.pos - start}, {excerpt(text, error.pos)}" if error.pos < len(text) else "at its end"
        raise ValueError(f"{error.msg[:1].lower()}{error.msg[1:].removesuffix(' at')} {at}{hint}") from None
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None


def clean_value(value: Any, depth: int = 0) -> Any:
    """A copy of a JSON value whose texts can be encoded."""
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    match value:
        case str():
            return clean_text(value)
        case Mapping():
            return {clean_text(str(key)): clean_value(item, depth + 1) for key, item in value.items()}
        case list() | tuple():
            return [clean_value(item, depth + 1) for item in value]
        case _:
            return value


def write_json(value: Any) -> str:
    """Raises ValueError or TypeError for what JSON cannot hold."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


# --- values by schema ---


def properties(tool: ToolSpec) -> Mapping[str, Any]:
    """The schema of each argument."""
    found = tool.parameters.get("properties")
    return found if isinstance(found, Mapping) else {}


def types_of(schema: Any) -> frozenset[str]:
    """The JSON types that a schema allows; empty where it does not say."""
    if not isinstance(schema, Mapping):
        return frozenset()
    kinds = schema.get("type")
    if isinstance(kinds, str):
        return frozenset({kinds})
    if isinstance(kinds, Sequence):
        return frozenset(kind for kind in kinds if isinstance(kind, str))
    inner = [types_of(option) for option in _options(schema)]
    return frozenset().union(*inner) if all(inner) else frozenset()


def _options(schema: Mapping[str, Any]) -> list[Any]:
    found = schema.get("anyOf") or schema.get("oneOf")
    return list(found) if isinstance(found, Sequence) and not isinstance(found, str) else []


def is_text(schema: Any) -> bool:
    """Whether bare text is a value of this schema as it stands."""
    kinds = types_of(schema)
    return not kinds or "string" in kinds


def value_of(text: str, schema: Any) -> Any:
    """Bare text as the value that its schema means; text that is none stays text, which the check then refuses."""
    if is_text(schema):
        return clean_text(text)
    if text.strip() in _PYTHON_WORDS:
        return _PYTHON_WORDS[text.strip()]
    try:
        start = len(text) - len(text.lstrip())
        value, end = read_json(text, start)
    except ValueError:
        return clean_text(text)
    return value if not text[end:].strip() else clean_text(text)


def text_of(value: Any) -> str:
    """The inverse of :func:`value_of`."""
    return value if isinstance(value, str) else write_json(value)


def example(tool: ToolSpec) -> ToolCall:
    """A call of this tool to show how calls are written."""
    blanks = {"integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}, "null": None}
    schemas, required = properties(tool), tool.parameters.get("required")
    wanted = [name for name in schemas if isinstance(required, Sequence) and name in required]
    arguments: dict[str, Any] = {}
    for name in wanted or list(schemas)[:1]:
        kinds = types_of(schemas.get(name))
        arguments[name] = "..." if not kinds or "string" in kinds else blanks.get(min(kinds))
    return ToolCall(tool.name, arguments)


# --- does a call fit its tool ---


def call_problem(call: ToolCall, tools: Sequence[ToolSpec]) -> str | None:
    """Why a call cannot be carried out: no such tool, arguments that are missing, unknown or of the wrong type."""
    tool = next((tool for tool in tools if tool.name == call.tool), None)
    if tool is None:
        listed = f"the tools are {names(tools)}" if len(tools) > 1 else f"the tool is {names(tools)}"
        return f"there is no tool {excerpt(call.tool)}; {listed if tools else 'there are no tools'}"
    known = properties(tool)
    got = ", ".join(excerpt(name) for name in list(call.arguments)[:5]) or "none"
    required = tool.parameters.get("required")
    for name in required if isinstance(required, Sequence) and not isinstance(required, str) else ():
        if name not in call.arguments:
            return f"{tool.name} needs the argument {name!r}, got {got}"
    extra = tool.parameters.get("additionalProperties", not known)
    for name, value in call.arguments.items():
        if name not in known and extra is False:
            takes = ", ".join(repr(each) for each in known) or "none"
            return f"{tool.name} takes no argument {excerpt(name)}; it takes {takes}"
        wrong = _mismatch(value, known.get(name, extra))
        if wrong:
            return f"the argument {excerpt(name)} of {tool.name} {wrong}"
    return None


def _mismatch(value: Any, schema: Any, depth: int = 0) -> str | None:
    """What is wrong with a value, for the keywords that tools use; others are the tool's own to check."""
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return None
    kinds = types_of(schema)
    if kinds and not any(_is(value, kind) for kind in kinds):
        return f"has to be {_article(' or '.join(sorted(kinds)))}, got {_described(value)}"
    choices = schema.get("enum")
    if isinstance(choices, Sequence) and value not in choices:
        return f"has to be one of {excerpt(', '.join(map(str, choices)), width=120)}, got {_described(value)}"
    options = _options(schema)
    if options and all(_mismatch(value, option, depth + 1) for option in options):
        return _mismatch(value, options[0], depth + 1)
    if isinstance(value, list):
        for number, item in enumerate(value):
            if wrong := _mismatch(item, schema.get("items"), depth + 1):
                return f"at item {number} {wrong}"
    if isinstance(value, dict):
        return _object_mismatch(value, schema, depth)
    return None


def _object_mismatch(value: dict[str, Any], schema: Mapping[str, Any], depth: int) -> str | None:
    known, required = schema.get("properties"), schema.get("required")
    for name in required if isinstance(required, Sequence) and not isinstance(required, str) else ():
        if name not in value:
            return f"needs the key {name!r}"
    for name, item in value.items():
        inner = known.get(name) if isinstance(known, Mapping) else None
        if wrong := _mismatch(item, inner, depth + 1):
            return f"at key {excerpt(name)} {wrong}"
    return None


def _is(value: Any, kind: str) -> bool:
    match kind:
        case "string":
            return isinstance(value, str)
        case "integer":
            return _is(value, "number") and value % 1 == 0
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "boolean":
            return isinstance(value, bool)
        case "array":
            return isinstance(value, list)
        case "object":
            return isinstance(value, dict)
        case "null":
            return value is None
        case _:
            return True  # no type of JSON's: nothing to hold it against


def _article(kind: str) -> str:
    return f"{'an' if re.match('[aeiou]', kind) else 'a'} {kind}"


def _described(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"the number {excerpt(repr(value))[1:-1]}" if len(repr(value)) <= 24 else "a number"
        case str():
            return f"the text {excerpt(value)}"
        case list():
            return f"an array of {len(value)}"
        case _:
            return "an object"
