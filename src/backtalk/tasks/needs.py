"""Find the commands and Python modules that a task needs and that sandboxes lack.

A sandbox shows this machine's own /usr, or that of the root file system that was chosen for it (``terminal.root``).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

from backtalk.errors import TaskError
from backtalk.sandboxes.base import DEFAULT_PATH, SandboxFile
from backtalk.sandboxes.bubblewrap.layers import python_of_host
from backtalk.sandboxes.root import Root
from backtalk.tasks.modules import find_test_commands, find_test_modules, find_unexplained_modules
from backtalk.tasks.scripts import find_test_programs
from backtalk.tasks.task import Task

_NAME = re.compile(r"[\w.+-]+|python3:[A-Za-z_][\w.]*", flags=re.ASCII)


def missing_tools(task: Task, root: Root | None = None) -> tuple[str, ...]:
    """Return the names of what a task needs and this machine lacks, or the root that sandboxes start from, sorted.

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
    return tuple(sorted(name for name in needed if not _is_there(name, root)))


def texts_of(files: Mapping[str, SandboxFile]) -> list[str]:
    """Return the paths and contents of files, as text."""
    return [*files, *(file.content.decode("utf-8", "replace") for file in files.values())]


def add_needs(
    metadata: dict[str, Any],
    tests: Mapping[str, SandboxFile],
    texts: Iterable[str],
    installs: Sequence[str] = (),
    commands: Sequence[str] = (),
    context: Path | None = None,
) -> None:
    """Add to ``metadata["needs"]`` the modules and commands without which the tests could not run.

    These are modules that tests import and that the scripts, or ``installs``, install or no text of the task speaks of;
    packages that the tests' scripts call as commands; and ``commands``. Files of requirements are looked for among the
    tests and in the folder ``context``.
    """
    sources = {path: file.content.decode("utf-8", "replace") for path, file in tests.items()}
    scripts = [text for path, text in sources.items() if path.endswith(".sh")]
    sources = {path: text for path, text in sources.items() if path.endswith((".sh", ".py"))}

    def read(path: str) -> str | None:
        name = path.rpartition("/")[2]
        found = next((file for key, file in tests.items() if key.rpartition("/")[2] == name), None)
        if found is not None:
            return found.content.decode("utf-8", "replace")
        places = [] if context is None else [place for place in context.rglob(name) if place.is_file()]
        return places[0].read_text("utf-8", "replace") if places else None

    declared = metadata.get("needs", [])
    found = [
        *commands,
        *find_test_commands(installs, scripts),
        *find_test_modules([*scripts, *installs], sources, read),
        *find_unexplained_modules(sources, texts),
    ]
    new = [name for name in dict.fromkeys(found) if isinstance(declared, list) and name not in declared]
    if new:
        metadata["needs"] = [*declared, *new]


def _is_there(name: str, root: Root | None) -> bool:
    command, _, module = name.partition(":")
    top = module.partition(".")[0]
    if root is not None and root.programs:
        return root.has(command) and (not top or _has_module(root.folder, top))
    return _is_on_host(command, top)


@lru_cache
def _is_on_host(command: str, module: str) -> bool:
    path = shutil.which(command, path=DEFAULT_PATH)
    if path is None and command == "python" and python_of_host():
        path = shutil.which("python3", path=DEFAULT_PATH)
    if path is None or not module:
        return path is not None
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([path, "-s", "-E", "-c", code], check=False, capture_output=True).returncode == 0


@lru_cache
def _has_module(folder: Path, module: str) -> bool:
    """Return whether a Python below ``folder`` has a module. None of its programs is run: it is not trusted."""
    places = ("usr/lib/python3*", "usr/local/lib/python3*", "opt/*/lib/python3*", "lib/python3*")
    parts = ("", "/site-packages", "/dist-packages", "/lib-dynload")
    return any(
        next(folder.glob(f"{place}{part}/{module}{end}"), None)
        for place, part, end in product(places, parts, ("", ".py", ".so", ".*.so"))
    )
