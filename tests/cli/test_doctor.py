"""The doctor looks at the real machine; what a machine lacks is put before it as files and findings."""

from __future__ import annotations

import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from backtalk.cli import app, doctor
from backtalk.cli.doctor import GIB, Finding, State, examine, print_findings
from backtalk.errors import SandboxUnavailable
from backtalk.sandboxes import BackendReport
from backtalk.sandboxes.machine import capacity
from backtalk.sandboxes.machine.capacity import Capacity


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return list(examine())


def by_name(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.name.strip() == name)


def test_it_looks_at_all_that_a_default_run_needs(findings: list[Finding]) -> None:
    names = {finding.name.strip() for finding in findings}
    assert names >= {"Python", "CPU cores", "Memory", "Disk", "Packages", "Device", "Base model", "Sandbox"}
    assert names >= {f"Extra {extra}" for extra in doctor.EXTRAS}


def test_it_says_how_many_sandboxes_and_what_bounds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {300: Capacity(300, "4 processor cores"), 22: Capacity(22, "246 open files left (ulimit -n)")}
    for number, state in ((300, State.OK), (22, State.NOTE)):
        monkeypatch.setattr(capacity, "capacity", lambda limits, number=number: found[number])
        finding = doctor._capacity()
        assert finding.state is state and finding.text.startswith(f"{number} at once, with {found[number].bound}")


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_a_share_of_the_cores_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "cores", lambda: 0.5)
    finding = doctor._cores()
    assert finding.state is State.NOTE and finding.text.endswith("the time of 0.5 of them")


def test_memory_is_that_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "memory_limits", lambda: [3 * GIB // 2, 1 << 50])
    assert doctor._memory() == Finding("Memory", State.NOTE, "1.5 GiB", "the default run wants 2 GiB")


def test_python_and_packages_are_those_that_run_this_test(findings: list[Finding]) -> None:
    assert by_name(findings, "Python").state is State.OK
    packages = by_name(findings, "Packages")
    assert packages.state is State.OK
    assert all(package in packages.text for package in doctor.REQUIRED)


def test_whatever_is_missing_comes_with_something_to_type(findings: list[Finding]) -> None:
    for finding in findings:
        if finding.state in (State.MISSING, State.OPTIONAL):
            assert finding.fix, finding


def test_an_extra_that_is_not_installed_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {"ghost": ("no-such-package-anywhere", "nothing")})
    (finding,) = doctor._extras()
    assert finding.state is State.OPTIONAL
    assert finding.fix is not None and "backtalk[ghost]" in finding.fix


def test_a_base_model_without_weights_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "assets" / "base_model"
    folder.mkdir(parents=True)
    for name in doctor.BASE_MODEL_FILES[:-1]:
        (folder / name).write_text("{}")
    monkeypatch.setattr(doctor.resources, "files", lambda package: tmp_path)
    finding = doctor._base_model()
    assert finding.state is State.MISSING
    assert finding.text.endswith("lacks model.safetensors")

    (folder / "model.safetensors").write_bytes(b"x" * 3_000_000)
    assert doctor._base_model() == Finding("Base model", State.OK, "embedded, 3.0 MB")


def test_little_memory_and_disk_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_memory_bytes", lambda: GIB)
    assert doctor._memory().state is State.NOTE
    monkeypatch.setattr(doctor, "_memory_bytes", lambda: 8 * GIB)
    assert doctor._memory() == Finding("Memory", State.OK, "8.0 GiB")
    monkeypatch.setattr(doctor, "_memory_bytes", lambda: None)
    assert doctor._memory().state is State.NOTE
    monkeypatch.setattr(doctor, "MIN_DISK_GIB", 1e12)
    assert doctor._disk().state is State.NOTE


def test_no_safe_sandbox_is_missing_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(choice: str) -> None:
        raise SandboxUnavailable("no bubblewrap; type: sudo apt-get install bubblewrap")

    monkeypatch.setattr("backtalk.sandboxes.local_sandbox", refuse)
    (finding,) = doctor._sandbox()
    assert finding.state is State.MISSING
    assert finding.fix is not None and "apt-get install bubblewrap" in finding.fix


def test_a_fallback_is_a_note_with_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fallback:
        report = BackendReport("sandlock", warnings=("because",), cannot={"disk": "no limit"})

    async def works(backend: object) -> None:
        pass

    monkeypatch.setattr("backtalk.sandboxes.local_sandbox", lambda choice: Fallback())
    monkeypatch.setattr(doctor, "_try_sandbox", works)
    first, *rest = doctor._sandbox()
    assert first.state is State.NOTE and "bubblewrap, sandlock; else none" in first.text
    assert [(finding.state, finding.text) for finding in rest] == [
        (State.NOTE, "because"),
        (State.NOTE, "cannot disk: no limit"),
    ]


def test_printing_names_what_stops_a_run() -> None:
    out = StringIO()
    missing = print_findings(
        [
            Finding("Python", State.OK, "3.11 [not markup]"),
            Finding("Extra x", State.OPTIONAL, "x is not installed", "pip install x"),
            Finding("Sandbox", State.MISSING, "none", "apt-get install bubblewrap"),
        ],
        Console(file=out, width=80),
    )
    assert missing == ["Sandbox"]
    assert out.getvalue().splitlines() == [
        "ok        Python            3.11 [not markup]",
        "optional  Extra x           x is not installed",
        "                            -> pip install x",
        "missing   Sandbox           none",
        "                            -> apt-get install bubblewrap",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_it_says_what_the_memory_of_a_control_group_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "capacity", lambda limits: Capacity(22, "246 open files left (ulimit -n)"))
    monkeypatch.setattr(capacity, "available_mb", lambda: 3264.0)
    monkeypatch.setattr(capacity, "memory_limits", lambda: [4 * GIB, 8 * GIB])
    # 7/8 of 3264 MiB, and 4 + 512 / 8 MiB for each: 2856 / 68 = 42
    assert doctor._capacity().text == (
        "22 at once, with 246 open files left (ulimit -n); the 3264 MiB of memory left carry 42; memory is that of the "
        "control group, 4.0 GiB; the default run wants 64 and takes longer"
    )


def test_what_stops_a_run_is_in_the_error_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Finding("Sandbox", State.MISSING, "none that is safe works here", "apt install bubblewrap")
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("Python", State.OK, "3.12"), missing])
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: a default run cannot work here. Sandbox: none that is safe works here; apt install bubblewrap\n"
    )
