"""Checkpoint folders: written whole or not at all.

model/        weights and tokenizer, as AutoModelForCausalLM and AutoTokenizer read them (LoRA: merged)
adapter/      the LoRA adapters alone, where there are any
training.pt   optimizer state and float32 masters
state.json    policy version and format
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from backtalk.errors import DataError

FORMAT = 1


def write_atomically(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a folder beside ``folder``, then put it in its place.

    A crash leaves the old folder or the new one, the old one perhaps as ``.NAME.old`` (see ``find_checkpoint``).

    Raises:
        DataError: the disk is full or not writable; what was there before is still there.
    """
    folder = folder.absolute()
    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        write(fresh)
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


def find_checkpoint(folder: Path) -> Path:
    """``folder``, or its predecessor where a crash came between the two renames.

    Raises:
        DataError: neither holds a checkpoint.
    """
    folder = folder.absolute()
    for candidate in (folder, folder.with_name(f".{folder.name}.old")):
        if (candidate / "state.json").is_file():
            return candidate
    raise DataError(f"{folder} holds no checkpoint: no state.json; pass a folder that an engine's save() wrote")


def write_state(folder: Path, state: dict[str, Any], training: dict[str, Any]) -> None:
    """The parts beside the model."""
    torch.save(training, folder / "training.pt")
    (folder / "state.json").write_text(json.dumps({"format": FORMAT} | state, indent=2) + "\n")


def read_state(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ``write_state`` wrote; tensors on the CPU.

    Raises:
        DataError: unreadable, or of another format.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        training = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes can raise anything
        raise DataError(f"checkpoint {folder} is damaged: {error}; use an earlier one") from error
    if state.get("format") != FORMAT:
        raise DataError(
            f"checkpoint {folder} has format {state.get('format')}, this version reads {FORMAT}; "
            "load it with the version that wrote it"
        )
    return state, training
