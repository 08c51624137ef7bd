"""Fixtures of the engine tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny import tiny_model_dir


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("models") / "tiny")
