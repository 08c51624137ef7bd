"""The environment of one rollout on an OpenEnv server, and the world that opens such environments."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from backtalk.envs.base import Step, WorldReport, warning_step
from backtalk.envs.openenv.config import OpenEnvConfig
from backtalk.envs.openenv.messages import (
    Action,
    is_tool_environment,
    mcp_actions,
    observation_parts,
    typed_actions,
)
from backtalk.envs.openenv.server import find_server, get_json
from backtalk.envs.openenv.session import PROTOCOL, OpenEnvError, OpenEnvRefusal, OpenEnvSession, Result, connect
from backtalk.envs.openenv.tasks import openenv_tasks
from backtalk.messages import Message, Part, ToolCall, ToolSpec
from backtalk.sandboxes.base import arrival
from backtalk.tasks.task import Split, Task
from backtalk.trajectory import TokenRole

log = logging.getLogger(__name__)

# Codes of OpenEnv's errors.
BAD_ARGUMENTS, EXCEPTION, SERVER_FULL = "VALIDATION_ERROR", "EXECUTION_ERROR", "CAPACITY_REACHED"
RETRY_S = 0.2  # before asking again for a session or a connection


class OpenEnvEnv:
    """The environment of one rollout, in one session (an ``Env``)."""

    def __init__(self, task: Task, world: OpenEnvWorld) -> None:
        self.task, self._world, self._config = task, world, world.config
        self._session: OpenEnvSession | None = None
        self._actions: dict[str, Action] = {}
        self._rewards: list[float] = []  # of the steps that gave one
        self._final: float | None = None  # of the step that ended the rollout

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        return tuple(action.tool for action in self._actions.values())

    async def reset(self) -> tuple[Message, ...]:
        """Open a session and reset it. The first observation is part of the prompt, so nothing in it is a target.

        Raises:
            OpenEnvError: the server broke, or the environment is done before the first step.
        """
        arguments = {**self._config.reset, **self.task.metadata.get("reset", {})}
        self._session, result = await self._world.open_session(arguments)
        if result.done:
            raise OpenEnvError(f"the server at {self._session.url} says done to reset({arguments}); nothing to play")
        actions = self._world.actions or mcp_actions(await self._session.list_tools())
        self._actions = {action.tool.name: action for action in actions}
        parts, _ = observation_parts(result.observation, self._config.roles, self._config.max_observation_chars)
        texts = (self.task.instruction.strip(), "".join(part.text for part in parts))
        prompt = "\n\n".join(text for text in texts if text) or "Begin."
        roles = (("system", self._config.system_prompt), ("user", prompt))
        return tuple(Message(role, (Part(text, TokenRole.CONTEXT),)) for role, text in roles if text)

    async def step(self, call: ToolCall) -> Step:
        """Take the action. If the environment's schema refuses it, the observation says so, as a WARNING.

        Raises:
            OpenEnvError: the server died, stalled or broke the protocol; or the environment raised, see ``exceptions``.
        """
        action = self._actions.get(call.tool)
        if action is None or self._session is None:
            return warning_step(call, f"[unknown tool {call.tool}; the tools are {', '.join(self._actions)}]")
        try:
            if action.fixed is None:
                result = await self._session.call_tool(call.tool, call.arguments)
            else:
                result = await self._session.step({**action.fixed, **call.arguments})
        except OpenEnvRefusal as refusal:
            if refusal.code == BAD_ARGUMENTS:
                return warning_step(call, f"[{call.tool} was refused: {_validation_errors(refusal.data)}]")
            if refusal.code != EXCEPTION or self._config.exceptions == "fail":
                raise
            result = Result({"error": refusal.data.get("message", "")}, None, False)
        if result.reward is not None:
            self._rewards.append(result.reward)
        self._final = result.reward if result.done else None
        parts, cut = observation_parts(result.observation, self._config.roles, self._config.max_observation_chars)
        parts = parts or (Part("[no output]", TokenRole.WARNING),)
        return Step((Message("tool", parts, tool=call.tool),), done=result.done, truncated=cut)

    async def score(self) -> float | None:
        """Return the reward by the rule ``score`` from those of the steps; ``unfinished`` where there are none."""
        if self.task.world_model_only:
            return None
        if self._config.score == "done":
            return self._config.unfinished if self._final is None else self._final
        if not self._rewards:
            return self._config.unfinished
        rule = {"sum": math.fsum, "last": lambda rewards: rewards[-1], "max": max}[self._config.score]
        return rule(self._rewards)

    async def close(self) -> None:
        if self._session is not None:
            await self._world.close_session(self._session)


class OpenEnvWorld:
    """Sessions on one OpenEnv server, which is started here unless ``location`` is a URL (a ``World``).

    Raises:
        ConfigError: there is no such server, or its actions cannot be offered as tools.
        OpenEnvError: it could not be started, or does not answer.
    """

    def __init__(self, location: str, config: OpenEnvConfig) -> None:
        self.config, self._location, self._server = config, location, find_server(location, config)
        try:
            self._url = self._server.start()
            self.actions = self._find_actions()
        except BaseException:
            self._server.stop()
            raise
        self._starting, self._slot_freed = asyncio.Lock(), asyncio.Condition()
        self._num_open, self._max_open = 0, math.inf  # sessions; the server tells its limit when it is reached

    @property
    def report(self) -> WorldReport:
        tools = ", ".join(action.tool.name for action in self.actions or ()) or "its own tools"
        return WorldReport(f"OpenEnv environment {self._server.name} at {self._url} ({tools})")

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        return openenv_tasks(self._location, self.config, split=split, count=count, seed=seed)

    @asynccontextmanager
    async def open(self, task: Task) -> AsyncIterator[OpenEnvEnv]:
        env = OpenEnvEnv(task, self)
        try:
            yield env
        finally:
            await env.close()

    async def close(self) -> None:
        """Stop the server, if it was started here."""
        await asyncio.to_thread(self._server.stop)

    async def open_session(self, arguments: Mapping[str, Any]) -> tuple[OpenEnvSession, Result]:
        """Open a session and reset it, as soon as the server plays fewer than it can.

        Raises:
            OpenEnvError: the server does not answer, or could not reset.
        """
        rollout = arrival.get()
        try:
            while True:
                async with self._slot_freed:
                    if self._num_open >= self._max_open:
                        rollout.wait()
                    await self._slot_freed.wait_for(lambda: self._num_open < self._max_open)
                    self._num_open += 1
                session = None
                try:
                    session = await self._connect()
                    return session, await session.reset(**arguments)
                except BaseException as error:
                    await self.close_session(session)
                    if not isinstance(error, OpenEnvRefusal):
                        raise
                    if error.code != SERVER_FULL:
                        raise OpenEnvError(f"{error}{self._server.log_tail()}") from error
                    rollout.wait()
                    self._limit_sessions(error.data.get("max_sessions"))
                await asyncio.sleep(RETRY_S)  # the server frees a closed session's place a moment later
        finally:
            rollout.go_on()

    async def close_session(self, session: OpenEnvSession | None) -> None:
        """Close a session, or one that failed to open, and let the next rollout have its place."""
        try:
            if session is not None:
                await session.close()
        finally:
            async with self._slot_freed:
                self._num_open -= 1
                self._slot_freed.notify()

    def _limit_sessions(self, limit: Any) -> None:
        """Open no more sessions than the server has said it plays at the same time; further rollouts wait here."""
        if self._max_open == math.inf:
            log.warning(
                "%s at %s plays %s sessions at once, so further rollouts wait; raise max_concurrent_envs in its "
                "create_app, or lower rollout.concurrency",
                *(self._server.name, self._url, limit),
            )
        self._max_open = limit if isinstance(limit, int) and limit > 0 else max(1, self._num_open)

    async def _connect(self) -> OpenEnvSession:
        """Open a connection. A server that has died is started again; a failure to connect is retried once."""
        for retry in (True, False):
            try:
                async with self._starting:
                    self._url = await asyncio.to_thread(self._server.start)
                return await connect(
                    self._url,
                    step_timeout_s=self.config.step_timeout_s,
                    headers=self.config.headers,
                    log_tail=self._server.log_tail,
                )
            except OpenEnvError as error:
                if not retry:
                    raise
                log.warning("%s; trying once more", error)
                await asyncio.sleep(RETRY_S)
        raise AssertionError("unreachable")

    def _find_actions(self) -> tuple[Action, ...] | None:
        if self.config.actions == "tools":
            return None
        timeout_s = self.config.step_timeout_s
        schema = get_json(f"{self._url}/schema", timeout_s=timeout_s, headers=self.config.headers)
        action = schema.get("action") if isinstance(schema, dict) else None
        if not isinstance(action, dict):
            raise OpenEnvError(f"{self._url}/schema names no action schema; spoken here is {PROTOCOL}")
        if self.config.actions == "auto" and is_tool_environment(action):
            return None
        return typed_actions(action, self.config.tool)


def _validation_errors(data: Mapping[str, Any]) -> str:
    """Return the first three faults that the server found in an action, by field."""
    errors = data.get("errors")
    found = [error for error in errors if isinstance(error, Mapping)] if isinstance(errors, list) else []
    faults = [f"{'.'.join(map(str, e.get('loc', ())))}: {e.get('msg', 'not valid')}" for e in found[:3]]
    return "; ".join(faults) or str(data.get("message", "not valid"))
