"""A run folder loses nothing: round trips, kills in the middle of a write, full disks."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import resources
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backtalk.errors import DataError
from backtalk.files import append_json_line, read_json_lines, write_bytes
from backtalk.run.log import RunLog, group_trajectories, read_trajectories, trajectory_to_dict, write_trajectories
from backtalk.run.log.trajectories import trajectory_from_dict
from backtalk.tasks.task import Split
from backtalk.tasks.triage import triage_task
from backtalk.trajectory import Failure, Segment, StopReason, TokenRole, TokenWeights, Trajectory, TrajectoryGroup

FINITE = st.floats(allow_nan=False, allow_infinity=False)
TOKENS = st.lists(st.integers(0, 2**31), max_size=6).map(tuple)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | FINITE | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    role = draw(st.sampled_from(TokenRole))
    token_ids = draw(TOKENS)
    tool = draw(st.none() | st.text())
    if role is TokenRole.ACTION:
        logprobs = draw(st.none() | st.lists(FINITE, min_size=len(token_ids), max_size=len(token_ids)).map(tuple))
        return Segment(role, token_ids, logprobs, draw(st.integers(0, 99)), tool)
    return Segment(role, token_ids, None, draw(st.none() | st.integers(0, 99)), tool)


@st.composite
def branched(draw: st.DrawFn) -> tuple[Segment, ...]:
    """Segments whose branches count up from 0."""
    drawn = draw(st.lists(st.tuples(segments(), st.booleans()), max_size=5))
    begins = [new and number > 0 for number, (_, new) in enumerate(drawn)]
    return tuple(replace(s, branch=n) for (s, _), n in zip(drawn, accumulate(map(int, begins)), strict=True))


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    stop = draw(st.sampled_from(StopReason))
    failed = stop is StopReason.FAILED
    any_text = st.text(alphabet=st.characters())  # with surrogates: error texts hold undecodable bytes
    return Trajectory(
        task_id=draw(st.text()),
        sample_index=draw(st.integers(0, 1000)),
        segments=draw(branched()),
        messages=tuple(draw(st.lists(st.dictionaries(st.text(), JSON_VALUES, max_size=3), max_size=3))),
        reward=None if failed else draw(st.none() | FINITE),
        stop_reason=stop,
        policy_version=draw(st.integers(0, 2**40)),
        failure=Failure(draw(st.text()), draw(st.text()), draw(any_text)) if failed else None,
        stats=draw(st.dictionaries(st.text(), FINITE, max_size=3)),
    )


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(trajectories(), max_size=4))
def test_trajectories_survive_a_round_trip_unchanged(tmp_path: Path, suffix: str, rows: list[Trajectory]) -> None:
    path = tmp_path / f"rows.{suffix}"
    write_trajectories(path, rows)
    assert read_trajectories(path) == rows


def one(task_id: str = "a", sample_index: int = 0, **more: object) -> Trajectory:
    parts = (
        Segment(TokenRole.CONTEXT, (1, 2, 3)),
        Segment(TokenRole.ACTION, (4, 5), (-0.1, -1.5), 0),
        Segment(TokenRole.ENV_OUTPUT, (6,), None, 0, "bash"),
    )
    return Trajectory(task_id=task_id, sample_index=sample_index, segments=parts, reward=1.0, **more)  # type: ignore[arg-type]


def test_parquet_has_one_row_a_trajectory_with_roles_and_logprobs_beside_the_tokens(tmp_path: Path) -> None:
    write_trajectories(tmp_path / "rows.parquet", [one(), one(sample_index=1)])
    row, other = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert other["sample_index"] == 1
    assert row["token_ids"] == [1, 2, 3, 4, 5, 6]
    assert row["roles"] == [0, 0, 0, 2, 2, 3]
    assert row["logprobs"] == [None, None, None, -0.1, -1.5, None]
    said = {"role": "ENV_OUTPUT", "length": 1, "sampled": False, "turn": 0, "tool": "bash", "branch": 0}
    assert row["segments"][2] == said


def test_branches_are_kept_and_files_of_version_1_are_of_one(tmp_path: Path) -> None:
    first = one()
    rewritten = (
        Segment(TokenRole.CONTEXT, (1, 2, 3, 7), branch=1),
        Segment(TokenRole.ENV_OUTPUT, (6,), None, 0, None, 1),
    )
    whole = replace(first, segments=(*first.segments[:2], *rewritten))
    for suffix in ("jsonl", "parquet"):
        write_trajectories(tmp_path / f"rows.{suffix}", [whole])
        (read,) = read_trajectories(tmp_path / f"rows.{suffix}")
        assert [[len(s) for s in branch] for branch in read.branches] == [[3, 2], [4, 1]]
    write_trajectories(tmp_path / "rows.parquet", [first, one(sample_index=1)])
    table = pq.read_table(tmp_path / "rows.parquet")
    rows = table.to_pylist()
    for row in rows:
        row["segments"] = [{k: v for k, v in s.items() if k not in ("branch", "sampled")} for s in row["segments"]]
    metadata = {**table.schema.metadata, b"backtalk_trajectories": b"1"}
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(metadata), tmp_path / "version_1.parquet")
    assert read_trajectories(tmp_path / "version_1.parquet") == [first, one(sample_index=1)]


def test_the_recorded_trajectories_of_the_package_are_explorers_at_held_out_tasks() -> None:
    with resources.as_file(resources.files("backtalk").joinpath("assets", "recorded", "held_out.parquet")) as path:
        recorded = read_trajectories(path)
    assert len({t.task_id for t in recorded}) == len(recorded) == 200
    for trajectory in recorded:
        assert len(trajectory.branches) == 1
        assert all(s.logprobs is None for s in trajectory.segments)  # a script sampled nothing
        level, seed = trajectory.task_id.removeprefix("triage-").split("-")
        assert triage_task(int(seed), int(level)).split is Split.HELD_OUT


def test_before_version_3_every_action_was_sampled(tmp_path: Path) -> None:
    lines = [trajectory_to_dict(one()), trajectory_to_dict(one(sample_index=1))]
    for line in lines:
        for part in line["segments"]:
            del part["sampled"]
    (tmp_path / "old.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert read_trajectories(tmp_path / "old.jsonl") == [one()]
    lines[1]["logprobs"] = [None] * 6
    (tmp_path / "lost.jsonl").write_text(json.dumps(lines[1]) + "\n")
    with pytest.raises(DataError, match="not a trajectory"):
        read_trajectories(tmp_path / "lost.jsonl")


def test_a_failure_has_a_phase_under_its_name_before_version_3_too() -> None:
    failure = Failure("step", "SandboxError", "gone")
    data = trajectory_to_dict(
        Trajectory(task_id="t", sample_index=0, segments=(), failure=failure, stop_reason=StopReason.FAILED)
    )
    assert data["failure"] == {"phase": "step", "error": "SandboxError", "message": "gone", "traceback": ""}
    old = {**data, "failure": {"where": "step", "error": "SandboxError", "message": "gone"}}
    assert trajectory_from_dict(data).failure == trajectory_from_dict(old).failure == failure


def test_a_file_of_a_later_version_is_refused(tmp_path: Path) -> None:
    write_trajectories(tmp_path / "rows.parquet", [one()])
    table = pq.read_table(tmp_path / "rows.parquet")
    assert table.schema.metadata[b"backtalk_trajectories"] == b"3"
    later = table.replace_schema_metadata({b"backtalk_trajectories": b"4"})
    pq.write_table(later, tmp_path / "later.parquet")
    with pytest.raises(DataError, match="version '4' of the trajectory format, and this backtalk reads 1 to 3"):
        read_trajectories(tmp_path / "later.parquet")


def test_rows_go_back_into_groups_even_when_a_task_comes_twice(tmp_path: Path) -> None:
    rows = [one("a", 0), one("a", 1), one("a", 0), one("b", 0)]
    assert [(g.task_id, len(g)) for g in group_trajectories(rows)] == [("a", 2), ("a", 1), ("b", 1)]
    log = RunLog(tmp_path)
    groups = [TrajectoryGroup("a", tuple(rows[:2])), TrajectoryGroup("b", (rows[3],))]
    log.write_groups(12, groups)
    assert (tmp_path / "groups" / "step_00012.parquet").is_file()
    assert log.read_groups(12) == groups


@pytest.mark.parametrize("name", ["rows.csv", "rows"])
def test_another_suffix_is_refused_with_what_to_type(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"\.jsonl or \.parquet"):
        write_trajectories(tmp_path / name, [one()])
    with pytest.raises(DataError, match=r"\.jsonl or \.parquet"):
        read_trajectories(tmp_path / name)


def test_what_is_no_trajectory_file_is_told_apart_from_an_empty_one(tmp_path: Path) -> None:
    import pyarrow as pa

    with pytest.raises(DataError, match="No such file"):
        read_trajectories(tmp_path / "absent.parquet")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(DataError, match="cut off or foreign"):
        read_trajectories(tmp_path / "cut.parquet")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="lacks the columns"):
        read_trajectories(tmp_path / "other.parquet")
    (tmp_path / "odd.jsonl").write_text('{"task_id": "a"}\n')
    with pytest.raises(DataError, match="not a trajectory"):
        read_trajectories(tmp_path / "odd.jsonl")


def test_columns_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_trajectories(path, [one()])
    row = json.loads(path.read_text())
    row["token_ids"] = row["token_ids"][:-1]
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="segments of 6 tokens over 5 ids"):
        read_trajectories(path)


# ---------------------------------------------------------------- kills and full disks


def test_a_torn_last_line_is_left_out_and_the_next_write_replaces_it(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write_metrics(0, {"reward": 0.5})
    with open(log.metrics_path, "a") as file:
        file.write('{"step": 1, "rew')
    assert log.read_metrics() == [{"step": 0, "reward": 0.5}]
    log.write_metrics(1, {"reward": 0.75, "entropy": math.nan})
    assert log.read_metrics() == [{"step": 0, "reward": 0.5}, {"step": 1, "reward": 0.75, "entropy": None}]


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 2 is not JSON"):
        read_json_lines(path)


def test_a_kill_at_any_time_leaves_whole_files(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from backtalk.files import write_bytes, append_json_line\n"
        "folder = Path(sys.argv[1])\n"
        "for i in range(10**9):\n"
        "    write_bytes(folder / 'whole', bytes([i % 256]) * 200_000)\n"
        "    append_json_line(folder / 'lines.jsonl', {'i': i})\n"
    )
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment())
        deadline = time.monotonic() + 20
        while not (tmp_path / "lines.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        content = (tmp_path / "whole").read_bytes()
        assert len(content) == 200_000 and len(set(content)) == 1
        numbers = [row["i"] for row in read_json_lines(tmp_path / "lines.jsonl")]
        assert numbers == list(range(len(numbers)))
        for path in tmp_path.glob("lines.jsonl"):
            path.unlink()


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this machine")
def test_a_line_that_cannot_be_written_says_that_the_disk_is_full(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"the disk is full.*--resume"):
        append_json_line(tmp_path / "metrics.jsonl", {"step": 0})


def test_a_full_disk_leaves_earlier_files_whole(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        log = RunLog(disk)
        log.write_metrics(0, {"reward": 0.5})
        log.write_groups(0, [TrajectoryGroup("a", (one(),))])
        (disk / "old").write_bytes(b"old")
        with pytest.raises(DataError, match=r"old: the disk is full.*--resume"):
            write_bytes(disk / "old", b"x" * 200_000)
        with pytest.raises(DataError, match="the disk is full"):
            append_json_line(log.metrics_path, {"text": "x" * 200_000})
        assert (disk / "old").read_bytes() == b"old"
        assert log.read_metrics() == [{"step": 0, "reward": 0.5}]
        assert log.read_groups(0)[0].trajectories == (one(),)
        assert not list(disk.glob(".*tmp"))
        log.write_metrics(1, {"reward": 0.75})
        assert [row["step"] for row in log.read_metrics()] == [0, 1]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_made_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="choose a folder that you can write to"):
        RunLog(tmp_path / "file" / "run").write_metrics(0, {})


# ---------------------------------------------------------------- the run folder


def test_truncate_after_forgets_exactly_what_a_resume_makes_again(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in range(4):
        log.write_metrics(step, {"reward": step / 4})
        groups = [TrajectoryGroup("a", (one(),))]
        log.write_groups(step, groups)
        log.write_weights(step, groups, [TokenWeights(None, (0.0,) * len(one()), (0.5,) * len(one()))])
    for step in (0, 2, 4):
        log.write_evaluation(step, {"step": step})
    log.truncate_after(1)  # the checkpoint holds the policy before step 2
    assert [row["step"] for row in log.read_metrics()] == [0, 1]
    assert log.group_steps() == [0, 1]
    assert [log.weights_path(step).exists() for step in range(4)] == [True, True, False, False]
    assert log.evaluation_steps() == [0, 2]
    log.truncate_after(-1)
    assert (log.read_metrics(), log.group_steps(), log.evaluation_steps()) == ([], [], [0])


def test_config_round_trips_and_a_folder_without_it_is_no_run(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run")
    with pytest.raises(DataError, match="not a run folder"):
        log.read_config()
    log.write_config({"seed": 3, "engine": {"learning_rate": 1e-4, "model": "base"}})
    assert log.read_config() == {"seed": 3, "engine": {"learning_rate": 1e-4, "model": "base"}}
    with pytest.raises(DataError, match="has not finished a step yet"):
        log.read_groups(0)


@pytest.mark.parametrize("content", [b"", b"[", b"- 1\n", b"foo: 1\n", b"\xff\xfe\x00"])
def test_settings_that_no_training_wrote_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(DataError, match=r"(?s)config.yaml (is not YAML|does not hold).*put back what"):
        RunLog(tmp_path).read_config()


def test_a_line_without_a_step_is_named(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write_metrics(0, {"reward": 1.0})
    with log.metrics_path.open("a") as file:
        file.write('{"reward": 2.0}\n')
    with pytest.raises(DataError, match="line 2 is not the metrics of a step"):
        log.read_metrics()
