"""Read files, record by record: .json, .jsonl, .traj (each also as .gz), .parquet, .eval, and folders of Harbor."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from backtalk.errors import DataError
from backtalk.exchange.detect import is_event
from backtalk.exchange.logged import ITEMS, is_session, session_messages
from backtalk.exchange.read.harbor import read_trials
from backtalk.exchange.read.inspect_ai import read_eval
from backtalk.files import reading
from backtalk.parquet import parquet_rows

_SPEAKERS = ("human", "ai", "system", "tool")  # as LangChain names them


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each record of a file or folder after its place; a DataError instead of one that cannot be read.

    Raises:
        DataError: the file cannot be read, its name ends in no known way, or the folder holds no trial.
    """
    name = path.name.removesuffix(".gz")
    if path.is_dir():
        yield from read_trials(path)
        return
    if name.endswith(".eval"):
        yield from read_eval(path)
        return
    if name.endswith(".parquet"):
        yield from ((f"{path}[{number}]", row) for number, row in enumerate(parquet_rows(path)))
        return
    if not name.endswith((".jsonl", ".json", ".traj")):
        raise DataError(
            f"{path} is neither .json, .jsonl, .traj, .parquet, .eval nor one of them with .gz; rename or convert it"
        )
    with reading(path):
        content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError) as error:
            raise DataError(f"{path} is not a whole gzip file ({error}); copy it again") from error
    if not name.endswith(".jsonl"):
        yield from _json_records(path, content)
        return
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    records = ((f"{path}:{number}", _json(line)) for number, line in lines)
    first = next(records, None)
    if first is not None and is_event(first[1]):  # a line an event: the file is one rollout
        yield from _whole(path, [first, *records], lambda events: events)
    elif first is not None and is_session(first[1]):
        yield from _whole(path, [first, *records], lambda lines: {"messages": session_messages(lines)})
    elif first is not None:
        yield first
        yield from records


def _whole(path: Path, records: list[tuple[str, Any]], join: Callable[[list[Any]], Any]) -> Iterator[tuple[str, Any]]:
    """Yield the lines of a file as one record, or the errors of lines that cannot be read."""
    broken = [(place, line) for place, line in records if isinstance(line, DataError)]
    yield from broken or [(str(path), join([line for _, line in records]))]


def _json_records(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    """Yield the record or the list of records of a file; a list of messages is one record."""
    data = _json(content)
    if isinstance(data, dict) and "trial_name" in data and "trajectory" not in data:  # a trial's result.json
        yield from read_trials(path.parent)
        return
    if not isinstance(data, list) or not all(isinstance(x, (dict, list)) and not _is_part(x) for x in data):
        yield str(path), data
        return
    for number, record in enumerate(data):
        yield f"{path}[{number}]", record


def _is_part(value: Any) -> bool:
    """Return whether a value is a message or an event, so that the list of them is one record."""
    if not isinstance(value, dict):
        return False
    is_said = "role" in value or {"from", "value"} <= set(value) or value.get("type") in ITEMS
    return is_said or is_event(value) or (value.get("type") in _SPEAKERS and "content" in value) or "lc" in value


def _json(content: bytes) -> Any:
    """Return the value, or the error to refuse it with."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        return DataError(f"it is not JSON ({error})")
