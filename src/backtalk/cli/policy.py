"""Find the policy that a command names: a run's checkpoint, or a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from backtalk.errors import ConfigError, DataError

if TYPE_CHECKING:
    from backtalk.run.config import TrainConfig


def policy_settings(
    folder: Path | None, model: str | None, base: bool, overrides: list[str]
) -> tuple[TrainConfig, Path | None]:
    """Return a run's settings and its checkpoint; for ``model``, those settings or the defaults, and no checkpoint.

    Raises:
        ConfigError: neither a run nor a model is named.
        DataError: the run has no checkpoint yet.
    """
    from backtalk.engines.checkpoint import find_checkpoint
    from backtalk.run.config import config_from_dict
    from backtalk.run.log import RunLog

    if folder is None and model is None:
        raise ConfigError("nothing says which policy to measure; name a RUN, or --model NAME")
    tree = {} if folder is None else RunLog(folder).read_config()
    checkpoint = None
    if folder is not None and model is None and not base:
        checkpoint = find_checkpoint(RunLog(folder).checkpoint_path)
        if checkpoint is None:
            raise DataError(f"{folder} has no checkpoint yet; wait for one, or take the model it began with (--base)")
    return config_from_dict(tree, overrides + ([f"engine.model={model}"] if model else [])), checkpoint
