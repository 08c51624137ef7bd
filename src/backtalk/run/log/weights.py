"""Write the token weights of a training step as Parquet, one row for each trajectory, and read them back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backtalk.errors import DataError
from backtalk.parquet import read_row, read_table, write_table
from backtalk.trajectory import TokenWeights, TrajectoryGroup


def write_weights(path: Path, groups: Sequence[TrajectoryGroup], weights: Sequence[TokenWeights]) -> None:
    """Write the weights of a step's trajectories, given in the order of groups and rows, as float32.

    Raises:
        DataError: the file cannot be written.
        ValueError: they are not the weights of these trajectories.
    """
    import pyarrow as pa

    _check_fit(groups, weights, "the weights given")
    named = zip([trajectory for group in groups for trajectory in group], weights, strict=True)
    rows = [
        (trajectory.task_id, trajectory.sample_index, row.advantage, row.policy, row.world) for trajectory, row in named
    ]
    columns = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), _schema(), strict=True)]
    # Most neighbours are equal, so Parquet's dictionary and run lengths leave a few bytes a segment.
    write_table(path, pa.table(columns, schema=_schema()))


def read_weights(path: Path, groups: Sequence[TrajectoryGroup]) -> list[list[TokenWeights]]:
    """Read the weights of a step's trajectories: a list for each group.

    Raises:
        DataError: the file cannot be read, or belongs to other trajectories.
    """
    try:
        rows = read_table(path).to_pylist()
        weights = [TokenWeights(row["advantage"], tuple(row["policy"]), tuple(row["world"])) for row in rows]
        _check_fit(groups, weights, str(path))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} does not hold the weights of this step ({error}); remove it to go without") from error
    left = iter(weights)
    return [[next(left) for _ in group] for group in groups]


def read_weights_row(path: Path, index: int, length: int) -> TokenWeights:
    """Read the weights of one trajectory of ``length`` tokens, without holding those of the others.

    Raises:
        DataError: the file cannot be read, or belongs to other trajectories.
    """
    row = read_row(path, index)
    try:
        weights = TokenWeights(row["advantage"], tuple(row["policy"]), tuple(row["world"]))
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} does not hold token weights ({error}); remove it to go without") from error
    if not len(weights.policy) == len(weights.world) == length:
        raise DataError(
            f"{path} has weights of {len(weights.policy)} tokens in row {index}, and the trajectory has {length}; it "
            "belongs to another step, so remove it to go without"
        )
    return weights


def _check_fit(groups: Sequence[TrajectoryGroup], weights: Sequence[TokenWeights], source: str) -> None:
    expected = [len(trajectory) for group in groups for trajectory in group]
    if not expected == [len(row.policy) for row in weights] == [len(row.world) for row in weights]:
        found = sum(len(row.policy) for row in weights)
        raise ValueError(
            f"{source} are for {len(weights)} trajectories of {found} tokens, and the step has {len(expected)} of "
            f"{sum(expected)}"
        )


def _schema() -> Any:
    import pyarrow as pa

    columns = {"task_id": pa.string(), "sample_index": pa.int32(), "advantage": pa.float64()}
    return pa.schema(columns | dict.fromkeys(("policy", "world"), pa.list_(pa.float32())))
