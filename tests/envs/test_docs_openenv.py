"""The program in docs/openenv.md does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_program_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "openenv.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(compile(program, "docs/openenv.md", "exec"), {})
    assert capsys.readouterr().out == "556 of 3860 tokens are the environment's\n"
