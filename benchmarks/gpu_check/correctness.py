"""The engine's tests on a device, with each error beside its bound."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from gpu_check.machine import Device
from gpu_check.results import FAILED, Part, Row

ROOT = Path(__file__).parents[2]
TESTS = "tests/engines/test_devices.py"


def run(part: Part, device: Device) -> None:
    """Run every test that is not measured yet, in one process, and write a row for each."""
    kind = "cuda" if device.is_gpu else "cpu"
    part.measure("all tests", lambda: run_tests(part, kind), expected_s=60)


def run_tests(part: Part, kind: str) -> Row:
    """Run the tests of a kind of device with pytest alone, without the plugins of the whole suite."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = ["-q", "-k", kind, "-c", "/dev/null", "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", str(ROOT / TESTS)],
            capture_output=True,
            text=True,
            timeout=max(part.seconds_left, 1),
        )
        if not report.exists():
            return {FAILED: (done.stdout + done.stderr)[-300:]}
        rows = read_report(report)
    for name, row in rows.items():
        part.results.write(part.name, name, row)
    failed = [name for name, row in rows.items() if FAILED in row]
    if failed or not rows:
        return {FAILED: f"{len(failed)} of {len(rows)} tests: {done.stdout[-300:]}"}
    return {"tests passed": len(rows)}


def read_report(path: Path) -> dict[str, Row]:
    """Return a row for each test of a JUnit report that was not skipped: its errors, or why it failed."""
    rows: dict[str, Row] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        bounds = [f"{p.get('name')} {p.get('value')}" for p in case.iter("property")]
        row: Row = {"errors and bounds": "; ".join(bounds)}
        problem = next((found for tag in ("failure", "error") if (found := case.find(tag)) is not None), None)
        if problem is not None:
            row[FAILED] = (problem.get("message") or "")[:300]
        rows[(case.get("name") or "").removeprefix("test_")] = row
    return rows
