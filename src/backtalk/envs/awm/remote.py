"""Plays rollouts on a server that speaks OpenEnv: OpenEnv's own Agent World Model environment, or Backtalk's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from backtalk.envs.awm.config import AwmConfig
from backtalk.envs.awm.session import Result
from backtalk.envs.openenv.config import OpenEnvConfig
from backtalk.envs.openenv.env import OpenEnvWorld
from backtalk.envs.openenv.messages import mcp_actions
from backtalk.envs.openenv.session import OpenEnvSession, connect
from backtalk.envs.openenv.session import Result as Answer
from backtalk.errors import InfrastructureError
from backtalk.messages import ToolSpec


class RemoteScenarios:
    """The scenarios of a server."""

    def __init__(self, url: str, config: AwmConfig) -> None:
        # The server ends a call after its own 30 s; this side waits longer, to receive the observation that says so.
        timeout_s = 2 * config.call_timeout_s
        self._reset = config.reset
        self._world = OpenEnvWorld(
            url, OpenEnvConfig(actions="tools", step_timeout_s=timeout_s, headers=config.headers)
        )

    def session(self, scenario: str, *, task_idx: int | None = None, seed: int | None = None) -> RemoteSession:
        """Return a rollout of a task that is not started yet."""
        chosen = {"scenario": scenario, "task_idx": task_idx, "seed": seed}
        arguments = {name: value for name, value in chosen.items() if value is not None}
        return RemoteSession(self._world, {**self._reset, **arguments})

    async def close(self) -> None:
        await self._world.close()


class RemoteSession:
    """A rollout on a server (a ``Session``). ``arguments`` are those of its reset: scenario, task_idx, seed.

    Raises:
        InfrastructureError: the server died, stalled, or is not an Agent World Model environment.
    """

    def __init__(self, world: OpenEnvWorld, arguments: Mapping[str, Any]) -> None:
        self._world, self._arguments = world, arguments
        self._session: OpenEnvSession | None = None
        self.tools: tuple[ToolSpec, ...] = ()

    async def start(self) -> Result:
        self._session, answer = await self._world.open_session(self._arguments)
        result = Result(answer.observation, answer.reward, answer.done)
        if result.reward_type == "reset_ok":
            self.tools = tuple(action.tool for action in mcp_actions(await self._session.list_tools()))
        return result

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> Result:
        if self._session is None:
            raise InfrastructureError("the rollout was not started; call start first")
        answer = await self._session.call_tool(tool, arguments)
        return Result(answer.observation, answer.reward, answer.done)

    async def close(self) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            await self._world.close_session(session)


def list_scenarios(url: str, headers: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the scenarios of a server: name, description, tasks. Blocks, and works inside a running event loop too.

    Raises:
        InfrastructureError: no server answers there, or it serves another environment.
    """

    async def ask() -> Answer:
        session = await connect(url, headers=headers)
        try:
            return await session.call_tool("__list_scenarios__", {})
        finally:
            await session.close()

    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(asyncio.run, ask()).result()
    scenarios = answer.observation.get("scenarios")
    if not isinstance(scenarios, list):
        raise InfrastructureError(
            f"the server at {url} lists no scenarios, so it is no Agent World Model environment; it said "
            f"{json.dumps(answer.observation)[:300]}"
        )
    return scenarios
