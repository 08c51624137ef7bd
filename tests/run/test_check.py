"""Check of task folders, in the real sandbox: each kind of unsound task gets its own verdict, and none another's."""

from __future__ import annotations

from pathlib import Path

import pytest
from task_folders import KINDS, write_folders
from typer.testing import CliRunner

from backtalk.cli.app import app
from backtalk.cli.tasks import _record_path
from backtalk.run.check import Verdict, folder_state, read_record
from backtalk.tasks.load import read_tasks

VERDICTS = {
    "sound": Verdict.SOUND,
    "refused": Verdict.REFUSED,
    "service": Verdict.SERVICE,
    "needs": Verdict.NEEDS,
    "starts": Verdict.CANNOT_START,
    "silent": Verdict.NO_REWARD,
    "collected": Verdict.NOT_COLLECTED,
    "untouched": Verdict.UNTOUCHED,
    "unsolved": Verdict.UNSOLVED,
}
NUM_KINDS = sum(map(len, KINDS.values()))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/backtalk/checks"


def test_every_kind_of_folder_gets_its_verdict_and_the_good_ones_are_a_source(tmp_path: Path, cache: Path) -> None:
    counts = write_folders(tmp_path / "set", NUM_KINDS)
    good, found = tmp_path / "good.txt", tmp_path / "found.jsonl"
    arguments = ["tasks", "check", str(tmp_path / "set"), "--host-packages", "--write", str(good), "--json", str(found)]
    result = CliRunner().invoke(app, arguments)
    findings = {Path(name).name: finding for name, finding in read_all(found).items()}
    assert {n: f.verdict for n, f in findings.items()} == {n: VERDICTS[n.rpartition("-")[0]] for n in findings}
    assert len(findings) == NUM_KINDS and result.exit_code == 1
    assert f"{counts['sound']} of {NUM_KINDS} tasks are sound" in result.output
    assert "Dockerfile, line 2: USER: no line above makes the user 'postgres'" in result.output
    listed = read_tasks(str(good), host_packages=True)
    assert len(listed) == counts["sound"] and not list(cache.iterdir())
    # A list of sound tasks alone is sound, and says so by its exit code.
    few = tmp_path / "few.txt"
    few.write_text("set/sound-0\n")
    assert CliRunner().invoke(app, ["tasks", "check", str(few)]).exit_code == 0


def read_all(path: Path) -> dict[str, object]:
    import json

    from backtalk.run.check import Finding

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["folder"]: Finding(**{**row, "verdict": Verdict(row["verdict"])}) for row in rows}


def test_an_interrupted_check_goes_on_where_it_stopped(tmp_path: Path, cache: Path) -> None:
    write_folders(tmp_path / "set", 2)
    record = _record_path(tmp_path / "set", False, None)
    lines = [
        f'{{"folder": "{tmp_path}/set/sound-{n}", "verdict": "untouched already earns 1", "reason": "as recorded", '
        f'"kind": "", "state": "{folder_state(tmp_path / f"set/sound-{n}")}"}}\n'
        for n in (0, 1)
    ]
    record.write_text("".join(lines) + '{"folder": "cut sh')
    (tmp_path / "set/sound-1/instruction.md").write_text("Changed since.\n")
    assert list(read_record(record)) == [f"{tmp_path}/set/sound-0"]
    result = CliRunner().invoke(app, ["tasks", "check", str(tmp_path / "set")])
    assert "Going on after 1 of 2 tasks" in result.output and "as recorded" in result.output
    assert "1 of 2 tasks are sound" in result.output and not record.exists()


def test_what_is_no_folder_of_tasks_is_an_error(tmp_path: Path, cache: Path) -> None:
    result = CliRunner().invoke(app, ["tasks", "check", str(tmp_path / "nothing")])
    assert result.exit_code != 0 and "is no folder and no .txt list" in str(result.exception)


def test_tasks_that_we_write_are_sound(tmp_path: Path, cache: Path) -> None:
    """Solutions of triage leave an answer where `submit` does, as Harbor runs them."""
    written = CliRunner().invoke(app, ["tasks", "write", str(tmp_path / "own"), "--count", "2", "--level", "1"])
    assert written.exit_code == 0
    checked = CliRunner().invoke(app, ["tasks", "check", str(tmp_path / "own")])
    assert checked.exit_code == 0 and "2 of 2 tasks are sound" in checked.output
