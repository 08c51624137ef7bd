"""Write trajectories as JSON lines or Parquet, one row each, and read them back without loss."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from backtalk.errors import DataError
from backtalk.files import append_json_line, read_json_lines, write_bytes
from backtalk.parquet import read_row, read_table, write_table
from backtalk.trajectory import Failure, Segment, StopReason, TokenRole, Trajectory, TrajectoryGroup

SCHEMA_VERSION = 3  # 1 had no branches, and 1 and 2 no unsampled actions
_VERSION_KEY = b"backtalk_trajectories"


def trajectory_to_dict(trajectory: Trajectory) -> dict[str, Any]:
    """Return JSON-ready data: columns of tokens, and segments as lengths over them.

    ``logprobs`` holds None for tokens that were not sampled.
    """
    return {
        "task_id": trajectory.task_id,
        "sample_index": trajectory.sample_index,
        "policy_version": trajectory.policy_version,
        "reward": trajectory.reward,
        "stop_reason": trajectory.stop_reason.value,
        "failure": trajectory.failure and asdict(trajectory.failure),
        "token_ids": list(trajectory.token_ids),
        "roles": [int(role) for role in trajectory.roles],
        "logprobs": list(trajectory.logprobs),
        "segments": [segment.to_dict() for segment in trajectory.segments],
        "messages": [dict(message) for message in trajectory.messages],
        "stats": {name: float(value) for name, value in trajectory.stats.items()},
    }


def trajectory_from_dict(data: Mapping[str, Any]) -> Trajectory:
    """Return the trajectory that :func:`trajectory_to_dict` made plain data of.

    Raises:
        DataError: a key is missing, or the columns do not fit together.
    """
    try:
        failure = data["failure"]
        if failure is not None:
            phase = failure["where" if "where" in failure else "phase"]  # "where" in records of versions 1 and 2
            failure = Failure(phase, failure["error"], failure["message"], failure.get("traceback", ""))
        return Trajectory(
            task_id=data["task_id"],
            sample_index=data["sample_index"],
            policy_version=data["policy_version"],
            reward=data["reward"],
            stop_reason=StopReason(data["stop_reason"]),
            failure=failure,
            segments=tuple(_segments(data)),
            messages=tuple(data["messages"]),
            stats=dict(data["stats"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"this record is not a trajectory ({type(error).__name__}: {error}); "
            "pass a file written by backtalk.run.log.write_trajectories"
        ) from error


def _segments(data: Mapping[str, Any]) -> Iterator[Segment]:
    token_ids, logprobs, start = data["token_ids"], data["logprobs"], 0
    total = sum(segment["length"] for segment in data["segments"])
    if not total == len(token_ids) == len(logprobs):
        raise ValueError(f"segments of {total} tokens over {len(token_ids)} ids and {len(logprobs)} logprobs")
    for segment in data["segments"]:
        end = start + segment["length"]
        role = TokenRole[segment["role"]]
        is_sampled = segment.get("sampled", role is TokenRole.ACTION)  # before version 3 every action was
        sampled = tuple(logprobs[start:end]) if is_sampled else None
        branch = segment.get("branch", 0)  # records of version 1 are of one history
        yield Segment(role, tuple(token_ids[start:end]), sampled, segment["turn"], segment["tool"], branch)
        start = end


def write_trajectories(path: str | Path, trajectories: Iterable[Trajectory]) -> None:
    """Write one row for each trajectory, as JSON lines or Parquet by the suffix; the file appears whole or not at all.

    Raises:
        DataError: another suffix, or the file cannot be written.
    """
    path = Path(path)
    rows = [trajectory_to_dict(trajectory) for trajectory in trajectories]
    match path.suffix:
        case ".jsonl":
            write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        case ".parquet":
            write_table(path, _to_table(rows))
        case suffix:
            raise DataError(
                f"cannot write trajectories to a {suffix!r} file ({path}); end the name in .jsonl or .parquet"
            )


def append_trajectory(path: str | Path, trajectory: Trajectory) -> None:
    """Append one trajectory to a file, which is made if it is not there and can be read after each.

    Parquet cannot be appended to, and is written anew.

    Raises:
        DataError: as :func:`write_trajectories`; what was in the file before is untouched.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        append_json_line(path, trajectory_to_dict(trajectory))
    else:
        write_trajectories(path, [*(read_trajectories(path) if path.exists() else ()), trajectory])


