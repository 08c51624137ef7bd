"""Make the test scripts of tasks run without a network, which no sandbox has.

Many published tasks install their test runner when the tests begin. Offline that fails, and most of these scripts
then write a reward of 0, whatever the agent did. So such a script is refused, or, where the user promises that this
machine has what it installs, run without those commands. A script that fetches data for the tests is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from backtalk.errors import TaskError
from backtalk.sandboxes.base import SandboxFile
from backtalk.sandboxes.images.commands import PASS_HOST_PACKAGES
from backtalk.sandboxes.images.shellwords import split_words
from backtalk.tasks.modules import INSTALLS, RUNS_FETCHED, installs_something
from backtalk.tasks.shell import command_spans, logical_lines

_SUDO = re.compile(r"\bsudo(?:\s+-\S+)*\s+$")
_READS_UV = re.compile(r"(?:source|\.)\s+\S*\.(?:local/bin|cargo)/env\"?$")  # a file that installing uv writes
_VENV = re.compile(r"(?:\S*/)?(?:python3?\s+-m\s+venv|virtualenv)\s|(?:source|\.)\s+\S*/bin/activate\"?$")
_ADDRESS = r"\bhttps?://(?!localhost|127\.|\[::1\])"
_FETCHES = re.compile(rf"(?:^|[|`(]\s*)(?:curl|wget|git\s+clone)\b.*{_ADDRESS}", flags=re.DOTALL)
_INSTALLER = re.compile(
    rf"(?:curl|wget)\b.*{_ADDRESS}.*\|\s*(?:sudo\s+(?:-\S+\s+)*)?(?:\w+=\S*\s+)*(?:ba|da)?sh\b", re.DOTALL
)
_WITH_VALUE = ("-p", "--python", "-w", "--with", "--from", "--index-url", "--project", "--with-requirements", "--spec")
_PLUGIN_OPTION = re.compile(r"\s--(?:ctrf|json-report-file)(?:=|\s+)\S+|\s--json-report\b(?!-)")
_PYTEST = re.compile(r"(?:\S*/)?(?:pytest|py\.test|python3?\s+(?:-\w+\s+)*-m\s+pytest)\b")


def make_script_offline(
    path: Path, content: bytes, *, host_packages: bool, image_installs: bool = False
) -> tuple[bytes, list[str]]:
    """Return a bash script without its commands that install or fetch, and notes of what was changed.

    ``image_installs`` says that the Dockerfile installs packages, which the script may look for where they would be.

    Raises:
        TaskError: it has such commands and ``host_packages`` is False, or one that cannot be replaced, or it is no
            script that bash can run.
    """
    text = content.decode("utf-8", "surrogateescape")
    _check_form(path, text)
    changed, notes = "", []
    lines = list(logical_lines(text))
    is_installing = image_installs or any(installs_something(line) for _, line, is_code in lines if is_code)
    offline = host_packages and is_installing
    for number, line, is_code in lines:
        done = 0
        for begin, end in command_spans(line) if is_code else []:
            command = line[begin:end]
            replacement = _replacement(command, alone=not offline)
            if replacement is None:
                continue
            place = f"{path}, line {number}: {command!r}"
            if not host_packages:
                raise TaskError(
                    f"{place} needs the network, and a sandbox has none: the tests would fail whatever the agent did. "
                    f"Install what they need on this machine, then {PASS_HOST_PACKAGES}, and it is left out"
                )
            if replacement == "":
                raise TaskError(f"{place} fetches what it runs or looks at; put that into tests/ and call it there")
            sudo = _SUDO.search(line[:begin])
            changed += line[done : sudo.start() if sudo else begin] + replacement
            done = end
            what = "left out" if replacement == ":" else f"run as {replacement!r}"
            notes.append(f"tests/{path.name}, line {number}: {what}, this machine's packages are used: {command}")
        changed += line[done:]
    return (changed.encode("utf-8", "surrogateescape") if notes else content), notes


def make_tests_offline(
    folder: Path, tests: Mapping[str, SandboxFile], host_packages: bool, *, image_installs: bool = False
) -> tuple[dict[str, SandboxFile], list[str]]:
    """Return the tests of a folder, their scripts without what needs the network, and notes of what was left out."""
    kept, notes = dict(tests), []
    for path, file in tests.items():
        if path.endswith(".sh"):
            content, changes = make_script_offline(
                folder / path, file.content, host_packages=host_packages, image_installs=image_installs
            )
            kept[path] = replace(file, content=content)
            notes += changes
    return kept, notes


def find_test_programs(text: str) -> set[str]:
    """Return the test runners that a script calls, as ``needs`` names them: "pytest", "python3:pytest"."""
    commands = [line[b:e] for _, line, is_code in logical_lines(text) if is_code for b, e in command_spans(line)]
    found = [re.split(r"\s", match.group()) for command in commands if (match := _PYTEST.match(command))]
    return {"pytest" if len(words) == 1 else f"{words[0]}:pytest" for words in found if "/" not in words[0]}


def _check_form(path: Path, text: str) -> None:
    first = text.partition("\n")[0]
    if first.endswith("\r"):
        raise TaskError(f"{path} has line ends of Windows, which bash takes for a part of its commands; write LF")
    if path.name == "test.sh" and first.startswith("#!") and not re.search(r"\b(?:ba|da)?sh\b", first):
        raise TaskError(f"{path} begins with {first!r}, and test.sh is run by bash; let a test.sh of bash call it")


def _replacement(command: str, *, alone: bool) -> str | None:
    """Return the replacement of a command: None keeps it, ``:`` skips it, "" means that it has none.

    ``alone`` is a command of a script that installs nothing, or whose installing is not left out.
    """
    if INSTALLS.match(command) or _INSTALLER.match(command) or _READS_UV.match(command):
        return ":"
    if not alone and _VENV.match(command):
        return ":"
    if not alone and _PYTEST.match(command):
        bare = re.sub(r"^\S*/", "", _PLUGIN_OPTION.sub("", command))
        bare = re.sub(r"^python(?=\s)", "python3", bare)
        return bare if bare != command else None
    if _FETCHES.search(command):
        return ""
    if not RUNS_FETCHED.match(command):
        return None
    words = iter(split_words(command.replace("\\\n", " "))[1:])
    for word in words:
        if word in _WITH_VALUE:
            next(words, None)
        elif word.partition("@")[0] in ("pytest", "py.test"):
            return _PLUGIN_OPTION.sub("", " ".join(["python3 -m pytest", *words]))
        elif re.fullmatch(r"python(?:3[\d.]*)?", word):
            return _PLUGIN_OPTION.sub("", " ".join(["python3", *words]))
        elif word.endswith(".py"):
            return " ".join(["python3", word, *words])
        elif not word.startswith("-") and word not in ("run", "tool"):
            return ""
    return ""
