"""Check the fields of foreign records: objects as dicts, token ids, masks and numbers, with errors that name the place.

No other library has to be installed: a dataclass or pydantic model is read by its public fields.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

from backtalk.errors import DataError

T = TypeVar("T")


def plain(record: Any) -> Any:
    """Return a mapping or list as it is; a pydantic model, dataclass or object with ``to_dict`` as a dict.

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
    """Return a record as a mapping; raise DataError for a list or a bare value."""
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


def unpacked(value: Any) -> Any:
    """Return a text that is JSON, read; any other value as it is, so that it is named as it was written."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def first_of(record: Mapping[str, Any], *names: str) -> Any:
    """Return the first of these fields that is not None, else None."""
    return next((record[name] for name in names if record.get(name) is not None), None)


def required(record: Mapping[str, Any], what: str, *names: str) -> Any:
    """Return the first of these fields that is not None; raise DataError where there is none."""
    value = first_of(record, *names)
    if value is None:
        raise DataError(f"{what} has no {' or '.join(map(repr, names))}, only {sorted(record)[:12]}")
    return value


def token_ids(values: Any, what: str) -> tuple[int, ...]:
    """Return token ids, unchanged; raise DataError unless all are whole numbers from 0 on."""
    problem = "which is no token id; ids are whole numbers from 0 on"
    return tuple(_checked(values, what, lambda x: type(x) is int and 0 <= x < 2**31, problem))


def numbers(values: Any, what: str) -> tuple[float, ...]:
    """Return finite numbers, unchanged; raise DataError for any that is no number, NaN or infinite."""
    problem = "but a logprob is a finite number, so this record is damaged"
    return tuple(map(float, _checked(values, what, is_finite, problem)))


def booleans(values: Any, what: str) -> tuple[bool, ...]:
    """Return a mask as booleans; raise DataError for anything but booleans, 0 and 1."""
    return tuple(map(bool, _checked(values, what, (0, 1).__contains__, "but a mask holds 0 and 1, or false and true")))


def reward_of(record: Mapping[str, Any]) -> float | None:
    """Return the reward, None where there is none; raise DataError for one that is not finite."""
    value = unpacked(record.get("reward"))
    if value is not None and not is_finite(value):
        raise DataError(f"reward is {value!r}; it must be a finite number, or null where there is none")
    return None if value is None else float(value)


def same_length(**columns: Sequence[Any] | None) -> None:
    """Raise DataError, with every length, unless all columns that are not None have the same."""
    lengths = {name: len(column) for name, column in columns.items() if column is not None}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(f"columns of one length were expected, one entry a token, got {listed}")


def runs(values: Iterable[T]) -> Iterator[tuple[T, int, int]]:
    """Yield each run of equal values: the value, its first position and the one past its last."""
    end = 0
    for value, run in groupby(values):
        start, end = end, end + sum(1 for _ in run)
        yield value, start, end


def is_finite(x: Any) -> bool:
    """Return whether a value is a finite number, and no boolean."""
    try:
        return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
    except OverflowError:  # a whole number beyond every float
        return False


def _checked(values: Any, what: str, is_valid: Callable[[Any], bool], problem: str) -> Sequence[Any]:
    """Return the values as a list, an array or tensor too; raise DataError with the first that is not valid."""
    values = unpacked(values)
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise DataError(f"{what} is {type(values).__name__}, not a list")
    for position, x in enumerate(values):
        if not is_valid(x):
            raise DataError(f"{what}[{position}] is {x!r}, {problem}")
    return values
