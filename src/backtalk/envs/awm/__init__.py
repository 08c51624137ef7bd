"""The Agent World Model environment: tools over an SQLite database, in this process, in sandboxes or on a server."""

from backtalk.envs.awm.config import AwmConfig
from backtalk.envs.awm.env import AwmEnv
from backtalk.envs.awm.files import Scenario, ScenarioTask, read_scenarios, write_scenario
from backtalk.envs.awm.world import AwmWorld, awm_tasks

__all__ = [
    "AwmConfig",
    "AwmEnv",
    "AwmWorld",
    "Scenario",
    "ScenarioTask",
    "awm_tasks",
    "read_scenarios",
    "write_scenario",
]
