"""Files of episodes, whoever wrote them: what format a record has, and every record as a trajectory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from backtalk.errors import BacktalkError, DataError
from backtalk.exchange.detect import guess_format
from backtalk.exchange.read import Format, Imported, ImportOptions, Refusal, import_record, rows_of
from backtalk.exchange.read.files import RendererOf, read_records
from backtalk.run.log import read_trajectories, trajectory_from_dict
from backtalk.trajectory import Trajectory

# A record, its format, where it stands; a trajectory of ours as it is, with None for the format.
ReadRecord = Callable[[Any, Format | None, str], Trajectory]

OPTIONS = ImportOptions(on_drift="fork")


def rendered(renderer_of: RendererOf) -> ReadRecord:
    """Messages in a model's chat template, token ids as they are."""

    def read(record: Any, source: Format | None, where: str) -> Trajectory:
        return record if source is None else import_record(record, source, renderer_of, OPTIONS, name=where)

    return read


def read_episodes(paths: Sequence[Path], read: ReadRecord, source: Format | None = None) -> Imported:
    """Every episode of some files: our own trajectories, or records of a format that `backtalk import` reads.

    ``source`` None finds the format out, record by record. A record that cannot be read costs itself.

    Raises:
        DataError: a file cannot be read at all.
    """
    found: list[Trajectory] = []
    refusals: list[Refusal] = []
    attempts: dict[str, int] = {}
    for path in paths:
        for where, record in _records(path):
            try:
                for one in _episodes(record, source, where, read):
                    index = attempts.get(one.task_id, 0)
                    attempts[one.task_id] = index + 1
                    found.append(one if isinstance(record, Trajectory) else replace(one, sample_index=index))
            except (BacktalkError, ValueError) as error:
                refusals.append(Refusal(where, str(error)))
            except (TypeError, KeyError, IndexError, AttributeError) as error:
                refusals.append(Refusal(where, f"this record has another shape ({type(error).__name__}: {error})"))
    return Imported(tuple(found), tuple(refusals))


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Records with where they stand; a file of our own trajectories as those."""
    records = read_records(path)
    for where, record in records:
        if not _is_ours(record):
            yield where, record
        elif path.suffix == ".parquet":  # where some columns are JSON, which its own reader knows
            yield from ((f"{path}[{i}]", one) for i, one in enumerate(read_trajectories(path)))
            return
        else:
            yield where, trajectory_from_dict(record)


def _is_ours(record: Any) -> bool:
    return isinstance(record, Mapping) and {"segments", "token_ids", "policy_version", "stop_reason"} <= set(record)


def _episodes(record: Any, source: Format | None, where: str, read: ReadRecord) -> Iterator[Trajectory]:
    if isinstance(record, DataError):
        raise record
    if isinstance(record, Trajectory):
        yield read(record, None, where)
        return
    chosen = source or guess_format(record)
    for one in rows_of(record) if chosen == "trl" else [record]:
        yield read(one, chosen, where)
