"""Files of the embedded engine's checkpoint beside the model.

model/        weights and tokenizer, as AutoModelForCausalLM and AutoTokenizer read them (LoRA: merged)
adapter/      the LoRA adapters alone, where there are any
training.pt   optimizer state and float32 masters
state.json    policy version and format
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from backtalk.errors import DataError

FORMAT = 1


def write_state(folder: Path, state: dict[str, Any], training: dict[str, Any]) -> None:
    """Write ``state.json`` and ``training.pt``."""
    torch.save(training, folder / "training.pt")
    (folder / "state.json").write_text(json.dumps({"format": FORMAT} | state, indent=2) + "\n")


def read_state(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what ``write_state`` wrote; tensors on the CPU.

    Raises:
        DataError: no checkpoint, an unreadable one, or one of another format.
    """
    if not (folder / "state.json").is_file():
        raise DataError(f"{folder} holds no checkpoint: no state.json; pass a folder that an engine's save() wrote")
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
