"""Read and check argument values: strict JSON, text typed by a JSON Schema, and calls against their tools."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from backtalk.messages import ToolCall, ToolSpec, clean_text

MAX_DEPTH = 32  # of nested arrays and objects in one call
MAX_DIGITS = 400  # of one number

_PYTHON_WORDS = {"True": True, "False": False, "None": None}  # templates that print values write these
_PYTHON_TYPES = {"string": str, "boolean": bool, "array": list, "object": dict, "null": type(None)}


def excerpt(text: str, position: int = 0, width: int = 24) -> str:
    """Return at most ``width`` characters of a text, in quotes."""
    return repr(text[position : position + width]) + ("..." if len(text) > position + width else "")


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


class JsonError(ValueError):
    """A text that is not JSON; ``at`` is the position from which on no text could mend it."""

    def __init__(self, message: str, at: int) -> None:
        super().__init__(message)
        self.at = at


def read_json(text: str, start: int = 0) -> tuple[Any, int]:
    """Return one JSON value and its end position; a repeated key, NaN, and a too long or too deep value are refused.

    Raises:
        ValueError: what is wrong; a JsonError where it has a position.
    """
    try:
        value, end = _DECODER.raw_decode(text, start)
        return clean_value(value), end
    except json.JSONDecodeError as error:
        hint = r"; a line end in a string is written \n" if error.msg.startswith("Invalid control character") else ""
        at = f"at character {error.pos - start}, {excerpt(text, error.pos)}" if error.pos < len(text) else "at its end"
        mendable = error.msg.startswith("Unterminated string")
        message = f"{error.msg[:1].lower()}{error.msg[1:].removesuffix(' at')} {at}{hint}"
        raise JsonError(message, len(text) if mendable else error.pos) from None
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None


def clean_value(value: Any, depth: int = 0) -> Any:
    """Return a copy of a JSON value whose texts can be encoded as UTF-8."""
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
    """Return a value as JSON; raise ValueError or TypeError if JSON cannot hold it."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def argument_schemas(tool: ToolSpec) -> Mapping[str, Any]:
    """Return the JSON Schema of each argument of a tool."""
    found = tool.parameters.get("properties")
    return found if isinstance(found, Mapping) else {}


def json_types(schema: Any) -> frozenset[str]:
    """Return the JSON types that a schema allows; none if it does not say."""
    if not isinstance(schema, Mapping):
        return frozenset()
    kinds = schema.get("type")
    if isinstance(kinds, str):
        return frozenset({kinds})
    if isinstance(kinds, Sequence):
        return frozenset(kind for kind in kinds if isinstance(kind, str))
    inner = [json_types(option) for option in _options(schema)]
    return frozenset().union(*inner) if all(inner) else frozenset()


def _required(schema: Mapping[str, Any]) -> Sequence[str]:
    found = schema.get("required")
    return found if isinstance(found, Sequence) and not isinstance(found, str) else ()


def _options(schema: Mapping[str, Any]) -> list[Any]:
    found = schema.get("anyOf") or schema.get("oneOf")
    return list(found) if isinstance(found, Sequence) and not isinstance(found, str) else []


def is_text(schema: Any) -> bool:
    """Return whether plain text is a value of this schema without conversion."""
    kinds = json_types(schema)
    return not kinds or "string" in kinds


def parse_value(text: str, schema: Any) -> Any:
    """Return plain text as a value of its schema's type; unchanged if it is none, which call_problem then reports."""
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


def format_value(value: Any) -> str:
    """Return a value as plain text: the inverse of :func:`parse_value`."""
    return value if isinstance(value, str) else write_json(value)


def example_call(tool: ToolSpec) -> ToolCall:
    """Return an example call of a tool, with placeholders as arguments."""
    blanks = {"integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}, "null": None}
    schemas, required = argument_schemas(tool), _required(tool.parameters)
    arguments: dict[str, Any] = {}
    for name in [name for name in schemas if name in required] or list(schemas)[:1]:
        schema = schemas.get(name)
        arguments[name] = "..." if is_text(schema) else blanks.get(min(json_types(schema)))
    return ToolCall(tool.name, arguments)


def call_problem(call: ToolCall, tools: Sequence[ToolSpec]) -> str | None:
    """Return why a call cannot be run (no such tool, or a missing, unknown or mistyped argument), or None."""
    tool = next((tool for tool in tools if tool.name == call.tool), None)
    if tool is None:
        *names, last = [tool.name for tool in tools] or [""]
        listed = f"the tools are {', '.join(names)} and {last}" if names else f"the tool is {last}"
        return f"there is no tool {excerpt(call.tool)}; {listed if tools else 'there are no tools'}"
    known = argument_schemas(tool)
    got = ", ".join(excerpt(name) for name in list(call.arguments)[:5]) or "none"
    for name in _required(tool.parameters):
        if name not in call.arguments:
            return f"{tool.name} needs the argument {name!r}, got {got}"
    extra = tool.parameters.get("additionalProperties", not known)
    for name, value in call.arguments.items():
        if name not in known and extra is False:
            takes = ", ".join(map(repr, known)) or "none"
            return f"{tool.name} takes no argument {excerpt(name)}; it takes {takes}"
        wrong = _mismatch(value, known.get(name, extra))
        if wrong:
            return f"the argument {excerpt(name)} of {tool.name} {wrong}"
    return None


def _mismatch(value: Any, schema: Any, depth: int = 0) -> str | None:
    """Return the first violation of a schema in words, or None; keywords that tools rarely use are not checked."""
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return None
    kinds = json_types(schema)
    if kinds and not any(_is(value, kind) for kind in kinds):
        wanted = " or ".join(sorted(kinds))
        return f"has to be {'an' if wanted[0] in 'aeiou' else 'a'} {wanted}, got {_described(value)}"
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
        known = schema.get("properties")
        for name in _required(schema):
            if name not in value:
                return f"needs the key {name!r}"
        for name, item in value.items():
            inner = known.get(name) if isinstance(known, Mapping) else None
            if wrong := _mismatch(item, inner, depth + 1):
                return f"at key {excerpt(name)} {wrong}"
    return None


def _is(value: Any, kind: str) -> bool:
    """Return whether a value is of a JSON type; any value is of a type that JSON does not have."""
    if kind in ("integer", "number"):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and (kind == "number" or value % 1 == 0)
    return isinstance(value, _PYTHON_TYPES.get(kind, object))


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
