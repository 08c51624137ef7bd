"""TOML, written: the standard library only reads it."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from typing import Any


def toml_text(table: Mapping[str, Any], path: tuple[str, ...] = ()) -> str:
    """A TOML table: plain keys first, then the tables within, each under its own heading.

    Raises:
        TypeError: a key that is no text, or a value that TOML has no form for.
    """
    plain = [f"{_toml_key(k)} = {_toml_value(v)}\n" for k, v in table.items() if not isinstance(v, Mapping)]
    inner = [toml_text(v, (*path, k)) for k, v in table.items() if isinstance(v, Mapping)]
    heading = f"\n[{'.'.join(map(_toml_key, path))}]\n" if path and (plain or not inner) else ""
    return heading + "".join(plain) + "".join(inner)


def _toml_key(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"key {key!r} is not a string")
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)


def _toml_value(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case int():
            return repr(int(value))
        case float():
            return repr(float(value))
        case list() | tuple():
            return "[" + ", ".join(map(_toml_value, value)) + "]"
        case Mapping():
            return "{" + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items()) + "}"
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case _:
            raise TypeError(f"{value!r} is a {type(value).__name__}; use text, numbers, true or false, lists, tables")
