"""Find the commands and Python modules that a task needs and this machine lacks.

A sandbox shows this machine's own /usr: a command that is missing on this machine is missing in it too.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import lru_cache

from backtalk.errors import TaskError
from backtalk.sandboxes.base import DEFAULT_PATH
from backtalk.tasks.scripts import find_test_programs
from backtalk.tasks.task import Task

_NAME = re.compile(r"[\w.+-]+|python3:[A-Za-z_][\w.]*", flags=re.ASCII)


def missing_tools(task: Task) -> tuple[str, ...]:
    """Return the names of what a task needs and this machine lacks, sorted.

    ``[metadata] needs`` names commands, such as "git", and modules of the system's Python, such as "python3:yaml".
    A pytest that the tests' scripts run is needed too: without it the tests would give every rollout 0.

    Raises:
        TaskError: ``needs`` is no list of such names.
    """
    declared = task.metadata.get("needs", [])
    if not isinstance(declared, list) or not all(isinstance(n, str) and _NAME.fullmatch(n) for n in declared):
        raise TaskError(
            f"task {task.id!r}: [metadata] needs = {declared!r} has to be a list of commands and Python modules, such "
            'as ["git", "python3:yaml"]'
        )
    scripts = [file.content.decode("utf-8", "replace") for path, file in task.tests.items() if path.endswith(".sh")]
    needed = {*declared}.union(*map(find_test_programs, scripts))
    return tuple(sorted(name for name in needed if not _is_there(name)))


@lru_cache
def _is_there(name: str) -> bool:
    command, _, module = name.partition(":")
    path = shutil.which(command, path=DEFAULT_PATH)
    if path is None or not module:
        return path is not None
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module.partition('.')[0]!r}) is None)"
    return subprocess.run([path, "-s", "-E", "-c", code], check=False, capture_output=True).returncode == 0
