"""Checkpoint folders of any engine, written whole or not at all; what is in one is the engine's own affair."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from backtalk.errors import DataError


def write_atomically(folder: Path, save: Callable[[Path], None]) -> None:
    """Let ``save`` fill a folder beside ``folder``, then put it in its place.

    A crash leaves the old folder or the new one, the old one perhaps as ``.NAME.old`` (see ``find_checkpoint``).

    Raises:
        DataError: the disk is full or not writable; what was there before is still there.
    """
    folder = folder.absolute()
    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        save(fresh)
        _sync(fresh)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)
        os.rename(fresh, folder)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:  # torch and safetensors have errors of their own for a full disk
        shutil.rmtree(fresh, ignore_errors=True)
        raise DataError(
            f"checkpoint {folder} cannot be written: {error}; free some space, or choose another folder "
            "(what was saved there before is unharmed)"
        ) from error


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def find_checkpoint(folder: Path) -> Path | None:
    """Return ``folder``, its predecessor where a crash came between the two renames, or None where neither is there."""
    folder = folder.absolute()
    places = (folder, folder.with_name(f".{folder.name}.old"))
    return next((place for place in places if place.is_dir() and any(place.iterdir())), None)
