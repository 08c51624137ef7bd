"""TRL as a host: its ``GRPOTrainer`` with the world-model term. docs/trl.md has the three uses.

    from backtalk.hosts.trl import EchoGRPOTrainer

Raises ConfigError on import where TRL is not installed.
"""

from __future__ import annotations

from backtalk.errors import ConfigError

try:
    from backtalk.hosts.trl.trainer import EchoGRPOTrainer
    from backtalk.hosts.trl.worlds import WorldRollouts
except ModuleNotFoundError as error:
    if error.name not in ("trl", "datasets", "accelerate"):
        raise
    raise ConfigError(
        f"the TRL host needs {error.name}, which is not installed; type: pip install 'backtalk[trl]'"
    ) from error

__all__ = ["EchoGRPOTrainer", "WorldRollouts"]
