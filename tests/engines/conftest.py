"""Fixtures of the engine tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sampler_play import SMALL, sharpen
from tiny import tiny_model_dir


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tiny_model_dir(tmp_path_factory.mktemp("models") / "tiny")
    return sharpen(AutoModelForCausalLM.from_pretrained(folder))


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    return sharpen(LlamaForCausalLM(LlamaConfig(**SMALL)))
