"""An episode on a server that speaks OpenEnv: OpenEnv's own Agent World Model environment, or ours."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from backtalk.envs.awm.config import AwmConfig
from backtalk.envs.awm.session import Answer
from backtalk.envs.openenv import OpenEnvConfig, OpenEnvSession, OpenEnvWorld, Result, connect
from backtalk.envs.openenv.actions import mcp_actions
from backtalk.errors import InfrastructureError
from backtalk.messages import ToolSpec


def remote_world(url: str, config: AwmConfig) -> OpenEnvWorld:
    """The server's sessions: who waits for a place, and what is tried twice."""
    # The server ends a call after its own 30 s; this end waits longer than that for it to say so.
    timeout_s = 2 * config.call_timeout_s
    return OpenEnvWorld(url, OpenEnvConfig(actions="tools", step_timeout_s=timeout_s, headers=config.headers))


class RemoteSession:
    """An episode on a server (a ``Session``). ``arguments`` are those of its reset: scenario, task_idx, seed.

    Raises:
        InfrastructureError: the server died, stalled, or answers something else than this environment.
    """

    def __init__(self, world: OpenEnvWorld, arguments: Mapping[str, Any]) -> None:
        self._world, self._arguments = world, arguments
        self._session: OpenEnvSession | None = None
        self.tools: tuple[ToolSpec, ...] = ()

    async def start(self) -> Answer:
        self._session, result = await self._world.begin(self._arguments)
        answer = _answer(result)
        if answer.reward_type == "reset_ok":
            self.tools = tuple(action.tool for action in mcp_actions(await self._session.list_tools()))
        return answer

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> Answer:
        if self._session is None:
            raise InfrastructureError("no episode was begun on the server; call start first")
        return _answer(await self._session.call_tool(tool, arguments))

    async def close(self) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            await self._world.end(session)


def list_remote(url: str, headers: Mapping[str, str]) -> list[dict[str, Any]]:
    """The scenarios of a server: name, description, tasks. Blocks, and works inside a running loop too.

    Raises:
        InfrastructureError: nobody answers there, or it is another environment.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, _list(url, headers)).result()


async def _list(url: str, headers: Mapping[str, str]) -> list[dict[str, Any]]:
    session = await connect(url, headers=headers)
    try:
        answer = await session.call_tool("__list_scenarios__", {})
    finally:
        await session.close()
    scenarios = answer.observation.get("scenarios")
    if not isinstance(scenarios, list):
        said = json.dumps(answer.observation)[:300]
        raise InfrastructureError(
            f"the server at {url} lists no scenarios, so it is no Agent World Model environment; it said {said}"
        )
    return scenarios


def _answer(result: Result) -> Answer:
    return Answer(result.observation, result.reward, result.done)
