"""Parquet is read without Arrow's threads, which can abort a process that ends soon after."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from backtalk.run.log import write_trajectories
from backtalk.trajectory import Segment, StopReason, TokenRole, Trajectory

SCRIPT = """
import sys
from pathlib import Path
from backtalk.run.log import read_trajectories
assert len(read_trajectories(Path(sys.argv[1]))) == 64
"""
THREADS = """
import os, sys
from pathlib import Path
import pyarrow.parquet
from backtalk.tasks.rows import read_row_file
from backtalk.errors import BacktalkError
from backtalk.exchange.read.files import read_records
from backtalk.run.log import RunLog, group_trajectories, read_trajectories, write_trajectories
from backtalk.trajectory import TokenWeights

path = Path(sys.argv[1])
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
write_trajectories(path.with_name("again.parquet"), read_trajectories(path))
assert len(list(read_records(path))) == 64
log, groups = RunLog(path.parent), group_trajectories(read_trajectories(path))
log.write_weights(0, groups, [TokenWeights(1.0, (0.5,) * 1440, (0.25,) * 1440)] * 64)
assert len(log.read_weights(0, groups)) == 8
try:
    read_row_file(path)
except BacktalkError:  # rows of another kind
    pass
print(threads() - before)
"""


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 64 trajectories of 1,440 tokens each."""
    ids = tuple(range(120))
    turns = [
        segment
        for turn in range(6)
        for segment in (
            Segment(TokenRole.ACTION, ids, tuple(-0.001 * i * (turn + 1) for i in ids), turn),
            Segment(TokenRole.ENV_OUTPUT, ids, None, turn),
        )
    ]
    rows = [
        Trajectory(
            task_id=f"task-{i // 8}",
            sample_index=i % 8,
            policy_version=0,
            reward=1.0,
            stop_reason=StopReason.SUBMITTED,
            failure=None,
            segments=tuple(turns),
            messages=({"role": "user", "content": "word " * 40},),
            stats={"num_turns": 6.0},
        )
        for i in range(64)
    ]
    path = tmp_path_factory.mktemp("groups") / "step_00000.parquet"
    write_trajectories(path, rows)
    return path


def run(script: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)


@pytest.mark.slow  # an abort at exit came in some of many
def test_a_script_that_reads_ends_well_every_time(groups: Path) -> None:
    ends = [run(SCRIPT, groups) for _ in range(24)]
    assert [(end.returncode, end.stderr) for end in ends] == [(0, "")] * 24


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_no_reader_starts_a_thread(groups: Path) -> None:
    done = run(THREADS, groups)
    assert (done.stdout, done.returncode) == ("0\n", 0), done.stderr
