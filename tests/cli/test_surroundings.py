"""Terminals, locales, pipes and limits of other people: a sentence or the right output, and never a traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from backtalk.cli.app import app, explain
from backtalk.cli.heartbeat import Heartbeat
from backtalk.errors import ConfigError
from backtalk.files import write_bytes

CLI = f"{sys.executable} -m backtalk.cli"
NO_UTF8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def shell(command: str, folder: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env={**os.environ, **env}, capture_output=True, check=False
    )


@pytest.mark.parametrize(
    ("env", "name"),
    [({"PYTHONIOENCODING": "ascii"}, b""), ({"PYTHONIOENCODING": "latin-1"}, b"\xe9"), (NO_UTF8, b"")],
)
def test_a_folder_with_an_accent_and_a_terminal_without_utf8(env: dict[str, str], name: bytes, tmp_path: Path) -> None:
    done = shell(f"{CLI} tasks write \u00e9 --count 1", tmp_path, **env)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(name) and done.stdout.endswith(b"/triage-1-0\n")
    assert [path.name for path in tmp_path.iterdir()] == ["\u00e9"]


def test_a_name_that_is_no_utf8_is_refused_in_one_line(tmp_path: Path) -> None:
    for env in ({}, NO_UTF8):
        done = shell(f"{CLI} tasks write $'\\xe9'", tmp_path, **env)
        assert done.returncode == 2 and done.stderr.count(b"\n") == 1
        assert b"is not UTF-8 text; rename" in done.stderr and not list(tmp_path.iterdir())


def test_a_current_folder_that_was_deleted_is_named(tmp_path: Path) -> None:
    done = shell(f"mkdir gone && cd gone && rmdir ../gone && {CLI} account /nowhere.json", tmp_path)
    assert (
        done.returncode == 2
        and done.stderr == b"Error: the folder that this shell is in was deleted; cd to another one\n"
    )


def test_a_limit_on_the_size_of_files_is_named(tmp_path: Path) -> None:
    done = shell(f"ulimit -f 0; {CLI} tasks write t --count 1", tmp_path, PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert b"larger than this shell allows" in done.stderr and b"ulimit -f unlimited" in done.stderr
    wrapped = ValueError("Error while serializing: I/O error: File too large (os error 27)")
    assert "ulimit -f unlimited" in str(explain(wrapped))
    with pytest.raises(Exception, match="x: it would become larger than this shell allows") as caught:
        write_bytes_of_a_limited_process(tmp_path / "x")
    assert "ulimit -f unlimited" in str(caught.value)


def write_bytes_of_a_limited_process(path: Path) -> None:
    class Limited(type(path)):  # the error that the kernel gives, without limiting this process
        @property
        def parent(self) -> Path:
            raise OSError(errno.EFBIG, "File too large")

    write_bytes(Limited(path), b"x")


def test_work_goes_on_when_nobody_reads_what_it_prints(tmp_path: Path) -> None:
    program = (
        "import sys, time; from backtalk.cli.options import new_console; console = new_console(lasting=True)\n"
        "for n in range(3): console.print('x\\n' * 50_000, soft_wrap=True)\n"
        "print('the end', file=sys.stderr)"
    )
    (tmp_path / "p.py").write_text(program)
    done = shell(f"{sys.executable} p.py | head -c 1; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert done.returncode == 0
    assert done.stderr == b"note: nobody reads the output any more; the work goes on\nthe end\n"


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--preset", "triage", "--set", "steps", "2"],
        ["train", "--set", "steps", "2"],
        ["evaluate", "r", "--set", "steps"],
        ["serve", "--model", "base", "--set", "steps", "2"],
        ["study", "demo", "--set", "steps"],
    ],
)
def test_a_setting_without_an_equals_sign_is_told_so(command: list[str]) -> None:
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, ConfigError), result.output
    assert str(result.exception).startswith("--set steps has no =; write --set steps=VALUE")


def test_silence_is_broken_and_only_silence() -> None:
    said: list[tuple[float, str]] = []
    began = time.monotonic()
    with Heartbeat(lambda text: said.append((time.monotonic() - began, text)), "loading", every_s=0.3) as heartbeat:
        while len(said) < 2:
            time.sleep(0.01)
        heartbeat.doing("training, step 0: 1 of 8 rollouts")
        talking = time.monotonic() + 0.6
        while time.monotonic() < talking:
            heartbeat.heard()
            time.sleep(0.01)
        assert len(said) <= 3  # a thread that was late may have spoken once
        before = len(said)
        while len(said) == before:
            time.sleep(0.01)
    assert said[0][1] == "... loading, for 0 s so far" and said[0][0] >= 0.3
    assert said[-1][1].startswith("... training, step 0: 1 of 8 rollouts, for ")
    with Heartbeat(None, "loading", every_s=0.01) as heartbeat:
        heartbeat.doing("nothing is said in a terminal, which shows bars")


def test_what_a_terminal_has_no_characters_for_is_a_question_mark(tmp_path: Path) -> None:
    program = (
        "import sys; from backtalk.cli.app import _speak_any_encoding\n"
        "from backtalk.cli.options import new_console; _speak_any_encoding(); new_console().print('a \\u00b7 \\u00e9')"
    )
    (tmp_path / "p.py").write_text(program)
    for env, shown in (
        ({"PYTHONIOENCODING": "ascii"}, b"a ? ?\n"),
        ({"PYTHONIOENCODING": "latin-1"}, b"a \xb7 \xe9\n"),
    ):
        done = shell(f"{sys.executable} p.py", tmp_path, **env)
        assert (done.returncode, done.stdout, done.stderr) == (0, shown, b"")
    done = shell(f"{sys.executable} p.py", tmp_path, **NO_UTF8)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"a ? ?\n", b"")
