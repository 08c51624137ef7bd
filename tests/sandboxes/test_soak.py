"""A small soak: hostile commands, a trainer killed on the way, and nothing left, lost or wrongly rewarded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox_help import backend_or_skip

ROOT = Path(__file__).parents[2]
SOAK = ROOT / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_a_killed_and_resumed_run_leaves_and_loses_nothing() -> None:
    backend_or_skip()
    pytest.importorskip("transformers")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(SOAK), "--rollouts", "96", "--tasks", "8", "--kills", "1", "--seed", "8"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| rollouts read back, of | 96, 96 |" in done.stdout
    assert "as expected" in done.stdout and "NOT FINE" not in done.stdout
