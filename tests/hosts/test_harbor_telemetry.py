"""Harbor's telemetry is off before Harbor is imported, unless it was allowed. Needs no Harbor: a stub stands for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("given", "expected"), [({}, "0"), ({"HARBOR_TELEMETRY": "1"}, "1")])
def test_the_host_keeps_telemetry_off(tmp_path: Path, given: dict[str, str], expected: str) -> None:
    stub = "import os\nprint(os.environ.get('HARBOR_TELEMETRY'))\nraise SystemExit\n"
    (tmp_path / "harbor").mkdir()
    (tmp_path / "harbor/__init__.py").write_text(stub)
    source = str(Path(__file__).parents[2] / "src")
    env = {name: value for name, value in os.environ.items() if name != "HARBOR_TELEMETRY"} | given
    env["PYTHONPATH"] = f"{tmp_path}:{source}"
    run = [sys.executable, "-c", "import backtalk.hosts.harbor"]
    assert subprocess.run(run, capture_output=True, text=True, env=env, timeout=60).stdout == f"{expected}\n"
