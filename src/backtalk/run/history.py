"""Check that the histories that a run asks for fit the positions that its model has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from backtalk.errors import ConfigError
from backtalk.language.tokenizer import longest_history, model_location
from backtalk.rollout.limits import RolloutLimits
from backtalk.run.config import TrainConfig


def fit_history(config: TrainConfig, on_notice: Callable[[str], None]) -> TrainConfig:
    """Return the settings with ``rollout.max_tokens`` within the model's positions, where its files tell them.

    The default is lowered, and ``on_notice`` told; other numbers are what somebody wants.

    Raises:
        ConfigError: the number was set, and the model has fewer positions.
    """
    model = getattr(config.engine, "model", None)
    if getattr(config.engine, "kind", None) != "torch" or not isinstance(model, str):
        return config  # another engine knows its own models
    asked, longest = config.rollout.max_tokens, longest_history(model_location(model))
    if longest is None or asked <= longest:
        return config
    if asked == RolloutLimits().max_tokens:
        on_notice(f"model {model} has positions for {longest} tokens: histories end there, not at {asked}")
        return replace(config, rollout=replace(config.rollout, max_tokens=longest))
    raise ConfigError(
        f"rollout.max_tokens={asked}, and model {model} has positions for {longest} tokens, so longer histories mean "
        f"nothing to it; use --set rollout.max_tokens={longest}, or another model"
    )
