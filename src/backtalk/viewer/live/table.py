"""Keep one row of facts for each rollout: read column by column, a file at a time, and held as Arrow tables."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from threading import Lock
from typing import Any

from backtalk.errors import DataError
from backtalk.parquet import read_columns
from backtalk.run.log.scores import read_scored
from backtalk.trajectory import TokenRole
from backtalk.viewer.live.sources import Part, Source, Stamp, parts_of

MESSAGE_CHARS = 300  # of a failure
BUDGET_S = 0.4  # of one request; the files left are read by the next ones
STATS = {  # column: name in a trajectory's stats
    "invalid": "invalid_calls",
    "timeouts": "command_timeouts",
    "truncated": "truncated_observations",
    "confused": "role_confusions",
}
TEXT = ("run", "part", "kind", "task", "stop", "failure")
COUNTS = ("step", "row", "group", "sample", "version", "turns", "tokens", "action", "env", "warning", "branches")
NUMBERS = (*COUNTS, "reward", "advantage", "surprise", *STATS)
_COLUMNS = ("task_id", "sample_index", "policy_version", "reward", "stop_reason", "failure", "segments", "stats")


class RolloutTable:
    """Rows of all rollouts, kept by file until it changes."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], tuple[Stamp, Any]] = {}
        self._lock = Lock()

    def read(self, sources: Iterable[Source], budget_s: float = BUDGET_S) -> tuple[Any, int, list[str]]:
        """Return the rows as a ``pyarrow.Table``, the number of files not read yet, and what could not be read.

        Files are read for ``budget_s`` seconds, the newest first; one at least, so that asking again ends.
        """
        import pyarrow as pa

        deadline, pending, problems, tables, has_read = time.monotonic() + budget_s, 0, [], [], False
        with self._lock:
            for source, part in sorted(parts_of(sources, problems), key=lambda found: -(found[1].step or 0)):
                stamp, facts = self._kept(source, part)
                if facts is None:
                    if has_read and time.monotonic() > deadline:
                        pending += 1
                        continue
                    has_read = True
                    try:
                        facts = self._read_anew(source, part, stamp)
                    except DataError as error:  # removed by a resume, or foreign
                        problems.append(str(error))
                        continue
                tables.append(facts)
        return pa.concat_tables(tables) if tables else empty(), pending, problems

    def of_part(self, source: Source, part: Part) -> Any:
        """Return the rows of one file.

        Raises:
            DataError: it cannot be read.
        """
        with self._lock:
            stamp, facts = self._kept(source, part)
            return self._read_anew(source, part, stamp) if facts is None else facts

    def _kept(self, source: Source, part: Part) -> tuple[Stamp, Any | None]:
        """Return how a file is now, and its rows, None if they were not read or are older."""
        stamp, known = part.stamp, self._known.get((source.name, part.key))
        return stamp, known[1] if known is not None and known[0] == stamp else None

    def _read_anew(self, source: Source, part: Part, stamp: Stamp) -> Any:
        facts = read_facts(source.name, part)
        self._known[source.name, part.key] = stamp, facts
        return facts


def read_facts(run: str, part: Part) -> Any:
    """Return the rows of one file.

    Raises:
        DataError: it cannot be read, or holds something other than trajectories.
    """
    import numpy as np
    import pyarrow as pa

    table = read_columns(part.path, _COLUMNS).combine_chunks()
    n = table.num_rows
    tasks, samples = table["task_id"].to_pylist(), table["sample_index"].to_pylist()
    columns: dict[str, Any] = {
        "run": [run] * n,
        "part": [part.key] * n,
        "kind": [part.kind] * n,
        "task": tasks,
        "stop": table["stop_reason"],
        "failure": [text and _short_failure(text) for text in table["failure"].to_pylist()],
        "step": [part.step] * n,
        "row": np.arange(n),
        "group": _group_numbers(tasks, samples),
        "sample": samples,
        "version": table["policy_version"],
        "reward": table["reward"],
        "advantage": _advantages(part, n),
        "surprise": _surprise(part, n),
        **_token_counts(table["segments"]),
        **{name: _stat(table["stats"], stat) for name, stat in STATS.items()},
    }
    return pa.table([_as(columns[field.name], field.type) for field in _schema()], schema=_schema())


