"""Which policy a command is about: a run's, or a model's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from backtalk.errors import ConfigError

if TYPE_CHECKING:
    from backtalk.config import TrainConfig


def policy_settings(
    folder: Path | None, model: str | None, base: bool, overrides: list[str]
) -> tuple[TrainConfig, Path | None]:
    """A run's settings and its checkpoint; or another model with them, or with the defaults, and no checkpoint."""
    from backtalk.config import config_from_dict
    from backtalk.runlog import RunLog
    from backtalk.settings import parse_overrides, set_dotted

    if folder is None and model is None:
        raise ConfigError("nothing says which policy to measure; name a RUN, or --model NAME")
    tree = {} if folder is None else RunLog(folder).read_config()
    for key, value in parse_overrides(overrides + ([f"engine.model={model}"] if model else [])).items():
        set_dotted(tree, key, value)
    checkpoint = None if folder is None or model is not None or base else RunLog(folder).checkpoint_path
    return config_from_dict(tree), checkpoint
