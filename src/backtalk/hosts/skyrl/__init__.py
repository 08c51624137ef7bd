"""SkyRL as a host: its ``RayPPOTrainer`` with the world-model term. docs/skyrl.md says how it is used.

    from backtalk.hosts.skyrl import EchoExperiment, echo_config

Raises ConfigError on import where SkyRL is not installed.
"""

from __future__ import annotations

from backtalk.errors import ConfigError
from backtalk.hosts.skyrl.version import moved

try:
    from backtalk.hosts.skyrl.experiment import EchoExperiment, echo_config
    from backtalk.hosts.skyrl.generator import RolloutGenerator, TaskPrompts
    from backtalk.hosts.skyrl.loss import register_losses
    from backtalk.hosts.skyrl.trainer import EchoTrainer
except ImportError as error:
    missing, _, inner = (error.name or "").partition(".")
    if missing == "backtalk":
        raise
    if missing == "skyrl" and (inner or not isinstance(error, ModuleNotFoundError)):
        raise ConfigError(moved(str(error))) from error
    raise ConfigError(
        f"the SkyRL host needs {error.name}, which is not installed; type: pip install 'backtalk[skyrl]' (Python 3.12 "
        "or later), as docs/skyrl.md says for GPUs; scripts/skyrl makes an environment of what runs without one"
    ) from error

__all__ = ["EchoExperiment", "EchoTrainer", "RolloutGenerator", "TaskPrompts", "echo_config", "register_losses"]
