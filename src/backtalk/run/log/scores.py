"""Write what checkpoints make of each token as Parquet, all rollouts of one checkpoint after another, and read it back.

Beside the log-probabilities a row has its mean cross-entropy on environment output, so that a table of all rollouts
reads no tokens. Where a token was not the likeliest, the likeliest ones are there too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backtalk.errors import DataError
from backtalk.parquet import read_columns, read_row, read_table, write_table
from backtalk.trajectory import TokenRole, TokenScores, Trajectory

SUFFIX = ".scores.parquet"  # of the scores of a file that is in no run
_TOKENS_OF = b"backtalk_tokens_of"


def scores_beside(path: Path) -> Path:
    """Return the path of the scores of a file of trajectories."""
    return path.with_name(path.name + SUFFIX)


def add_scores(
    path: Path, checkpoint: str, tokens_of: str, trajectories: Sequence[Trajectory], scores: Sequence[TokenScores]
) -> None:
    """Write a checkpoint's scores; those of others stay, as long as they are of the same trajectories and tokenizer.

    ``tokens_of`` names the model whose tokens the trajectories are in.

    Raises:
        DataError: the file cannot be written.
        ValueError: they are not the scores of these trajectories.
    """
    import pyarrow as pa

    lengths = [len(trajectory) for trajectory in trajectories]
    if lengths != [len(row.logprobs) for row in scores]:
        raise ValueError(
            f"{len(scores)} rows of scores do not fit {len(lengths)} trajectories of {sum(lengths)} tokens"
        )
    rows = [_row(checkpoint, *pair) for pair in zip(trajectories, scores, strict=True)]
    table = pa.Table.from_pylist(rows, schema=_schema(tokens_of))
    others = _others(path, checkpoint, lengths, table.schema)
    write_table(path, table if others is None else pa.concat_tables([others, table]))


def read_scored(path: Path) -> tuple[list[str], list[float | None]]:
    """Return the names of the checkpoints, and the last one's cross-entropy on each rollout's environment output.

    Raises:
        DataError: the file cannot be read.
    """
    table = read_columns(path, ["checkpoint", "env_ce"])
    names = table["checkpoint"].to_pylist()
    found = [ce for name, ce in zip(names, table["env_ce"].to_pylist(), strict=True) if name == names[-1]]
    return list(dict.fromkeys(names)), found


def read_scores_row(path: Path, index: int, length: int) -> dict[str, TokenScores]:
    """Return the scores of one rollout of ``length`` tokens by checkpoint, without holding those of the others.

    Raises:
        DataError: the file cannot be read, or is of other trajectories.
    """
    names, found = read_scored(path)
    scores: dict[str, TokenScores] = {}
    for number, name in enumerate(names):
        row = read_row(path, number * len(found) + index)
        if len(row["logprobs"]) != length:
            raise DataError(
                f"{path} has scores of {len(row['logprobs'])} tokens in row {index}, and the rollout has {length}; "
                "score it again"
            )
        scores[name] = scores_from_row(row)
    return scores


def scores_from_row(row: Mapping[str, Any]) -> TokenScores:
    """Return the scores in one row of such a file, as Arrow reads it."""
    width = len(row["expected_ids"]) // max(1, len(row["expected_at"]))
    pairs = list(zip(row["expected_ids"], row["expected_logprobs"], strict=True))
    expected = {at: tuple(pairs[i * width : (i + 1) * width]) for i, at in enumerate(row["expected_at"])}
    return TokenScores(tuple(row["logprobs"]), expected)


def tokens_scored(path: Path) -> str | None:
    """Return the model whose tokens were scored; None where there are no scores."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = (pq.read_schema(path).metadata or {}).get(_TOKENS_OF)
    except (OSError, pa.ArrowException):
        return None
    return found and found.decode()


def _row(checkpoint: str, trajectory: Trajectory, scores: TokenScores) -> dict[str, Any]:
    tokens = [token for tokens in scores.expected.values() for token in tokens]
    return {
        "checkpoint": checkpoint,
        "task_id": trajectory.task_id,
        "sample_index": trajectory.sample_index,
        "env_ce": scores.mean_nats(trajectory, TokenRole.ENV_OUTPUT),
        "logprobs": scores.logprobs,
        "expected_at": list(scores.expected),
        "expected_ids": [token for token, _ in tokens],
        "expected_logprobs": [logprob for _, logprob in tokens],
    }


def _others(path: Path, checkpoint: str, lengths: Sequence[int], schema: Any) -> Any:
    """Return the rows of the other checkpoints; None where there are none that fit."""
    if not path.exists():
        return None
    table = read_table(path)
    if table.schema != schema or table.schema.metadata != schema.metadata:
        return None
    names = table["checkpoint"].to_pylist()
    kept = [i for i, name in enumerate(names) if name != checkpoint]
    if [len(row) for row in table["logprobs"].to_pylist()] != [*lengths] * len(set(names)):
        return None
    return table.take(kept)


def _schema(tokens_of: str) -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            ("checkpoint", pa.string()),
            ("task_id", pa.string()),
            ("sample_index", pa.int32()),
            ("env_ce", pa.float64()),
            ("logprobs", pa.list_(pa.float32())),
            ("expected_at", pa.list_(pa.int32())),
            ("expected_ids", pa.list_(pa.int32())),
            ("expected_logprobs", pa.list_(pa.float32())),
        ],
        metadata={_TOKENS_OF: tokens_of.encode()},
    )
