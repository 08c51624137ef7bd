"""Records of other libraries as plain data: dicts as they are, objects by their public fields, numbers checked."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from backtalk.errors import DataError


def plain(record: Any) -> Any:
    """A mapping or list as it is; a pydantic model, dataclass or object with ``to_dict`` as a dict.

    Raises:
        DataError: anything else.
    """
    if isinstance(record, (Mapping, list, tuple)):
        return record
    for method in ("model_dump", "to_dict"):
        if callable(getattr(record, method, None)):
            return getattr(record, method)()
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return dataclasses.asdict(record)
    raise DataError(f"got {type(record).__name__}, which is no record; pass a dict, a dataclass or a pydantic model")


def mapping(record: Any, what: str) -> Mapping[str, Any]:
    found = plain(record)
    if not isinstance(found, Mapping):
        raise DataError(f"{what} is a {type(found).__name__}, not an object with fields; is the format the right one?")
    return found


def parsed(value: Any, what: str) -> Any:
    """Return a value that data sets often keep as JSON text, read; any other value as it is.

    Raises:
        DataError: a text that is not JSON.
    """
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise DataError(f"{what} is a text that is not JSON ({error}): {value[:80]!r}") from error


def first_of(record: Mapping[str, Any], *names: str) -> Any:
    """The value of the first of these fields that is there and not None, else None."""
    return next((record[name] for name in names if record.get(name) is not None), None)


def required(record: Mapping[str, Any], what: str, *names: str) -> Any:
    value = first_of(record, *names)
    if value is None:
        raise DataError(f"{what} has no {' or '.join(map(repr, names))}, only {sorted(record)[:12]}")
    return value


def token_ids(values: Any, what: str) -> tuple[int, ...]:
    """Token ids, unchanged.

    Raises:
        DataError: one is not a whole number of at least 0.
    """
    ids = tuple(_list(values, what))
    for position, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 2**31:
            raise DataError(f"{what}[{position}] is {token!r}, which is no token id; ids are whole numbers from 0 on")
    return ids


def numbers(values: Any, what: str) -> tuple[float, ...]:
    """Finite numbers, unchanged.

    Raises:
        DataError: one is no number, NaN or infinite.
    """
    found = tuple(_list(values, what))
    for position, x in enumerate(found):
        if not _is_finite(x):
            raise DataError(f"{what}[{position}] is {x!r}; a logprob is a finite number, so this record is damaged")
    return tuple(map(float, found))


def booleans(values: Any, what: str) -> tuple[bool, ...]:
    """A mask of 0 and 1 or of booleans."""
    found = tuple(_list(values, what))
    for position, x in enumerate(found):
        if x not in (0, 1):
            raise DataError(f"{what}[{position}] is {x!r}; a mask holds 0 and 1, or false and true")
    return tuple(bool(x) for x in found)


def reward_of(record: Mapping[str, Any], *names: str) -> float | None:
    """A reward, or None where there is none."""
    value = first_of(record, *(names or ("reward",)))
    if value is None:
        return None
    if not _is_finite(value):
        raise DataError(f"reward is {value!r}; it must be a finite number, or null where there is none")
    return float(value)


def same_length(**columns: Sequence[Any] | None) -> None:
    """Raises DataError, with every length, unless all columns that are there have the same."""
    lengths = {name: len(column) for name, column in columns.items() if column is not None}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(f"columns of one length were expected, one entry a token, got {said}")


def _is_finite(x: Any) -> bool:
    try:
        return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
    except OverflowError:  # a whole number beyond every float
        return False


def _list(values: Any, what: str) -> Sequence[Any]:
    if hasattr(values, "tolist"):  # an array or tensor
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise DataError(f"{what} is {type(values).__name__}, not a list")
    return values
