"""The world-model recipe: a small run of it, and its control."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from backtalk.trajectory import Segment, StopReason, TokenRole, Trajectory
from sandbox_help import backend_or_skip

RECIPE = Path(__file__).parents[2] / "recipes" / "world_model"


@pytest.mark.slow
def test_a_small_run_writes_its_results_and_learns(tmp_path: Path) -> None:
    backend_or_skip()
    small = "--machines 4 --sessions 2 --held-out 3 --steps 4 --every 4 --show 1".split()
    command = [sys.executable, str(RECIPE / "run.py"), "--out", str(tmp_path / "out"), *small]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    arms = json.loads((tmp_path / "out" / "results.json").read_text())["arms"]
    first, last = arms["observations"]["curve"]
    assert (first["step"], last["step"]) == (0, 4)
    assert last["trained"]["nats_per_token"] < first["trained"]["nats_per_token"]
    assert arms["shuffled"]["curve"][0] == first  # both arms begin with the same model on the same episodes
    assert len(arms["observations"]["predictions"]) == 1
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "new files" in (tmp_path / "out" / "report.md").read_text()


def test_the_control_moves_answers_between_turns_and_changes_nothing_else(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPE))
    from explore import shuffled

    def episode(first: int) -> Trajectory:
        turns = [
            segment
            for turn in range(2)
            for segment in (
                Segment(TokenRole.ACTION, (first + turn,), (0.0,), turn=turn),
                Segment(TokenRole.ENV_OUTPUT, (first + turn + 500,), turn=turn),
            )
        ]
        return Trajectory(
            task_id="t",
            sample_index=first,
            segments=(Segment(TokenRole.CONTEXT, (1,)), *turns),
            stop_reason=StopReason.MAX_TURNS,
        )

    episodes = [episode(first) for first in range(10, 100, 10)]
    moved = shuffled(episodes, 0)
    actions = [[s for s in t.segments if s.role is not TokenRole.ENV_OUTPUT] for t in episodes]
    assert [[s for s in t.segments if s.role is not TokenRole.ENV_OUTPUT] for t in moved] == actions
    answers = [
        Counter(s.token_ids for t in one for s in t.segments if s.role is TokenRole.ENV_OUTPUT)
        for one in (episodes, moved)
    ]
    assert answers[0] == answers[1]
    wrong = [t.token_ids[2] != t.token_ids[1] + 500 for t in moved]
    assert sum(wrong) >= 6
