"""The Agent World Model: worlds of tools over SQLite, in this process or on a server. docs/awm.md."""

from backtalk.envs.awm.config import AwmConfig
from backtalk.envs.awm.env import AwmEnv
from backtalk.envs.awm.files import Contents, Scenario, read_scenarios, write_scenario
from backtalk.envs.awm.world import AwmWorld, awm_tasks

__all__ = [
    "AwmConfig",
    "AwmEnv",
    "AwmWorld",
    "Contents",
    "Scenario",
    "awm_tasks",
    "read_scenarios",
    "write_scenario",
]
