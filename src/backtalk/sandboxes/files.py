"""Handle files of sandboxes, whichever backend holds them: check paths, pack archives, read and remove safely."""

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
    """Return the path of a file in a sandbox without detours: "/a//./b" is "/a/b".

    The one check for files of tasks, members of archives, and what is put and got. A ``relative`` path lies below a
    folder that its caller has in mind.

    Raises:
        ConfigError: it is a folder's path, leads out of where it begins, or is not absolute where it has to be.
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
    """Read an open file and close it; None where it is no regular one. `path` is its name in messages.

    Raises:
        SandboxError: it is larger.
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
