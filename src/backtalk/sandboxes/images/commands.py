"""Find in a RUN command what a sandbox cannot carry out: package managers, and writes among this machine's programs."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from backtalk.sandboxes.bubblewrap.layers import USR_SRC
from backtalk.sandboxes.images.shellwords import split_words
from backtalk.sandboxes.root import PROGRAM_FOLDERS

WHY_NOT_THERE = "is among this machine's own programs, which a sandbox cannot change; use /opt, or /usr/src"

PASS_HOST_PACKAGES = (
    "pass --host-packages (in a run's settings host_packages: true of the source, in Python host_packages=True)"
)

_WORDS_BEFORE = r"(?:(?:\w+=\S+|sudo|then|do|else|if|!)\s+)*"
PACKAGES = re.compile(
    rf"{_WORDS_BEFORE}(?:\S*/)?(?:apt-get|apt|apk|yum|dnf|npm|pip[\d.]*|python[\d.]*\s+-m\s+pip|uv\s+(?:pip|add|sync)"
    r"|conda|mamba|pipx|gem\s+install|cargo\s+install|go\s+install)\s"
)
_PYTHON3 = r"""(?:\S*python3[\d.]*|"?\$\((?:which|command -v)\s+python3\)"?)"""
PYTHON_LINK = re.compile(rf"{_WORDS_BEFORE}ln\s+(?:-\S+\s+)*{_PYTHON3}\s+/usr/(?:local/)?s?bin/python$")
_VENV = re.compile(r"(?:\S*/)?(?:python[\d.]*\s+-m\s+venv|virtualenv)(?=\s)")
_TO_LAST = ("cp", "mv", "ln", "install", "rsync")  # write to their last word
_TO_ANY = ("mkdir", "touch", "chmod", "tee", "rm", "rmdir", "truncate", "unzip", "tar", "sed", "patch")
_READS_ALONE = re.compile(r"tar\s+-?c|sed\s+(?!.*-i)")
_INTO = re.compile(r">>?\s*[\"']?(/[^\s\"';&|)]+)")


def is_program_path(path: str) -> bool:
    """Return whether a path is among the programs that a sandbox shows read-only."""
    top = path.split("/")[1] if path.startswith("/") else ""
    inside = any(f"{path}/".startswith(f"{folder}/") for folder in writable_program_folders())
    return top in PROGRAM_FOLDERS and not inside


def writable_program_folders() -> tuple[str, ...]:
    """Return the folders below /usr in which a sandbox can write: those that this machine has, to mount there."""
    return (USR_SRC,) if os.path.isdir(USR_SRC) else ()


def program_written_to(part: str) -> str | None:
    """Return the path among this machine's programs that a command would write to; None if it writes to none."""
    if "||" in part or PYTHON_LINK.match(part):  # it may fail, or is carried out in another way
        return None
    for found in _INTO.findall(part):
        if is_program_path(found):
            return found
    command = re.sub(rf"^{_WORDS_BEFORE}", "", part)
    for piece in command.split("|"):
        words = [word.strip("\"'") for word in split_words(piece)]
        if not words or _READS_ALONE.match(piece.strip()):
            continue
        name = words[0].rpartition("/")[2]
        targets: Sequence[str] = words[1:] if name in _TO_ANY else words[-1:] if name in _TO_LAST else ()
        for word in targets:
            if word.startswith("/") and is_program_path(word):
                return word
    return None


def with_host_packages(command: str) -> str:
    """Return a command whose virtual environments show this machine's packages, and need none of their own."""
    return _VENV.sub("python3 -m venv --system-site-packages --without-pip", command)