def _short_failure(text: str) -> str:
    """Return a failure as JSON without its traceback, and with the beginning of its message."""
    failure = {**json.loads(text), "traceback": ""}
    return json.dumps({name: value[:MESSAGE_CHARS] for name, value in failure.items() if value})


def compute() -> Any:
    """Return Arrow's functions over columns, which have no types that a checker could see."""
    import pyarrow.compute

    return pyarrow.compute


def empty() -> Any:
    """Return a table of no rows."""
    return _schema().empty_table()


def _schema() -> Any:
    import pyarrow as pa

    kinds = dict.fromkeys(TEXT, pa.string()) | dict.fromkeys(NUMBERS, pa.float64()) | dict.fromkeys(COUNTS, pa.int64())
    return pa.schema(kinds)


def _as(column: Any, kind: Any) -> Any:
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        return column.cast(kind)
    return pa.array(column, kind, from_pandas=True)  # NaN is nothing known


def _advantages(part: Part, n: int) -> Any:
    """Return the advantages as they were trained; None for each row where no step has."""
    if part.weights is None or not part.weights.is_file():
        return [None] * n
    found = read_columns(part.weights, ["advantage"])["advantage"].to_pylist()
    return found if len(found) == n else [None] * n


def _surprise(part: Part, n: int) -> Any:
    """Return the cross-entropy on environment output at the checkpoint that scored last; None where none has."""
    if part.scores is None or not part.scores.is_file():
        return [None] * n
    found = read_scored(part.scores)[1]
    return found if len(found) == n else [None] * n


def _group_numbers(tasks: Sequence[str], samples: Sequence[int]) -> list[int]:
    """Return the number of each row's group, as ``group_trajectories`` counts them."""
    numbers: list[int] = []
    for i, (task, sample) in enumerate(zip(tasks, samples, strict=True)):
        begins = i == 0 or task != tasks[i - 1] or sample <= samples[i - 1]
        numbers.append((numbers[-1] if numbers else -1) + begins)
    return numbers


def _token_counts(segments: Any) -> dict[str, Any]:
    """Return turns, branches, and the number of tokens of all roles and of each, from a column of segments."""
    import numpy as np

    segments = segments.combine_chunks()
    starts, values = segments.offsets.to_numpy(), segments.values
    lengths = values.field("length").to_numpy(zero_copy_only=False)
    roles = np.array(values.field("role").to_pylist(), dtype=object)
    turns = values.field("turn").fill_null(-1).to_numpy(zero_copy_only=False)
    branches = values.field("branch").fill_null(0).to_numpy(zero_copy_only=False)

    def total(of: Any) -> Any:
        sums = np.concatenate([[0], np.cumsum(of)])
        return sums[starts[1:]] - sums[starts[:-1]]

    def most(of: Any) -> list[int]:
        return [int(of[a:b].max(initial=-1)) + 1 for a, b in pairwise(starts)]

    actions = np.where(roles == TokenRole.ACTION.name, turns, -1)
    counts = {"turns": most(actions), "branches": most(branches), "tokens": total(lengths)}
    names = {"action": TokenRole.ACTION, "env": TokenRole.ENV_OUTPUT, "warning": TokenRole.WARNING}
    return counts | {column: total(np.where(roles == role.name, lengths, 0)) for column, role in names.items()}


def _stat(stats: Any, name: str) -> Any:
    """Return one entry of a column of maps; NaN where a row lacks it."""
    import numpy as np

    stats = stats.combine_chunks()
    found = np.full(len(stats), np.nan)
    keys = np.array(stats.keys.to_pylist(), dtype=object)
    positions = np.flatnonzero(keys == name)
    rows = np.searchsorted(stats.offsets.to_numpy(), positions, side="right") - 1
    found[rows] = stats.items.to_numpy(zero_copy_only=False)[positions]
    return found
