"""The command line as a person meets it: its messages and its exit codes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from backtalk import __version__
from backtalk.cli import explain, main
from backtalk.cli.train import _resolve
from backtalk.errors import ConfigError, DataError
from backtalk.run.log import RunLog
from backtalk.tasks.load import load_tasks
from backtalk.tasks.task import Split
from backtalk.viewer.live.app import Viewer
from backtalk.viewer.live.sources import Library
from tiny import tiny_model_dir

SRC = str(Path(__file__).parents[2] / "src")
COMMANDS = ("train", "evaluate", "show", "report", "study", "doctor", "tasks")


@dataclass(frozen=True)
class Result:
    exit_code: object
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def backtalk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs the command in an empty folder, in this process: importing torch again for each would take seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["backtalk", *arguments])
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        return Result(code or 0, *capsys.readouterr())

    return call


def refused(result: Result) -> str:
    """The message of a command that was refused, on stderr and with exit code 2."""
    assert result.exit_code == 2, result
    assert result.err.startswith("Error: ")
    return result.err


def test_a_real_process_says_what_is_wrong_without_a_traceback(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "backtalk.cli", "show", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": SRC},
    )
    assert result.returncode == 2
    assert result.stderr.startswith("Error: ") and len(result.stderr.splitlines()) == 1


def test_help_names_every_command_and_where_to_begin(backtalk: Run) -> None:
    result = backtalk("--help")
    assert result.exit_code == 0
    assert all(command in result.out for command in COMMANDS)
    assert "backtalk doctor" in result.out


def test_no_command_is_help_too(backtalk: Run) -> None:
    assert "Commands" in backtalk().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, backtalk: Run) -> None:
    result = backtalk(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.out


def test_settings_are_listed_on_one_screen_and_by_group(backtalk: Run) -> None:
    lines = backtalk("settings").out.splitlines()
    assert len(lines) <= 45
    assert any(line.startswith("engine.learning_rate") and "0.0001" in line for line in lines)
    assert "backtalk settings objective.world" in backtalk("settings").out
    assert "objective.world.entropy_share" in backtalk("settings", "objective.world").out
    assert "no setting begins with 'objectiv'" in refused(backtalk("settings", "objectiv"))
    assert json.loads(backtalk("settings", "--schema").out)["properties"]["base"]["type"] == "string"


def test_version(backtalk: Run) -> None:
    assert backtalk("--version").out == f"backtalk {__version__}\n"


def test_training_needs_to_know_what(backtalk: Run) -> None:
    assert "--preset triage" in refused(backtalk("train"))


def test_an_unknown_preset_is_refused_with_the_known_ones(backtalk: Run, tmp_path: Path) -> None:
    message = refused(backtalk("train", "--preset", "triagge"))
    assert "triagge" in message and "triage" in message
    assert not (tmp_path / "runs").exists()


def test_a_config_and_a_preset_at_once_are_refused(backtalk: Run) -> None:
    assert "give one" in refused(backtalk("train", "mine.yaml", "--preset", "triage"))


def test_an_unknown_key_is_refused_with_the_nearest(backtalk: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("steps: 3\ngroup_sise: 4\n")
    message = refused(backtalk("train", "mine.yaml"))
    assert "group_sise" in message and "group_size" in message


def test_a_group_of_one_with_the_policy_term_is_refused(backtalk: Run) -> None:
    message = refused(backtalk("train", "--preset", "triage", "--set", "group_size=1"))
    assert "group_size=1" in message and "policy_coeff=0" in message


def test_a_missing_model_folder_is_refused(backtalk: Run) -> None:
    message = refused(backtalk("train", "--preset", "triage", "--model", "./no-such-model", "--set", "sandbox=unsafe"))
    assert "no-such-model" in message


def test_a_task_without_tests_is_refused(backtalk: Run, tmp_path: Path) -> None:
    task = tmp_path / "tasks" / "one"
    (task / "environment").mkdir(parents=True)
    (task / "instruction.md").write_text("Do it.")
    (task / "task.toml").write_text('version = "1.0"\n')
    (task / "environment" / "Dockerfile").write_text("FROM debian:12\n")
    message = refused(backtalk("train", "--preset", "triage", "--set", "tasks.source=tasks"))
    assert "tests" in message


@pytest.mark.parametrize("command", ["evaluate", "show", "report"])
def test_a_folder_that_is_no_run_is_refused(command: str, backtalk: Run, tmp_path: Path) -> None:
    assert "config.yaml" in refused(backtalk(command, str(tmp_path)))


def test_resuming_what_is_not_there_is_refused(backtalk: Run) -> None:
    assert "config.yaml" in refused(backtalk("train", "--out", "nothing", "--resume"))


def test_debug_shows_the_traceback_wherever_it_stands(backtalk: Run, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        backtalk("show", str(tmp_path), "--debug")
    with pytest.raises(DataError):
        backtalk("--debug", "show", str(tmp_path))


def test_tasks_are_written_as_folders(backtalk: Run, tmp_path: Path) -> None:
    result = backtalk("tasks", "write", "out", "--count", "5", "--level", "1")
    assert result.exit_code == 0, result.err
    folders = sorted((tmp_path / "out").iterdir())
    assert len(folders) == 5
    splits = [len(load_tasks("out", split=split, count=9)) for split in (Split.TRAIN, Split.HELD_OUT)]
    assert splits == [4, 1]  # a training on them has something to measure on
    for folder in folders:
        assert (folder / "instruction.md").read_text().strip()
        assert (folder / "tests" / "test.sh").is_file()
    again = refused(backtalk("tasks", "write", "out", "--count", "2", "--level", "1"))
    assert "there already" in again
    assert "held_out" in refused(backtalk("tasks", "write", "other", "--split", "test"))


def test_a_run_from_training_to_report(backtalk: Run, tmp_path: Path) -> None:
    """The whole way with real parts: a tiny random model, real sandboxes, one step."""
    tiny_model_dir(tmp_path / "tiny")
    small = ["steps=1", "tasks_per_step=2", "group_size=2", "evaluation.tasks=2", "evaluation.samples_per_task=1"]
    small += ["rollout.max_turns=2", "rollout.max_tokens=512", "rollout.max_tokens_per_turn=16"]
    settings = [word for one in small for word in ("--set", one)]

    trained = backtalk("train", "--preset", "triage", "--model", "./tiny", *settings, "--out", "runs/x")
    assert trained.exit_code == 0, trained
    assert "step 0 (1/1)" in trained.out and "finished after 1 step: runs/x" in trained.out
    assert (tmp_path / "runs" / "x" / "report.html").is_file()

    assert "--resume" in refused(backtalk("train", "--preset", "triage", "--model", "./tiny", "--out", "runs/x"))
    listed = backtalk("show", "runs/x", "--list").out
    task = next(word for word in listed.split() if word.startswith("triage-"))
    assert "ACTION" in backtalk("show", "runs/x", "--task", task, "--index", "1").out
    assert "no task" in refused(backtalk("show", "runs/x", "--task", "other"))
    assert "report.html" in backtalk("report", "runs/x").out
    page = Viewer(Library([tmp_path / "runs" / "x"]))
    log = RunLog(tmp_path / "runs" / "x")
    weights = log.read_weights(0, groups := log.read_groups(0))
    assert weights is not None
    told = [page.tokens({"run": "x", "part": "train-0", "row": str(row)}) for row in range(4)]
    assert [(row["ids"], row["policy"], row["world"]) for row in told] == [
        (list(t.token_ids), list(w.policy), list(w.world))
        for t, w in zip([t for group in groups for t in group], [w for row in weights for w in row], strict=True)
    ]
    conversations = [page.rollout({"run": "x", "part": "train-0", "row": str(row)}) for row in range(4)]
    assert all(shown["compared"] and shown["findings"] == [] for shown in conversations)

    measured = backtalk("evaluate", "runs/x", "--tasks", "1", "--samples", "1", "--json", "found.json")
    assert "pass@1" in measured.out
    assert json.loads((tmp_path / "found.json").read_text())["step"] == 1


def test_what_is_explained_and_what_is_left_to_a_traceback() -> None:
    assert explain(ConfigError("use 2")) == "use 2"
    full = explain(OSError(errno.ENOSPC, "No space left on device"))
    assert full is not None and "disk is full" in full and "--resume" in full
    denied = explain(PermissionError(errno.EACCES, "Permission denied", "/root/x"))
    assert denied is not None and denied.startswith("/root/x: Permission denied")
    assert explain(ExceptionGroup("runs", [ConfigError("a"), ConfigError("b"), ConfigError("a")])) == "a; b"
    assert explain(KeyError("a bug")) is None
    assert explain(ExceptionGroup("runs", [ConfigError("a"), KeyError("a bug")])) is None


def test_the_tasks_alone_say_what_to_train() -> None:
    config = _resolve(None, None, ["tasks.source=openenv:http://127.0.0.1:1", "steps=3"], None, False)
    assert [source.name for source in config.tasks.sources] == ["openenv:http://127.0.0.1:1"] and config.steps == 3
    with pytest.raises(ConfigError, match="nothing says what to train"):
        _resolve(None, None, ["steps=3"], None, False)
