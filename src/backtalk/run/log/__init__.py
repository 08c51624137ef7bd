"""Write what a run leaves on disk (trajectories, metrics, evaluations), and read it back.

A run folder holds::

    config.yaml                     the resolved settings
    metrics.jsonl                   one line for each training step
    groups/step_00012.parquet       the trajectories that step 12 was trained on, one row each
    weights/step_00012.parquet      the weight of each of their tokens in the loss, and their advantages
    scores/step_00012.parquet       log-probabilities of their tokens under some checkpoints, where `score` was asked
    evaluation_step_00012.json      evaluation of the policy before step 12, and its trajectories as .parquet
    checkpoint/  tokenizer/         written by the engine and by ``train``
    .lock                           held by the process that writes

Nothing that is written gets lost: whole files appear by rename, lines are appended and synced, and a line cut off by a
kill or a full disk is dropped by the next reader and writer.
"""

from backtalk.run.log.folder import RunLog
from backtalk.run.log.lock import lock_file, lock_folder
from backtalk.run.log.trajectories import (
    append_trajectory,
    group_trajectories,
    read_trajectories,
    read_trajectory,
    trajectory_from_dict,
    trajectory_from_row,
    trajectory_to_dict,
    write_trajectories,
)

__all__ = [
    "RunLog",
    "append_trajectory",
    "group_trajectories",
    "lock_file",
    "lock_folder",
    "read_trajectories",
    "read_trajectory",
    "trajectory_from_dict",
    "trajectory_from_row",
    "trajectory_to_dict",
    "write_trajectories",
]
