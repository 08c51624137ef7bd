"""Write Parquet files, and read them: as tables, or as rows without the nulls that the format fills in.

Arrow gives all structs of a column the same fields, and null to a row that has not got one of them. So a null in a
struct means "not there": the call ``{"command": "ls"}`` stays one beside a call ``{"answer": "1"}``. Nulls in lists,
and in columns of Arrow's map type, were written by somebody and are kept.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from backtalk.errors import DataError
from backtalk.files import reading, write_bytes


def write_table(path: Path, table: Any) -> None:
    """Write a ``pyarrow.Table`` with zstd compression; the file appears whole or not at all.

    Raises:
        DataError: the file cannot be written.
    """
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(path, sink.getvalue())


def read_table(path: Path) -> Any:
    """Return a Parquet file as a ``pyarrow.Table``, read without starting a thread.

    Arrow's threads outlive the reading. One that still holds a Python object when the interpreter ends asks for its
    lock, is made to exit, and aborts the process: "terminate called without an active exception".

    Raises:
        DataError: the file cannot be read, or is no Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with reading(path):
        content = path.read_bytes()
    try:
        return pq.ParquetFile(pa.BufferReader(content), pre_buffer=False).read(use_threads=False)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise DataError(
            f"{path} is not a Parquet file ({error}); it may be cut off or foreign, so write it again"
        ) from error


def parquet_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file as plain data: structs and maps as dicts, fields that are null left out.

    Raises:
        DataError: the file cannot be read, or is no Parquet file.
    """
    import pyarrow as pa

    table = read_table(path)
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
