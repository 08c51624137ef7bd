"""Root file systems of sandboxes, chosen by the user in place of this machine's programs, and the cache of them.

`images.open` makes one from a folder, a tar file or a Dockerfile; `bubblewrap.layers` mounts it in a sandbox.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import posixpath
import shutil
import stat
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from backtalk.errors import ConfigError
from backtalk.sandboxes.base import DEFAULT_PATH
from backtalk.sandboxes.files import remove_tree
from backtalk.sandboxes.machine.probe import Machine, require_bubblewrap

_REQUIRED_PROGRAMS = ("bash", "tar", "head", "mkdir", "rm", "chmod", "env")  # run by the holder and by sessions
PROGRAM_FOLDERS = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")
# Folders and files of /etc in which programs look for code. An agent's own must not take their place.
ETC_WITH_CODE = ("alternatives", "ld.so.cache", "ld-musl-*.path", "perl", "python3*", "java*")
_MUSL_PATH = "/lib:/usr/local/lib:/usr/lib\n"  # the default of musl's loader
_MAX_LINKS = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Root:
    """A folder that a sandbox shows as its root, and the way it is mounted. Nothing ever writes to it."""

    name: str  # in messages and reports
    folder: Path
    # Folders of programs, as (path in `folder`, path in a sandbox). Empty: the programs are this machine's.
    programs: tuple[tuple[str, str], ...] = ()
    etc: tuple[str, ...] = ()  # paths in /etc that hold code
    tools: Path | None = None  # bubblewrap with its libraries, where the programs are not the host's
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str | None = None
    how: Literal["overlay", "copy"] = "overlay"

    def has(self, program: str) -> bool:
        """Return whether a program is in one of the folders of programs."""
        found = (resolve_inside(self.folder, f"{part}/{program}") for part in DEFAULT_PATH.split(":"))
        return any(place and os.access(self.folder / place, os.X_OK) for place in found)


def read_root(folder: Path, machine: Machine, name: str) -> Root:
    """Return the root whose files and programs are those of `folder`.

    Raises:
        ConfigError: the folder lacks a program that sandboxes need, or an agent could replace its programs.
    """
    programs = []
    for top in PROGRAM_FOLDERS:
        found = resolve_inside(folder, top)
        if found is not None and (folder / found).is_dir():
            if found.split("/")[0] not in PROGRAM_FOLDERS:
                raise ConfigError(
                    f"root {name}: /{top} leads to /{found}, where an agent could write; copy it to /{top}"
                )
            programs.append((found, f"/{top}"))
    root = Root(name=name, folder=folder, programs=tuple(programs))
    missing = [need for need in _REQUIRED_PROGRAMS if not root.has(need)]
    if missing:
        raise ConfigError(
            f"root {name} has no {', '.join(missing)} in {DEFAULT_PATH}, and every command of a task runs in bash; "
            "install them in the image (apk add bash coreutils tar), or choose another root"
        )
    require_bubblewrap(machine)
    etc = [p for pattern in ETC_WITH_CODE for p in sorted((folder / "etc").glob(pattern)) if not p.is_symlink()]
    return replace(root, etc=tuple(f"/etc/{path.name}" for path in etc), tools=_tools(machine.bwrap))


def resolve_inside(folder: Path, path: str) -> str | None:
    """Resolve `path` and its links as a process would whose root is `folder`; return None where it leads nowhere."""
    todo, done, links = path.strip("/").split("/"), "", 0
    while todo:
        name = todo.pop(0)
        if name in ("", "."):
            continue
        if name == "..":
            done = posixpath.dirname(done)
            continue
        place = posixpath.join(done, name)
        try:
            mode = os.lstat(folder / place).st_mode
        except OSError:
            return None
        if not stat.S_ISLNK(mode):
            done = place
            continue
        if (links := links + 1) > _MAX_LINKS:
            return None
        target = os.readlink(folder / place)
        done = "" if target.startswith("/") else done
        todo = [*target.split("/"), *todo]
    return done


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, shortened to 32 digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def cache_folder(kind: str = "roots") -> Path:
    """Return the folder in which roots, or files of another kind, are cached. It may be emptied between trainings."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(base).expanduser() / "backtalk" / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cached_folder(key: str, make: Callable[[Path], None]) -> Path:
    """Return the folder that is cached under `key`, which `make` fills where there is none.

    Processes that want the same folder wait for each other. A folder that `make` filled in part is never returned.
    """
    place = cache_folder() / key
    if place.exists():
        return place
    with place.with_name(f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if place.exists():
            return place
        partial = place.with_name(f"{key}.partial")
        remove_tree(partial)
        try:
            partial.mkdir()
            make(partial)
            partial.rename(place)
        finally:
            remove_tree(partial)
    return place


def _tools(bwrap: str) -> Path:
    """Return a folder with bubblewrap and its libraries, since a session begins in a root that may have neither."""
    listed = subprocess.run(["ldd", bwrap], capture_output=True, text=True, check=False).stdout
    paths = sorted({word for word in listed.split() if word.startswith("/")})  # of lines "name => PATH (address)"
    loader = next((path for path in paths if Path(path).name.startswith("ld")), None)

    def make(folder: Path) -> None:
        shutil.copy(bwrap, folder / "bwrap")
        for path in paths:
            shutil.copy(path, folder / Path(path).name)
        if loader is not None:
            shutil.copy(loader, folder / "loader")
        (folder / "ld.so.cache").write_bytes(b"")  # empty: the loader goes on without one
        for machine in ("x86_64", "aarch64"):
            (folder / f"ld-musl-{machine}.path").write_text(_MUSL_PATH)
        folder.chmod(0o755)

    states = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in (bwrap, *paths)]
    return cached_folder(f"tools-{hashlib.sha256(repr(states).encode()).hexdigest()[:32]}", make)
