"""Write files so that a kill or a full disk loses nothing that was there, and read what a kill left unfinished."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from backtalk.errors import DataError

_LOG_TAIL_CHARS = 3000


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it, so that readers see the old or the new content, never a part.

    Raises:
        DataError: the disk is full or the folder cannot be written; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise write_error(path, error) from error


def append_json_line(path: Path, data: Mapping[str, Any]) -> None:
    """Append one JSON line and sync it; first remove a line that an earlier kill left unfinished.

    Raises:
        DataError: the line cannot be written; the lines before it are untouched.
    """
    line = (json.dumps(data) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:  # unbuffered, so that nothing is left to write after a failure
            whole = _whole_lines_bytes(path)
            if whole < file.tell():
                file.truncate(whole)
            try:
                rest = line
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(whole)
                raise
    except OSError as error:
        raise write_error(path, error) from error


def log_tail(path: Path) -> str:
    """Return the end of what a process wrote, at most 3,000 characters, or words that it wrote nothing."""
    text = path.read_text(errors="replace") if path.exists() else ""
    return text[-_LOG_TAIL_CHARS:].strip() or "(it wrote nothing)"


def read_json(path: Path, advice: str = "") -> Any:
    """Return the JSON of a file; ``advice`` ends the message where it is none.

    Raises:
        DataError: the file cannot be read, or is not JSON.
    """
    with reading(path):
        content = path.read_bytes()
    try:
        return json.loads(content)
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}){advice}") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON lines of a file; a last line without a newline is unfinished and left out.

    Raises:
        DataError: the file cannot be read, or a whole line is not JSON.
    """
    with reading(path):
        content = path.read_bytes()
    rows = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON ({error}); remove that line or the file") from error
    return rows


def _whole_lines_bytes(path: Path) -> int:
    """Return the size of a file in bytes up to its last newline, which is included."""
    if not path.is_file():
        return 0  # a device or pipe has nothing to cut
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if size == 0 or file.read(1) == b"\n":
            return size
        file.seek(0)
        return file.read().rfind(b"\n") + 1


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError raised inside into a DataError that names ``path``."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path of the run or file") from error


def write_error(path: Path, error: OSError) -> DataError:
    """Return the error to raise for a file that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(
            f"cannot write {path}: the disk is full. Files written before are whole; "
            "free some space, then continue with --resume"
        )
    if error.errno == errno.EFBIG:
        return DataError(
            f"cannot write {path}: it would become larger than this shell allows. Files written before are whole; "
            "type ulimit -f unlimited, then continue with --resume"
        )
    return DataError(f"cannot write {path}: {error.strerror or error}; choose a folder that you can write to")
