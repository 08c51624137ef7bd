"""A server of these worlds over OpenEnv: ``uvicorn backtalk.envs.awm.server:app``.

It answers as OpenEnv's own Agent World Model environment does, without a process for each episode. The variable
AWM_DATA_DIR names a folder of scenarios; without it, the shop and the ticket desk are served. Their programs run inside
the server. A reset takes ``scenario`` and ``task_idx``; for the shop also ``seed``, which fills it anew.
"""

from __future__ import annotations

import os
from typing import Any

from backtalk.envs.awm.library import Library, open_library
from backtalk.envs.awm.session import Answer, LocalSession
from backtalk.errors import ConfigError, DataError
from backtalk.messages import ToolSpec

MAX_EPISODES = 256  # at once


def served_library() -> Library:
    folder = os.environ.get("AWM_DATA_DIR")
    if folder:
        return open_library(folder)
    return Library({**open_library("shop").scenarios, **open_library("tickets").scenarios}, shipped=True)


class Episodes:
    """The episodes of one connection, one at a time: what a server does with each message."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._session: LocalSession | None = None

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        return self._session.tools if self._session else ()

    async def begin(self, scenario: str | None, task_idx: int | None, seed: int | None) -> Answer:
        self.release()
        if not scenario:
            return _error("reset_error", "a reset needs the argument scenario")
        try:
            self._session = self._library.session(scenario, task_idx=task_idx, seed=seed)
        except (DataError, ConfigError) as error:
            return _error("reset_error", str(error))
        return await self._session.start()

    async def call(self, tool: str, arguments: dict[str, Any]) -> Answer:
        if tool == "__list_scenarios__":
            listed = self._library.listed()
            return Answer({"reward_type": "tool_call_ok", "scenarios": listed, "total": len(listed)})
        if self._session is None:
            return _error("server_error", "no episode was begun; reset the environment first")
        return await self._session.call(tool, arguments)

    def release(self) -> None:
        if self._session is not None:
            self._session.release()
            self._session = None


def make_app(library: Library | None = None) -> Any:
    """The FastAPI app of an OpenEnv server.

    Raises:
        ConfigError: OpenEnv is not installed.
    """
    try:
        from fastmcp import FastMCP
        from openenv.core.env_server import create_app
        from openenv.core.env_server.mcp_environment import MCPEnvironment
        from openenv.core.env_server.mcp_types import ListToolsAction, ListToolsObservation, Tool
        from openenv.core.env_server.types import Action, Observation, State
        from pydantic import ConfigDict
    except ImportError as error:
        raise ConfigError(f"the server is built with OpenEnv: pip install 'backtalk[awm,openenv]' ({error})") from error
    offered = library or served_library()

    class AwmObservation(Observation):
        """Whatever an answer holds; keys that hold nothing are left out, as clients tell answers apart by them."""

        model_config = ConfigDict(extra="allow")

        def model_dump(self, **kwargs: Any) -> dict[str, Any]:
            return super().model_dump(**{"exclude_none": True, **kwargs})

    def observation(answer: Answer) -> AwmObservation:
        return AwmObservation(**{**answer.observation, "reward": answer.reward, "done": answer.done})

    class AwmEnvironment(MCPEnvironment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def __init__(self) -> None:
            super().__init__(FastMCP("agent-world-model"))  # tools differ by scenario, so they are answered here
            self._episodes, self._state = Episodes(offered), State()

        async def reset_async(self, seed: Any = None, episode_id: Any = None, **kwargs: Any) -> Observation:
            self._state = State(episode_id=episode_id, step_count=0)
            return observation(await self._episodes.begin(kwargs.get("scenario"), kwargs.get("task_idx"), seed))

        async def step_async(self, action: Any, timeout_s: float | None = None, **kwargs: Any) -> Observation:
            self._state.step_count += 1
            if not isinstance(action, ListToolsAction):
                return observation(await self._episodes.call(action.tool_name, action.arguments))
            tools = self._episodes.tools
            listed = [Tool(name=t.name, description=t.description, input_schema=dict(t.parameters)) for t in tools]
            return ListToolsObservation(tools=listed)

        reset = _step_impl = _only_async

        @property
        def state(self) -> State:
            return self._state

        def close(self) -> None:
            self._episodes.release()
            super().close()

    return create_app(AwmEnvironment, Action, AwmObservation, "agent_world_model", max_concurrent_envs=MAX_EPISODES)


def _only_async(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("episodes are asynchronous; await reset_async and step_async")


def _error(kind: str, said: str) -> Answer:
    return Answer({"reward_type": kind, "error": said})


def __getattr__(name: str) -> Any:
    """``app`` is made when a server asks for it: OpenEnv takes seconds to import."""
    if name == "app":
        return make_app()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
