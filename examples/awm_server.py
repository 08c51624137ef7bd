"""A server of Agent World Model scenarios over OpenEnv: ``uvicorn --factory examples.awm_server:make_app``.

It answers as OpenEnv's own Agent World Model environment does, from a single process. The variable AWM_DATA_DIR names
a folder of scenarios; without it, the shop and the ticket desk are served. Their programs run inside the server. A
reset takes ``scenario`` and ``task_idx``; for the shop also ``seed``, which generates its products and task.
"""

from __future__ import annotations

import os
from typing import Any

from backtalk.envs.awm.session import LocalSession, Result
from backtalk.envs.awm.world import LocalScenarios, open_scenarios
from backtalk.errors import ConfigError, DataError

MAX_SESSIONS = 256  # open at the same time


def make_app() -> Any:
    """Return the FastAPI app of an OpenEnv server.

    Raises:
        ConfigError: OpenEnv is not installed.
    """
    try:
        from openenv.core.env_server import create_app
        from openenv.core.env_server.types import Action
    except ImportError as error:
        raise ConfigError(f"the server is built with OpenEnv: pip install 'backtalk[awm,openenv]' ({error})") from error
    if folder := os.environ.get("AWM_DATA_DIR"):
        scenarios = open_scenarios(folder)
    else:
        shipped = {**open_scenarios("shop").scenarios, **open_scenarios("tickets").scenarios}
        scenarios = LocalScenarios(shipped, shipped=True)
    observation = _observation_class()
    environment = _environment_class(scenarios, observation)
    return create_app(environment, Action, observation, "agent_world_model", max_concurrent_envs=MAX_SESSIONS)


def _observation_class() -> type:
    from openenv.core.env_server.types import Observation
    from pydantic import ConfigDict

    class AwmObservation(Observation):
        """The fields of a ``Result``. Empty ones are left out: clients tell observations apart by their fields."""

        model_config = ConfigDict(extra="allow")

        def model_dump(self, **kwargs: Any) -> dict[str, Any]:
            return super().model_dump(**{"exclude_none": True, **kwargs})

    return AwmObservation


def _environment_class(scenarios: LocalScenarios, observation_class: type) -> type:
    """Return a class of OpenEnv environments; the server makes one for each connection."""
    from fastmcp import FastMCP
    from openenv.core.env_server.mcp_environment import MCPEnvironment
    from openenv.core.env_server.mcp_types import ListToolsAction, ListToolsObservation, Tool
    from openenv.core.env_server.types import State

    def observation(result: Result) -> Any:
        return observation_class(**{**result.observation, "reward": result.reward, "done": result.done})

    class AwmEnvironment(MCPEnvironment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def __init__(self) -> None:
            super().__init__(FastMCP("agent-world-model"))  # lists no tools: they differ by scenario
            self._session: LocalSession | None = None
            self._state = State()

        async def reset_async(self, seed: Any = None, episode_id: Any = None, **kwargs: Any) -> Any:
            self._state = State(episode_id=episode_id, step_count=0)
            self._release()
            if not (scenario := kwargs.get("scenario")):
                return observation(_error("reset_error", "a reset needs the argument scenario"))
            try:
                self._session = scenarios.session(scenario, task_idx=kwargs.get("task_idx"), seed=seed)
            except (DataError, ConfigError) as error:
                return observation(_error("reset_error", str(error)))
            return observation(await self._session.start())

        async def step_async(self, action: Any, timeout_s: float | None = None, **kwargs: Any) -> Any:
            self._state.step_count += 1
            if isinstance(action, ListToolsAction):
                tools = self._session.tools if self._session else ()
                listed = [Tool(name=t.name, description=t.description, input_schema=dict(t.parameters)) for t in tools]
                return ListToolsObservation(tools=listed)
            if action.tool_name == "__list_scenarios__":
                rows = scenarios.listed()
                return observation(Result({"reward_type": "tool_call_ok", "scenarios": rows, "total": len(rows)}))
            if self._session is None:
                return observation(_error("server_error", "no episode was begun; reset the environment first"))
            return observation(await self._session.call(action.tool_name, action.arguments))

        reset = _step_impl = _only_async
        state = property(lambda self: self._state)

        def close(self) -> None:
            self._release()
            super().close()

        def _release(self) -> None:
            if self._session is not None:
                self._session.release()
                self._session = None

    return AwmEnvironment


def _only_async(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("this environment is asynchronous; await reset_async and step_async")


def _error(kind: str, message: str) -> Result:
    return Result({"reward_type": kind, "error": message})
