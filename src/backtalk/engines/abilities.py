"""What an engine must be able to do for options of the objective."""

from __future__ import annotations

from backtalk.engines.base import Engine
from backtalk.errors import ConfigError
from backtalk.objective.coefficient import Share
from backtalk.objective.config import NO_KEPT_HEAD, NO_PROJECTION, NO_SHARE, ObjectiveConfig


def check_objective(engine: Engine, objective: ObjectiveConfig) -> None:
    """Raise ConfigError for options that an engine cannot keep, by its attributes.

    ``measures_gradients`` says that it measures both terms' gradients, ``applies_head`` that it applies the output
    embedding itself. An engine without such an attribute cannot.
    """
    measures = getattr(engine, "measures_gradients", False)
    if isinstance(objective.world_model_coeff, Share) and not measures:
        raise ConfigError(NO_SHARE)
    if objective.world.conflict == "project" and not measures:
        raise ConfigError(NO_PROJECTION)
    if objective.world.head == "keep" and not getattr(engine, "applies_head", False):
        raise ConfigError(NO_KEPT_HEAD)
