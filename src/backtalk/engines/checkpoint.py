"""Checkpoint folders of any engine, written completely or not at all; each engine decides what is in its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from backtalk.errors import DataError


def write_atomically(folder: Path, save: Callable[[Path], None]) -> None:
    """Let ``save`` write into a temporary folder, then rename that to ``folder``.

    A crash leaves the old folder or the new one, the old one perhaps as ``.NAME.old`` (see ``find_checkpoint``).

    Raises:
        DataError: the disk is full or not writable; an older checkpoint is still there.
    """
    folder = folder.absolute()
    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        save(fresh)
        for path in filter(Path.is_file, fresh.rglob("*")):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)
        os.rename(fresh, folder)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:  # torch and safetensors have errors of their own for a full disk
        shutil.rmtree(fresh, ignore_errors=True)
        raise DataError(
            f"checkpoint {folder} cannot be written: {error}; free some space, or choose another folder "
            "(an older checkpoint there is unharmed)"
        ) from error


def find_checkpoint(folder: Path) -> Path | None:
    """Return ``folder``, its predecessor after a crash between the two renames, or None where neither exists."""
    folder = folder.absolute()
    candidates = (folder, folder.with_name(f".{folder.name}.old"))
    return next((path for path in candidates if path.is_dir() and any(path.iterdir())), None)
