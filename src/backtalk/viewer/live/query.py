"""Select and order rollouts: conditions on facts such as ``reward<1 stop:max_turns``, and words to search for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from backtalk.viewer.live.table import NUMBERS, TEXT, compute

_TERM = re.compile(r'(?:(?P<field>[a-z_]+)(?P<op>:|<=|>=|!=|=|<|>))?(?:"(?P<quoted>[^"]*)"?|(?P<bare>\S+))')


@dataclass(frozen=True, slots=True)
class Condition:
    """A bound on one fact. ``op`` is one of : = != < <= > >=; ``value`` holds alternatives between commas."""

    field: str
    op: str
    value: str


@dataclass(frozen=True, slots=True)
class Query:
    """Conditions, all of which have to hold, and texts, all of which have to have been said."""

    conditions: tuple[Condition, ...] = ()
    words: tuple[str, ...] = ()


def parse_query(text: str) -> Query:
    """Read a query. What is no condition on a known fact is a text to search for; quotes keep spaces.

    ``stop:max_turns,deadline`` takes either, ``step:3..5`` a range, and ``failed`` stands for ``stop:failed``.
    """
    conditions, words = [], []
    for match in _TERM.finditer(text):
        field, op = match["field"], match["op"]
        value = match["quoted"] if match["quoted"] is not None else match["bare"]
        if field is None and value == "failed":
            conditions.append(Condition("stop", ":", "failed"))
        elif (field in NUMBERS and _is_bound(op, value)) or (field in TEXT and op in (":", "=", "!=")):
            conditions.append(Condition(field, op, value))
        elif match[0].strip('"'):
            words.append(match[0] if field is not None else value)
    return Query(tuple(conditions), tuple(words))


def select(table: Any, conditions: Sequence[Condition]) -> Any:
    """Return a mask of the rows of a table for which all conditions hold. A fact that is not known fits none."""
    import pyarrow as pa

    pc = compute()
    mask = pa.array([True] * table.num_rows, pa.bool_())
    for condition in conditions:
        holds = _text_mask if condition.field in TEXT else _number_mask
        mask = pc.and_(mask, pc.fill_null(holds(table[condition.field].combine_chunks(), condition), False))
    return mask


def sorted_rows(table: Any, column: str, descending: bool) -> Any:
    """Return a table ordered by a column, ties by step (newest first), group and sample."""
    pc = compute()
    if column not in table.schema.names:
        column, descending = "step", True
    keys = [(column, "descending" if descending else "ascending")]
    rest = [("step", "descending"), ("run", "ascending"), ("kind", "descending"), ("row", "ascending")]
    keys += [(name, order) for name, order in rest if name != column]
    return table.take(pc.sort_indices(table, sort_keys=keys))


def _is_bound(op: str, value: str) -> bool:
    """Return whether a value is a number, alternatives between commas, or for ``:`` a range with an open end too."""
    if op in ("<", "<=", ">", ">="):
        return _is_number(value)
    parts = [part.split("..", 1) for part in value.split(",")]
    return all(all(_is_number(end) or (end == "" and len(part) == 2) for end in part) for part in parts)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _text_mask(column: Any, condition: Condition) -> Any:
    pc = compute()
    known = pc.fill_null(column, "")
    mask = None
    for value in condition.value.split(","):
        is_part = condition.op == ":"
        found = pc.match_substring(known, value, ignore_case=True) if is_part else pc.equal(known, value)
        mask = found if mask is None else pc.or_(mask, found)
    return pc.invert(mask) if condition.op == "!=" else mask


def _number_mask(column: Any, condition: Condition) -> Any:
    pc = compute()
    compare = {"<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal}.get(condition.op)
    mask = None
    for value in condition.value.split(","):
        low, dots, high = value.partition("..")
        if compare is not None:
            found = compare(column, float(low))
        elif dots:
            above = pc.greater_equal(column, float(low)) if low else pc.is_valid(column)
            found = pc.and_(above, pc.less_equal(column, float(high))) if high else above
        else:
            found = pc.equal(column, float(value))
        mask = found if mask is None else pc.or_(mask, found)
    return pc.invert(mask) if condition.op == "!=" else mask
