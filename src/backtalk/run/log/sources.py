"""Read files of trajectories, ours and other libraries': detect each record's format, and read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from backtalk.exchange.detect import Format
from backtalk.exchange.read.files import Imported, RendererOf, Rollout, collect, import_record
from backtalk.exchange.read.observations import Observations
from backtalk.exchange.read.records import read_records
from backtalk.run.log import read_trajectories, trajectory_from_dict
from backtalk.trajectory import Trajectory

OPTIONS = Observations(on_drift="fork")
_OURS = {"segments", "token_ids", "policy_version", "stop_reason"}  # fields of our own records


def record_reader(renderer_of: RendererOf, options: Observations = OPTIONS) -> Callable[[Rollout], Trajectory]:
    """Return a reader of rollouts that renders messages by a model's chat template and keeps token ids."""
    return lambda rollout: import_record(rollout.record, rollout.source, renderer_of, options, name=rollout.file)


def read_rollouts(
    paths: Sequence[Path], read: Callable[[Rollout], Trajectory], source: Format | None = None
) -> Imported:
    """Read the rollouts of some files: our own trajectories, or records of a format that `backtalk import` reads.

    Without ``source`` the format of each record is detected. A record that cannot be read costs only itself.

    Raises:
        DataError: a file cannot be read at all.
    """
    return collect((pair for path in paths for pair in _records(path)), read, source)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each record after its place; those of a file of our own as trajectories."""
    for place, record in read_records(path):
        if not (isinstance(record, Mapping) and record.keys() >= _OURS):
            yield place, record
        elif path.suffix == ".parquet":  # where some columns are JSON, which its own reader knows
            yield from ((f"{path}[{i}]", trajectory) for i, trajectory in enumerate(read_trajectories(path)))
            return
        else:
            yield place, trajectory_from_dict(record)
