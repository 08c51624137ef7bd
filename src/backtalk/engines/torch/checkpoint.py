"""Read the checkpoint folders of the embedded engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from backtalk.errors import DataError

FORMAT = 1


def read_checkpoint(folder: Path, lora_rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content of state.json and of training.pt in a checkpoint.

    Raises:
        DataError: it is none, is damaged, of another format, or of adapters of another rank.
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
    if state["lora_rank"] != lora_rank:
        raise DataError(
            f"checkpoint {folder} has lora_rank={state['lora_rank']}, this engine "
            f"{lora_rank}; use the value it was trained with"
        )
    return state, training
