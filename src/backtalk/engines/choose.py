"""Choice of a run's engine: the class of its settings by ``engine.kind``, and the engine by its settings."""

from __future__ import annotations

from typing import Any

from backtalk.engines.base import CustomEngineConfig, Engine
from backtalk.engines.foundry.config import FoundryConfig
from backtalk.engines.tinker.config import TinkerConfig
from backtalk.engines.torch.config import TorchConfig
from backtalk.errors import ConfigError
from backtalk.settings import import_object

EngineConfig = TorchConfig | TinkerConfig | FoundryConfig | CustomEngineConfig


def engine_config_class(kind: Any) -> type[EngineConfig]:
    """Return the class of an engine's settings, which imports no engine, or else the user's own module.

    Raises:
        ConfigError: an unknown kind, or a path to something that opens no engine.
    """
    match kind:
        case "torch":
            return TorchConfig
        case "tinker":
            return TinkerConfig
        case "foundry":
            return FoundryConfig
        case str() if ":" in kind:
            found = import_object(kind, "engine.kind")
            if not isinstance(found, type) or not callable(getattr(found, "open", None)):
                raise ConfigError(
                    f"engine.kind={kind!r} names {found!r}, which opens no engine; name a dataclass of settings with a "
                    "method open(self, *, seed) that returns an Engine"
                )
            return found
        case _:
            raise ConfigError(
                f"engine.kind={kind!r} is no engine; use torch, tinker, foundry, or my_module:MyEngineConfig for "
                "one of your own"
            )


def open_engine(config: EngineConfig, *, seed: int = 0) -> Engine:
    """Import and return the engine that ``config`` describes."""
    match config:
        case TorchConfig():
            from backtalk.engines.torch.engine import TorchEngine

            return TorchEngine(config, seed=seed)
        case TinkerConfig():
            from backtalk.engines.remote.engine import RemoteEngine
            from backtalk.engines.tinker.sdk import connect

            return RemoteEngine(config, lambda: connect(config, seed=seed))
        case FoundryConfig():
            from backtalk.engines.foundry import sdk
            from backtalk.engines.remote.engine import RemoteEngine

            return RemoteEngine(config, lambda: sdk.connect(config, seed=seed))
        case _:
            return config.open(seed=seed)
