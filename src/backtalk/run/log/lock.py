"""Lock a run folder, a study's folder or an output file for one writer at a time; readers are never held up.

The lock is flock(2) on a small file, so it dies with its process and a file that a kill left behind is free. (A POSIX
record lock would be lost as soon as anything in the process closes the file, and two trainings of one process would
share it.) On NFS, Linux makes it a lock of the server, which other machines see.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from backtalk.errors import ConfigError
from backtalk.files import write_error

NAME = ".lock"
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

log = logging.getLogger(__name__)
_held: set[int] = set()  # descriptors; a fork without exec would keep the lock beyond the death of its parent


def _close_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the sole right to write into ``folder``, which is made; one that stays empty is removed again.

    Raises:
        ConfigError: another process, or another task of this one, writes there; the message says which, since when.
        DataError: the folder cannot be written.
    """
    made = not folder.exists()
    try:
        with _lock(folder / NAME, folder):
            yield
    finally:
        if made:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold the sole right to write the file ``path``; raises as :func:`lock_folder`."""
    with _lock(path.with_name(f".{path.name}{NAME}"), path):
        yield


@contextmanager
def _lock(lock: Path, target: Path) -> Iterator[None]:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _take(lock, target)
    except OSError as error:
        raise write_error(lock, error) from error
    _held.add(descriptor)
    try:
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now().astimezone():%F %T %z}"}
        with suppress(OSError):  # a full disk; the lock holds all the same
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(holder).encode())
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        _held.discard(descriptor)
        os.close(descriptor)


def _take(lock: Path, target: Path) -> int:
    """Return the descriptor of the locked file, closed in programs that are started."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _flock(descriptor, target)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), lock.stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the writer before us removed this file as it ended


def _flock(descriptor: int, target: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            log.warning("%s lies on a file system without locks; let no second process write there", target)
        elif error.errno in (errno.EAGAIN, errno.EACCES):
            raise ConfigError(
                f"{target} is being written by {_holder(descriptor)}, and two writers would mix what they write; wait "
                "until it has ended, end it, or choose another place with --out"
            ) from None
        else:
            raise


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, TypeError, KeyError):  # it has not got so far as to say
        return "another process"
