"""Read and write the files of a sandbox that is a folder of this machine, from outside of the sandbox.

The kernel resolves each path as if that folder were the root (openat2, RESOLVE_IN_ROOT), and never follows a link in
the last part. So nothing outside is read or written, whatever links an agent made, or makes meanwhile.
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
from backtalk.sandboxes.files import read_regular, remove_tree

_OPENAT2 = 437  # on every processor
_RESOLVE = 0x01 | 0x02 | 0x10  # RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_IN_ROOT
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_MIN_AGE_S = 60.0  # of a folder that may be removed as left behind
_libc = ctypes.CDLL(None, use_errno=True)


class RootedFiles:
    """The file tree under `root`. Its files belong to `uid` (None: this process's); `trash` is a folder beside it."""

    def __init__(self, root: Path, trash: Path, uid: int | None) -> None:
        self._root, self._trash, self._uid = root, trash, uid

    def put(self, files: Mapping[str, SandboxFile], *, max_bytes: int) -> None:
        """Write files, in place of whatever is at their paths.

        Raises:
            SandboxError: they are larger than `max_bytes` together, or the kernel refuses one.
        """
        if (size := sum(len(file.content) for file in files.values())) > max_bytes:
            raise SandboxError(f"files of {size} bytes do not fit on a disk of {max_bytes >> 20} MiB")
        for path, file in files.items():
            try:
                self.write(path, file)
            except OSError as error:
                raise SandboxError(f"could not write {path}: {error.strerror}") from error

    def write(self, path: str, file: SandboxFile) -> None:
        """Write one file, and make the folders above it."""
        name = posixpath.basename(path)
        parent = self._open_folder(posixpath.dirname(path))
        try:
            self._remove(parent, name)
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
        """Make a folder with these rights, in place of whatever is there."""
        descriptor = self._open_folder(path)
        os.chmod(f"/proc/self/fd/{descriptor}", mode)
        os.close(descriptor)

    def _open_folder(self, path: str) -> int:
        """Open a folder, made if need be; it and those above get their owner's rights back."""
        if path.strip("/") == "":
            return self._with_rights(os.open(self._root, _FOLDER))
        name = posixpath.basename(path)
        parent = self._open_folder(posixpath.dirname(path))
        try:
            with contextlib.suppress(OSError):
                return self._with_rights(self._open(path, _FOLDER))  # also by links, which lead only inside
            self._remove(parent, name)
            os.mkdir(name, 0o755, dir_fd=parent)
            if self._uid is not None:
                os.chown(name, self._uid, self._uid, dir_fd=parent, follow_symlinks=False)
            return self._with_rights(os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=parent))
        finally:
            os.close(parent)

    def get(self, path: str, max_bytes: int) -> bytes | None:
        """Return a regular file's content, or None if there is none.

        Raises:
            SandboxError: it is larger than `max_bytes`.
        """
        try:
            descriptor = self._open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            return None
        return read_regular(descriptor, path, max_bytes)

    def _open(self, path: str, flags: int) -> int:
        """Open a path as if the folder were the root."""
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

    def _with_rights(self, descriptor: int) -> int:
        """Give an open folder back the rights that its owner may have taken from it, and return it."""
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        if mode & 0o700 != 0o700:
            os.chmod(f"/proc/self/fd/{descriptor}", mode | 0o700)
        return descriptor

    def _remove(self, parent: int, name: str) -> None:
        """Remove what is called `name` in an open folder; a folder is moved to the trash, whatever the rights in it."""
        try:
            descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        except FileNotFoundError:
            return
        try:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                self._with_rights(descriptor)
                os.rename(name, self._trash / secrets.token_hex(8), src_dir_fd=parent)
            else:
                os.unlink(name, dir_fd=parent)
        finally:
            os.close(descriptor)


def lock_folder(folder: Path) -> int | None:
    """Lock a folder for this process and return the descriptor to close; None if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def remove_orphans(prefix: str) -> None:
    """Remove folders left by killed trainers: with this prefix and owner, not locked, and older than a minute."""
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            if status.st_uid != os.getuid() or time.time() - status.st_ctime < _MIN_AGE_S:
                continue
            if (lock := lock_folder(folder)) is not None:
                remove_tree(folder)
                os.close(lock)
