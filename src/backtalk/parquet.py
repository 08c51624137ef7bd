"""Read Parquet files as rows, without the nulls that the format fills in.

Arrow gives all structs of a column the same fields, and null to a row that has not got one of them. So a null in a
struct means "not there": the call ``{"command": "ls"}`` stays one beside a call ``{"answer": "1"}``. Nulls in lists,
and in columns of Arrow's map type, were written by somebody and are kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backtalk.files import parquet_table


def parquet_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file as plain data: structs and maps as dicts, fields that are null left out.

    Raises:
        DataError: the file cannot be read, or is no Parquet file.
    """
    import pyarrow as pa

    table = parquet_table(path)
    row = pa.struct(list(table.schema))
    return [_without_fill(given, row) for given in table.to_pylist()]


def _without_fill(value: Any, kind: Any) -> Any:
    """Return a value of this Arrow type without the null fields of its structs, at any depth."""
    from pyarrow import types

    if value is None or not types.is_nested(kind):
        return value
    if types.is_struct(kind):
        return {field.name: _without_fill(value[field.name], field.type) for field in kind if _is_there(value, field)}
    if types.is_map(kind):
        return {key: _without_fill(item, kind.item_type) for key, item in value}
    inner = getattr(kind, "value_type", None)  # a union has none
    if inner is None or not types.is_nested(inner):
        return value
    return [_without_fill(item, inner) for item in value]


def _is_there(row: dict[str, Any], field: Any) -> bool:
    return row.get(field.name) is not None
