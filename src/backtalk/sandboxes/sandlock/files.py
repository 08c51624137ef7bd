"""Files of a sandbox that lie in a folder of this machine, reached from outside of it.

Every path is resolved by the kernel as if that folder were the root (openat2, RESOLVE_IN_ROOT), and the last part never
follows a link: whatever links an agent made, and while it goes on making them, nothing outside is read or written.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import posixpath
import secrets
import stat
import struct
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from backtalk.errors import SandboxError
from backtalk.sandboxes.base import SandboxFile
from backtalk.sandboxes.files import read_regular

_OPENAT2 = 437  # on every processor
_RESOLVE = 0x01 | 0x02 | 0x10  # RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_IN_ROOT
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_NEW_S = 60.0
_libc = ctypes.CDLL(None, use_errno=True)


class RootedFiles:
    """The tree under `root`, whose files belong to `uid` (None: to us). `trash` is a folder beside it."""

    def __init__(self, root: Path, trash: Path, uid: int | None) -> None:
        self._root, self._trash, self._uid = root, trash, uid

    def put(self, files: Mapping[str, SandboxFile], *, max_bytes: int) -> None:
        """Write files over whatever is in the way.

        Raises:
            SandboxError: they are more than `max_bytes`; or the kernel refuses.
        """
        if (size := sum(len(file.content) for file in files.values())) > max_bytes:
            raise SandboxError(f"files of {size} bytes do not fit a disk of {max_bytes >> 20} MiB")
        for path, file in files.items():
            try:
                self.write(path, file)
            except OSError as error:
                raise SandboxError(f"could not write {path}: {error.strerror}") from error

    def write(self, path: str, file: SandboxFile) -> None:
        """Write one file, with the folders above it."""
        name = posixpath.basename(path)
        parent = self.folder(posixpath.dirname(path))
        try:
            self._clear(parent, name)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with open(os.open(name, flags, 0o600, dir_fd=parent), "wb") as out:
                out.write(file.content)
                out.flush()
                if self._uid is not None:
                    os.fchown(out.fileno(), self._uid, self._uid)
                os.fchmod(out.fileno(), file.mode & 0o777)
                if file.mtime is not None:
                    os.utime(out.fileno(), (file.mtime, file.mtime))
        finally:
            os.close(parent)

    def make_folder(self, path: str, mode: int = 0o755) -> None:
        """A folder that can be used, whatever was there."""
        descriptor = self.folder(path)
        os.chmod(f"/proc/self/fd/{descriptor}", mode)
        os.close(descriptor)

    def folder(self, path: str) -> int:
        """An open folder, made where there is none; it and those above get their owner's rights back."""
        if path.strip("/") == "":
            return self._usable(os.open(self._root, _FOLDER))
        name = posixpath.basename(path)
        parent = self.folder(posixpath.dirname(path))
        try:
            with contextlib.suppress(OSError):
                return self._usable(self._open(path, _FOLDER))  # through links of the agent's, which lead nowhere else
            self._clear(parent, name)
            os.mkdir(name, 0o755, dir_fd=parent)
            if self._uid is not None:
                os.chown(name, self._uid, self._uid, dir_fd=parent, follow_symlinks=False)
            return self._usable(os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=parent))
        finally:
            os.close(parent)

    def get(self, path: str, max_bytes: int) -> bytes | None:
        """A regular file's content, or None.

        Raises:
            SandboxError: it is larger.
        """
        try:
            descriptor = self._open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            return None
        return read_regular(descriptor, path, max_bytes)

    def _open(self, path: str, flags: int) -> int:
        root = os.open(self._root, _FOLDER)
        try:
            how = struct.pack("=QQQ", flags, 0, _RESOLVE)
            got = _libc.syscall(_OPENAT2, root, os.fsencode(path.lstrip("/") or "."), how, len(how))
        finally:
            os.close(root)
        if got < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return got

    def _usable(self, descriptor: int) -> int:
        """The folder, with the rights that its owner may have taken from it."""
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        if mode & 0o700 != 0o700:
            os.chmod(f"/proc/self/fd/{descriptor}", mode | 0o700)
        return descriptor

    def _clear(self, parent: int, name: str) -> None:
        """Take away what is under `name`: a folder as a whole, however its inside was left."""
        try:
            descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        except FileNotFoundError:
            return
        try:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                self._usable(descriptor)
                os.rename(name, self._trash / secrets.token_hex(8), src_dir_fd=parent)
            else:
                os.unlink(name, dir_fd=parent)
        finally:
            os.close(descriptor)


def remove(folder: Path) -> None:
    """Remove a folder with all that is in it, though its owner shut parts of it. Links are not followed."""
    for current, names, _ in os.walk(folder, onerror=None):
        for name in names:  # on the way down: the walk has not entered them yet
            path = os.path.join(current, name)
            with contextlib.suppress(OSError):
                if not os.path.islink(path):
                    os.chmod(path, 0o700)
    for current, names, files in os.walk(folder, topdown=False):
        for name in files:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(current, name))
        for name in names:
            path = os.path.join(current, name)
            with contextlib.suppress(OSError):
                (os.unlink if os.path.islink(path) else os.rmdir)(path)
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def held(folder: Path) -> int | None:
    """A lock on a folder that ends with its process, to be closed; None where another holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def remove_orphans(prefix: str) -> None:
    """Remove the folders of killed trainers: ours by owner and name, held by nobody, and not just being made."""
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            if status.st_uid != os.getuid() or time.time() - status.st_ctime < _NEW_S:
                continue
            if (lock := held(folder)) is not None:
                remove(folder)
                os.close(lock)
