"""Read files of trajectories, ours and other libraries': detect each record's format, and read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from backtalk.exchange.detect import Format, guess_format
from backtalk.exchange.read.files import Imported, ImportOptions, RendererOf, collect, import_record, read_records
from backtalk.exchange.read.trl import rows_of
from backtalk.run.log import read_trajectories, trajectory_from_dict
from backtalk.trajectory import Trajectory

# A record, its format and its place; a trajectory of ours has no format and is returned as it is.
ReadRecord = Callable[[Any, Format | None, str], Trajectory]

OPTIONS = ImportOptions(on_drift="fork")


def record_reader(renderer_of: RendererOf) -> ReadRecord:
    """Return a reader of records that renders messages by a model's chat template and keeps token ids."""

    def read(record: Any, source: Format | None, place: str) -> Trajectory:
        return record if source is None else import_record(record, source, renderer_of, OPTIONS, name=place)

    return read


def read_rollouts(paths: Sequence[Path], read: ReadRecord, source: Format | None = None) -> Imported:
    """Read the rollouts of some files: our own trajectories, or records of a format that `backtalk import` reads.

    Without ``source`` the format of each record is detected. A record that cannot be read costs only itself.

    Raises:
        DataError: a file cannot be read at all.
    """

    def read_all(record: Any, place: str) -> Iterator[Trajectory]:
        chosen = None if isinstance(record, Trajectory) else source or guess_format(record)
        for row in rows_of(record) if chosen == "trl" else [record]:
            yield read(row, chosen, place)

    return collect((pair for path in paths for pair in _records(path)), read_all)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each record after its place; those of a file of our own as trajectories."""
    for place, record in read_records(path):
        if not _is_ours(record):
            yield place, record
        elif path.suffix == ".parquet":  # where some columns are JSON, which its own reader knows
            yield from ((f"{path}[{i}]", trajectory) for i, trajectory in enumerate(read_trajectories(path)))
            return
        else:
            yield place, trajectory_from_dict(record)


def _is_ours(record: Any) -> bool:
    return isinstance(record, Mapping) and {"segments", "token_ids", "policy_version", "stop_reason"} <= set(record)
