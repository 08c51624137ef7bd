"""Check paths of files in sandboxes, pack files for the way in, read regular files only, and remove folders."""

from __future__ import annotations

import io
import os
import posixpath
import stat
import subprocess
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path

from backtalk.errors import ConfigError, SandboxError
from backtalk.sandboxes.base import SandboxFile


def clean_path(path: str, *, relative: bool = False) -> str:
    """Return the normal form of the path of a file in a sandbox: "/a/b" for "/a//./b".

    Files of tasks, members of archives, and files that are put or got are all checked here. A ``relative`` path is
    taken from a folder that the caller knows.

    Raises:
        ConfigError: the path is a folder's, has "..", or is absolute where it must be relative, or the reverse.
    """
    clean = posixpath.normpath("/" + path.lstrip("/"))
    if "\0" in path or ".." in path.split("/") or path.endswith("/") or clean == "/":
        raise ConfigError(f"{path!r} is no plain path of a file; write it without '..' and '/' at its end")
    if path.startswith("/") is relative:
        right = "is absolute; write it from its folder" if relative else "is not an absolute path inside the sandbox; "
        raise ConfigError(f"{path!r} {right}" + ("" if relative else f"write it as /home/agent/{path}"))
    return clean.lstrip("/") if relative else clean


def pack_files(files: Mapping[str, SandboxFile]) -> bytes:
    """Return a tar archive of files, with their paths, modes and times."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for path, file in files.items():
            entry = tarfile.TarInfo(path.lstrip("/"))
            entry.size, entry.mode = len(file.content), file.mode & 0o777
            entry.mtime = int(time.time()) if file.mtime is None else file.mtime
            archive.addfile(entry, io.BytesIO(file.content))
    return buffer.getvalue()


def read_regular(descriptor: int, path: str, max_bytes: int) -> bytes | None:
    """Read an open file and close it; return None where it is not a regular file. `path` is its name in messages.

    Raises:
        SandboxError: the file is larger than `max_bytes`.
    """
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return None
    with open(descriptor, "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise SandboxError(f"{path} is larger than {max_bytes} bytes; ask for more with max_bytes")
    return content


def remove_tree(folder: Path) -> None:
    """Remove a folder, if it is there, whatever its rights and depth. Links are not followed; never raises."""
    for command in (["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
        if folder.exists():
            subprocess.run([*command, "--", str(folder)], check=False, capture_output=True)
