"""Write Parquet files, and read them: as tables, or as rows without the nulls that the format fills in.

Arrow gives all structs of a column the same fields, and null to a row that has not got one of them. So a null in a
struct means "not there": the call ``{"command": "ls"}`` stays one beside a call ``{"answer": "1"}``. Nulls in lists,
and in columns of Arrow's map type, were written by somebody and are kept.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from backtalk.errors import DataError
from backtalk.files import reading, write_bytes

_ROWS_AT_ONCE = 16  # when one row is wanted


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


def read_columns(path: Path, columns: Sequence[str]) -> Any:
    """Return some columns of a Parquet file as a ``pyarrow.Table``; the others are not read from disk.

    Raises:
        DataError: the file cannot be read, is no Parquet file, or lacks one of the columns.
    """
    with _opened(path) as file:
        missing = set(columns) - set(file.schema_arrow.names)
        if missing:
            raise DataError(f"{path} lacks the columns {sorted(missing)}; it holds something else")
        return file.read(columns=list(columns), use_threads=False)


def read_row(path: Path, index: int) -> dict[str, Any]:
    """Return one row of a Parquet file as plain data, holding only a few rows in memory.

    Raises:
        DataError: the file cannot be read, is no Parquet file, or has fewer rows.
    """
    with _opened(path) as file:
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if not first <= index < first + rows:
                first += rows
                continue
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], use_threads=False):
                if index < first + batch.num_rows:
                    return batch.slice(index - first, 1).to_pylist()[0]
                first += batch.num_rows
        raise DataError(f"{path} has {file.metadata.num_rows} rows, so none at {index}; rows count from 0")


def read_first_rows(path: Path, count: int, *, start: int = 0) -> list[dict[str, Any]]:
    """Return at most ``count`` rows of a Parquet file from ``start`` on as plain data, holding few others in memory.

    Raises:
        DataError: the file cannot be read, or is no Parquet file.
    """
    rows: list[dict[str, Any]] = []
    with _opened(path) as file:
        first = 0
        for batch in file.iter_batches(_ROWS_AT_ONCE, use_threads=False):
            if first + batch.num_rows > start:
                rows += batch.slice(max(0, start - first)).to_pylist()
            first += batch.num_rows
            if len(rows) >= count:
                break
    return rows[:count]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a Parquet file mapped into memory; turn what Arrow raises inside into a DataError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with reading(path), pq.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{path} is not a whole Parquet file ({error}); it may be cut off or foreign") from error


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
        known = (field for field in kind if value.get(field.name) is not None)
        return {field.name: _without_fill(value[field.name], field.type) for field in known}
    if types.is_map(kind):
        return {key: _without_fill(item, kind.item_type) for key, item in value}
    inner = getattr(kind, "value_type", None)  # a union has none
    if inner is None or not types.is_nested(inner):
        return value
    return [_without_fill(item, inner) for item in value]
