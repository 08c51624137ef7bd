"""What a task's own test scripts need of the network, which no sandbox has.

Many published tasks install their test runner when the tests begin. Offline that fails, and most of these scripts
then write a reward of 0: not what the agent earned. So such a script is refused, or, where a person promises that the
machine has what it installs, run without those commands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from backtalk.envs.dockerfile import NETWORK
from backtalk.envs.shellwords import split_list, split_words, unquoted
from backtalk.errors import TaskError

_BEFORE = r"(?:(?:if|then|elif|else|do|while|until|!|\{|\(|sudo|time|exec|\w+=\S*)\s+)*"
_INSTALLS = re.compile(
    r"(?:(?:apt-get|apt|apk|yum|dnf|npm|pip3?|python3?\s+-m\s+pip|uv\s+pip|conda)\s+(?:-\S+\s+)*"
    r"(?:update|upgrade|install|add|ci)\b|uv\s+(?:add|init|sync|venv)\b)"
)
_READS_UV = re.compile(r"(?:source|\.)\s+\S*\.(?:local/bin|cargo)/env\"?$")  # a file that installing uv writes
_RUNS_UV = re.compile(r"(?:uvx|uv\s+(?:tool\s+)?run)\s")
_UV_VALUES = ("-p", "--python", "-w", "--with", "--from", "--index-url", "--project", "--with-requirements")
_HEREDOC = re.compile(r"<<-?\s*(['\"]?)([A-Za-z_]\w*)\1")


def offline_script(path: Path, content: bytes, *, host_packages: bool) -> tuple[bytes, list[str]]:
    """A bash script without its commands that install or fetch, and notes of what was changed.

    Raises:
        TaskError: it has such commands and ``host_packages`` is False, or one that nothing here can stand in for.
    """
    text = content.decode("utf-8", "surrogateescape")
    lines, notes = [], []
    for number, line, is_code in _logical_lines(text):
        changed = line
        for _, part in split_list(line.strip()) if is_code else []:
            command = part[re.match(_BEFORE, part).end() :]  # type: ignore[union-attr]  # it matches anything
            stand_in = _stand_in(command)
            if stand_in is None:
                continue
            if not host_packages:
                raise TaskError(
                    f"{path}, line {number}: {command!r} needs the network, and a sandbox has none: the tests would "
                    "fail whatever the agent did. Install what they need on this machine, then read the task with "
                    "host_packages=True (host_packages: true of a source in a run's settings), and it is left out"
                )
            if stand_in == "":
                raise TaskError(f"{path}, line {number}: {command!r} fetches what it runs; call the program itself")
            changed = changed.replace(command, stand_in, 1)
            what = "left out" if stand_in == ":" else f"run as {stand_in!r}"
            notes.append(f"tests/{path.name}, line {number}: {what}, this machine's packages are used: {command}")
        lines.append(changed)
    return ("".join(lines).encode("utf-8", "surrogateescape") if notes else content), notes


def _stand_in(command: str) -> str | None:
    """What is run in a command's place: None is the command itself, ``:`` nothing, and "" cannot be had."""
    if _INSTALLS.match(command) or NETWORK.search(command) or _READS_UV.match(command):
        return ":"
    if _RUNS_UV.match(command):
        words = iter(split_words(command.replace("\\\n", " "))[1:])
        for word in words:
            if word in _UV_VALUES:
                next(words, None)
            elif word in ("pytest", "py.test"):
                return _pytest(list(words))
            elif not word.startswith("-") and word not in ("run", "tool"):
                return ""
        return ""
    return None


def _pytest(words: list[str]) -> str:
    """pytest as this machine has it, without the report of a plugin that may not be there."""
    if "--ctrf" in words:
        at = words.index("--ctrf")
        words = words[:at] + words[at + 2 :]
    return " ".join(["python3 -m pytest", *words])


def _logical_lines(text: str) -> Iterator[tuple[int, str, bool]]:
    """(number, line with those it is continued on, whether it is code). Comments and bodies of heredocs are none."""
    physical = text.splitlines(keepends=True)
    at = 0
    while at < len(physical):
        start, line = at, physical[at]
        at += 1
        is_code = not line.lstrip().startswith("#")
        while is_code and line.rstrip("\n").endswith("\\") and at < len(physical):
            line += physical[at]
            at += 1
        yield start + 1, line, is_code
        open_places = set(unquoted(line)) if is_code else set()
        for mark in _HEREDOC.finditer(line):
            while mark.start() in open_places and line[mark.start() - 1 : mark.start()] != "<" and at < len(physical):
                at += 1
                yield at, physical[at - 1], False
                if physical[at - 1].strip() == mark.group(2):
                    break
