"""Load a causal language model of transformers so that training and sampling give the same probabilities."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backtalk.errors import ConfigError


def resolve_device(device: str) -> torch.device:
    """Return the device of a name; ``auto`` is the first GPU where there is one, else the CPU.

    Raises:
        ConfigError: no such device, or no GPU.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r} is no device; use 'auto', 'cpu' or 'cuda'") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={device!r}, but this PyTorch sees no GPU; use 'auto' or 'cpu'")
    return chosen


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the type of a name; ``auto`` is bfloat16 on a GPU that has it, else float32."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return getattr(torch, dtype)


def load_model(location: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a model in eval mode with every dropout at 0, so that a token has one probability.

    Raises:
        ConfigError: not a readable causal language model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(location, dtype=dtype, trust_remote_code=False)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            if "trust_remote_code" in str(error):
                raise ConfigError(
                    f"model {location!r} is defined by Python code of its own (auto_map in config.json), which is not "
                    "run here; pass a model of an architecture that transformers has"
                ) from error
            raise ConfigError(
                f"model {location!r} cannot be loaded as a causal language model: {error}; its files may be cut off or "
                "of another kind, so fetch or save it again, or pass another model"
            ) from error
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.to(device).eval()


def enable_gradient_checkpointing(model: Any) -> None:
    """Make the model recompute activations in the backward pass; takes effect in training mode only."""
    if hasattr(model, "activation_checkpointing_enable"):  # its name in newer versions of transformers
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def add_lora(model: nn.Module, rank: int, seed: int) -> Any:
    """Add low-rank adapters (arXiv 2106.09685) to all linear layers but the head, and freeze the rest.

    Returns the peft model around ``model``, whose layers are replaced in place. The adapters are float32.

    Raises:
        ConfigError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError(
            f"lora_rank={rank} needs peft, which is not installed; pip install 'backtalk[lora]', or set lora_rank=0"
        ) from error
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft and transformers deprecate at their own pace
        torch.manual_seed(seed)
        return get_peft_model(model, config).eval()  # type: ignore[arg-type]


def save_merged(model: Any, folder: Path) -> None:
    """Write the weights of a model; those of a peft model with its adapters merged, which leaves it as it is."""
    with quiet_transformers():
        (copy.deepcopy(model).merge_and_unload() if hasattr(model, "peft_config") else model).save_pretrained(folder)


def load_adapter(peft_model: Any, folder: Path) -> None:
    """Load saved adapters into a peft model of the same shape; ValueError where they do not fit."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    result = set_peft_model_state_dict(peft_model, load_file(folder / "adapter_model.safetensors"))
    if result.unexpected_keys:
        raise ValueError(f"adapter weights that the model has no place for: {result.unexpected_keys[:3]}")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch off the progress bars of transformers inside the block."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()
