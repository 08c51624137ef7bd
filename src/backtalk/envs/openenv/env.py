"""An episode in an OpenEnv environment, and the world that such episodes are opened in."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from backtalk.envs.base import Step, WorldReport
from backtalk.envs.openenv.actions import Action, is_tool_environment, mcp_actions, typed_actions
from backtalk.envs.openenv.config import OpenEnvConfig
from backtalk.envs.openenv.observe import observe
from backtalk.envs.openenv.server import get_json, server_for
from backtalk.envs.openenv.session import PROTOCOL, OpenEnvError, OpenEnvRefusal, OpenEnvSession, Result, connect
from backtalk.envs.openenv.tasks import openenv_tasks
from backtalk.messages import Message, Part, ToolCall, ToolSpec
from backtalk.sandboxes.places import arrival
from backtalk.tasks.task import Split, Task
from backtalk.trajectory import TokenRole

log = logging.getLogger(__name__)

BAD_ARGUMENTS = "VALIDATION_ERROR"
EXCEPTION = "EXECUTION_ERROR"
FULL = "CAPACITY_REACHED"
RETRY_S = 0.2  # between attempts to get a place or a connection


class OpenEnvEnv:
    """One episode of one task in one session (an ``Env``)."""

    def __init__(self, task: Task, world: OpenEnvWorld) -> None:
        self.task, self._world, self._config = task, world, world.config
        self._session: OpenEnvSession | None = None
        self._actions: dict[str, Action] = {}
        self._rewards: list[float] = []  # of the steps that gave one
        self._final: float | None = None  # of the step that ended the episode

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        return tuple(action.tool for action in self._actions.values())

    async def reset(self) -> tuple[Message, ...]:
        """Begin the episode. What the environment says to that belongs to the prompt, so nothing in it is a target.

        Raises:
            OpenEnvError: the server broke, or the episode is over before it began.
        """
        arguments = {**self._config.reset, **self.task.metadata.get("reset", {})}
        self._session, result = await self._world.begin(arguments)
        if result.done:
            raise OpenEnvError(f"the server at {self._session.url} says done to reset({arguments}); nothing to play")
        actions = self._world.actions or mcp_actions(await self._ask(self._session.list_tools()))
        self._actions = {action.tool.name: action for action in actions}
        parts, _ = observe(result.observation, self._config.roles, self._config.max_observation_chars)
        said = "".join(part.text for part in parts)
        texts = [self.task.instruction.strip(), said]
        user = Message("user", (Part("\n\n".join(text for text in texts if text) or "Begin.", TokenRole.CONTEXT),))
        if not self._config.system_prompt:
            return (user,)
        return (Message("system", (Part(self._config.system_prompt, TokenRole.CONTEXT),)), user)

    async def step(self, call: ToolCall) -> Step:
        """Take the action. One that the environment's schema refuses is told so, as a WARNING.

        Raises:
            OpenEnvError: the server died, stalled or answered nonsense; or the environment raised, see ``exceptions``.
        """
        action = self._actions.get(call.tool)
        if action is None or self._session is None:
            return _told(call, f"[unknown tool {call.tool}; the tools are {', '.join(self._actions)}]")
        try:
            if action.fixed is None:
                result = await self._ask(self._session.call_tool(call.tool, call.arguments))
            else:
                result = await self._ask(self._session.step({**action.fixed, **call.arguments}))
        except OpenEnvRefusal as refusal:
            if refusal.code == BAD_ARGUMENTS:
                return _told(call, f"[{call.tool} was refused: {_what_is_wrong(refusal.data)}]")
            if refusal.code != EXCEPTION or self._config.exceptions == "fail":
                raise
            result = Result({"error": refusal.data.get("message", "")}, None, False)
        if result.reward is not None:
            self._rewards.append(result.reward)
        self._final = result.reward if result.done else None
        parts, truncated = observe(result.observation, self._config.roles, self._config.max_observation_chars)
        parts = parts or (Part("[no output]", TokenRole.WARNING),)
        return Step((Message("tool", parts, tool=call.tool),), done=result.done, truncated=truncated)

    async def score(self) -> float | None:
        """The rewards of the steps by the rule ``score``; where that finds none, ``unfinished``."""
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
            await self._world.end(self._session)

    async def _ask(self, asking: Any) -> Any:
        """What the session answers; what breaks it is told with the end of the server's log."""
        try:
            return await asking
        except OpenEnvRefusal:
            raise
        except OpenEnvError as error:
            raise self._world.explained(error) from error


