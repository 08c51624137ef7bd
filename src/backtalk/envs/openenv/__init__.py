"""An environment on any OpenEnv server; documented in docs/openenv.md."""

from backtalk.envs.openenv.config import OpenEnvConfig
from backtalk.envs.openenv.env import OpenEnvEnv, OpenEnvWorld
from backtalk.envs.openenv.session import OpenEnvError, OpenEnvRefusal, OpenEnvSession, Result, connect
from backtalk.envs.openenv.tasks import openenv_tasks

__all__ = [
    "OpenEnvConfig",
    "OpenEnvEnv",
    "OpenEnvError",
    "OpenEnvRefusal",
    "OpenEnvSession",
    "OpenEnvWorld",
    "Result",
    "connect",
    "openenv_tasks",
]