def read_trajectories(path: str | Path) -> list[Trajectory]:
    """Read what :func:`write_trajectories` wrote.

    Raises:
        DataError: no such file, another suffix, or content that is not trajectories.
    """
    path = Path(path)
    match path.suffix:
        case ".jsonl":
            rows = read_json_lines(path)
        case ".parquet":
            rows = _from_parquet(path)
        case suffix:
            raise DataError(f"{path} ends in {suffix!r}, no format for trajectories; pass a .jsonl or .parquet file")
    return [trajectory_from_dict(row) for row in rows]


def read_trajectory(path: Path, index: int) -> Trajectory:
    """Read one row of a Parquet file that :func:`write_trajectories` wrote, without holding the others.

    Raises:
        DataError: the file cannot be read, has no such row, or holds something other than trajectories.
    """
    try:
        return trajectory_from_row(read_row(path, index))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a Parquet file of trajectories ({error}); it may be foreign") from error


def trajectory_from_row(row: dict[str, Any]) -> Trajectory:
    """Return the trajectory in one row of such a file, as Arrow reads it."""
    return trajectory_from_dict(_plain_row(row))


def group_trajectories(trajectories: Sequence[Trajectory]) -> list[TrajectoryGroup]:
    """Return trajectories, in written order, as groups; another task or a restarted sample index begins a new one."""
    groups: list[list[Trajectory]] = []
    for trajectory in trajectories:
        last = groups[-1][-1] if groups else None
        if last and last.task_id == trajectory.task_id and last.sample_index < trajectory.sample_index:
            groups[-1].append(trajectory)
        else:
            groups.append([trajectory])
    return [TrajectoryGroup(rows[0].task_id, tuple(rows)) for rows in groups]


def _schema() -> Any:
    import pyarrow as pa

    numbers = [(name, pa.int32()) for name in ("length", "turn", "branch")]
    segment = pa.struct([("role", pa.string()), ("sampled", pa.bool_()), ("tool", pa.string()), *numbers])
    return pa.schema(
        [
            ("task_id", pa.string()),
            ("sample_index", pa.int32()),
            ("policy_version", pa.int64()),
            ("reward", pa.float64()),
            ("stop_reason", pa.string()),
            ("failure", pa.string()),  # JSON: an error text may hold what is not UTF-8
            ("token_ids", pa.list_(pa.int64())),
            ("roles", pa.list_(pa.int8())),  # TokenRole of each token, for readers other than this one
            ("logprobs", pa.list_(pa.float64())),
            ("segments", pa.list_(segment)),
            ("messages", pa.string()),  # JSON
            ("stats", pa.map_(pa.string(), pa.float64())),
        ],
        metadata={_VERSION_KEY: str(SCHEMA_VERSION)},
    )


def _to_table(rows: list[dict[str, Any]]) -> Any:
    import pyarrow as pa

    flat = [
        {
            **row,
            "failure": row["failure"] and json.dumps(row["failure"]),
            "messages": json.dumps(row["messages"]),
            "stats": list(row["stats"].items()),
        }
        for row in rows
    ]
    return pa.Table.from_pylist(flat, schema=_schema())


def _from_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa

    table = read_table(path)
    try:
        missing = set(_schema().names) - set(table.schema.names)
        if missing:
            raise DataError(f"{path} lacks the columns {sorted(missing)}; it holds something other than trajectories")
        version = (table.schema.metadata or {}).get(_VERSION_KEY, b"1").decode("ascii", "replace")
        if version not in map(str, range(1, SCHEMA_VERSION + 1)):
            raise DataError(
                f"{path} is of version {version!r} of the trajectory format, and this backtalk reads 1 to "
                f"{SCHEMA_VERSION}; read it with the backtalk that wrote it, or a later one"
            )
        return [_plain_row(row) for row in table.to_pylist()]
    except (pa.ArrowException, json.JSONDecodeError, TypeError) as error:
        raise DataError(
            f"{path} is not a Parquet file of trajectories ({error}); it may be cut off or foreign"
        ) from error


def _plain_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of Parquet as plain data, its columns of JSON read."""
    failure = row["failure"] and json.loads(row["failure"])
    return {**row, "failure": failure, "messages": json.loads(row["messages"]), "stats": dict(row["stats"])}