class OpenEnvWorld:
    """Sessions at one OpenEnv server, which is started here where that is ours to do (a ``World``).

    Raises:
        ConfigError: there is no such server, or its actions cannot be offered as tools.
        OpenEnvError: it could not be started, or does not answer.
    """

    def __init__(self, where: str, config: OpenEnvConfig) -> None:
        self.config, self._where, self._server = config, where, server_for(where, config)
        try:
            self._url = self._server.start()
            self.actions = self._find_actions()
        except BaseException:
            self._server.stop()
            raise
        self._starting, self._places = asyncio.Lock(), asyncio.Condition()
        self._open, self._most = 0, math.inf  # sessions here and now, and as far as the server has said

    @property
    def report(self) -> WorldReport:
        offered = ", ".join(action.tool.name for action in self.actions or ()) or "its own tools"
        return WorldReport(f"OpenEnv environment {self._server.name} at {self._url} ({offered})")

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        return openenv_tasks(self._where, self.config, split=split, count=count, seed=seed)

    def open(self, task: Task) -> AbstractAsyncContextManager[OpenEnvEnv]:
        return self._opened(task)

    async def close(self) -> None:
        """Stop the server, if it was started here."""
        await asyncio.to_thread(self._server.stop)

    async def begin(self, arguments: Mapping[str, Any]) -> tuple[OpenEnvSession, Result]:
        """A session that is reset, as soon as the server has a place for one.

        Raises:
            OpenEnvError: the server cannot be had, or could not reset.
        """
        rollout = arrival.get()
        try:
            while True:
                async with self._places:
                    if self._open >= self._most:
                        rollout.wait()
                    await self._places.wait_for(lambda: self._open < self._most)
                    self._open += 1
                session = None
                try:
                    session = await self._connect()
                    return session, await session.reset(**arguments)
                except BaseException as error:
                    await self.end(session)
                    if not isinstance(error, OpenEnvError):
                        raise
                    if not isinstance(error, OpenEnvRefusal) or error.code != FULL:
                        raise self.explained(error) from error
                    rollout.wait()
                    self._keep_within(error.data.get("max_sessions"))
                await asyncio.sleep(RETRY_S)  # the place of a session that was closed is free a moment later
        finally:
            rollout.go_on()

    async def end(self, session: OpenEnvSession | None) -> None:
        """Give a session's place to whoever waits for one."""
        try:
            if session is not None:
                await session.close()
        finally:
            async with self._places:
                self._open -= 1
                self._places.notify()

    def explained(self, error: OpenEnvError) -> OpenEnvError:
        return OpenEnvError(f"{error}{self._server.last_words()}")

    def _keep_within(self, most: Any) -> None:
        """The server has said how many sessions it plays at once: from now on the others wait here."""
        if self._most == math.inf:
            log.warning(
                "%s at %s plays %s sessions at once, so further attempts wait; raise max_concurrent_envs in its "
                "create_app, or lower rollout.concurrency",
                *(self._server.name, self._url, most),
            )
        self._most = most if isinstance(most, int) and most > 0 else max(1, self._open)

    @asynccontextmanager
    async def _opened(self, task: Task) -> AsyncIterator[OpenEnvEnv]:
        env = OpenEnvEnv(task, self)
        try:
            yield env
        finally:
            await env.close()

    async def _connect(self) -> OpenEnvSession:
        """A connection; a server that died meanwhile is started again, and one that hesitates is asked twice."""
        try:
            return await self._connect_once()
        except OpenEnvError as error:
            log.warning("%s; trying once more", error)
            await asyncio.sleep(RETRY_S)
            return await self._connect_once()

    async def _connect_once(self) -> OpenEnvSession:
        async with self._starting:
            self._url = await asyncio.to_thread(self._server.start)
        return await connect(self._url, step_timeout_s=self.config.step_timeout_s, headers=self.config.headers)

    def _find_actions(self) -> tuple[Action, ...] | None:
        """The typed actions, or None where tools are listed in each episode."""
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


def _told(call: ToolCall, text: str) -> Step:
    return Step((Message("tool", (Part(text, TokenRole.WARNING),), tool=call.tool),))


def _what_is_wrong(data: Mapping[str, Any]) -> str:
    """The faults that the server found in an action, by field."""
    errors = data.get("errors")
    found = [error for error in errors if isinstance(error, Mapping)] if isinstance(errors, list) else []
    faults = [f"{'.'.join(map(str, e.get('loc', ())))}: {e.get('msg', 'not valid')}" for e in found[:3]]
    return "; ".join(faults) or str(data.get("message", "not valid"))
