"""An author as a sampler, so that the rollout of training records what it does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from backtalk.capture.author import Author, Left, Reply, Seen
from backtalk.envs.base import Env, Step
from backtalk.errors import RenderError
from backtalk.language.renderer import Renderer
from backtalk.language.tool_formats.values import call_problem
from backtalk.messages import Message, Part, ToolCall, ToolSpec
from backtalk.rollout.limits import RolloutLimits
from backtalk.rollout.rollout import EnvFactory, run_rollout
from backtalk.rollout.sampler import Completion
from backtalk.tasks.task import Task
from backtalk.trajectory import StopReason, TokenRole, Trajectory


async def capture_episode(
    task: Task,
    open_env: EnvFactory,
    author: Author,
    renderer: Renderer,
    limits: RolloutLimits,
    *,
    sample_index: int = 0,
) -> Trajectory:
    """One episode, as ``run_rollout`` records it.

    An action that was not sampled as the ids it has here (a script's, a person's, a text tokenised anew) has no
    logprobs, as in imported trajectories, so that nobody trains the policy term on it. Where the author left, the
    episode ends as ``max_turns`` and has no reward. Nothing is tried again: an author has heard the beginning.
    """
    limits = replace(limits, max_retries=0)
    stage = _Stage(author, renderer, limits.max_tokens_per_turn)
    trajectory = await run_rollout(
        task,
        stage.watching(open_env),
        stage,
        renderer,
        limits,
        sample_index=sample_index,
        key=f"capture/{sample_index}",
    )
    if stage.author_left and trajectory.failure is not None:
        return replace(trajectory, stop_reason=StopReason.MAX_TURNS, failure=None)
    return trajectory


@dataclass(slots=True)
class _Stage:
    """A ``Sampler`` and its one session, which hears what the world says from the environment that it watches."""

    author: Author
    renderer: Renderer
    max_tokens: int
    tools: tuple[ToolSpec, ...] = ()
    said: list[Message] = field(default_factory=list)  # since the last reply
    author_left: bool = False
    policy_version: int = 0

    def watching(self, open_env: EnvFactory) -> EnvFactory:
        @asynccontextmanager
        async def opened(task: Task) -> AsyncIterator[Env]:
            async with open_env(task) as env:
                yield _Watched(env, self)

        return opened

    @asynccontextmanager
    async def session(self, key: str) -> AsyncIterator[_Stage]:
        yield self

    async def sample(self, token_ids: Sequence[int], max_tokens: int | None = None) -> Completion:
        room = self.max_tokens if max_tokens is None else max_tokens
        renderer = self.renderer.for_tools(self.tools)
        messages, self.said = tuple(self.said), []
        seen = Seen(
            tools=self.tools,
            messages=messages,
            token_ids=tuple(token_ids),
            stop_token_ids=renderer.stop_token_ids,
            max_tokens=room,
        )
        try:
            reply = await self.author.reply(seen)
        except Left:
            self.author_left = True
            raise
        completion = reply.sampled or _written(reply, renderer, room)
        action = renderer.parse_action(completion.token_ids, completion.stopped)
        told = action.error or action.notice  # what the rollout answers itself; the environment never hears of it
        if action.error and reply.call is not None and (wrong := call_problem(reply.call, self.tools)):
            told = told if wrong in told else f"[{wrong}]\n{told}"  # it called a tool, and knows nothing of our format
        self.said += [Message("tool", (Part(told, TokenRole.WARNING),))] if told else []
        return completion


def _written(reply: Reply, renderer: Renderer, room: int) -> Completion:
    """A reply in the renderer's own tokens, which nobody sampled.

    A call that the format cannot hold, as a number where its tags hold text, is spelled out, which is no call.
    """
    try:
        call = None if reply.call is None else renderer.encode_action(reply.call, reply.text)
    except RenderError:
        call = renderer.encode_message(reply.text, (reply.call,) if reply.call else ())
    ids = renderer.encode_message(reply.text) if call is None else call
    kept = ids[:-1][:room] if reply.cut else ids[:room]
    return Completion(kept, None, stopped=not reply.cut and len(kept) == len(ids))


class _Watched:
    """An environment whose words the stage hears."""

    def __init__(self, env: Env, stage: _Stage) -> None:
        self._env, self._stage = env, stage

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        return self._env.tools

    async def reset(self) -> tuple[Message, ...]:
        messages = await self._env.reset()
        self._stage.tools, self._stage.said = self._env.tools, list(messages)
        return messages

    async def step(self, call: ToolCall) -> Step:
        step = await self._env.step(call)
        self._stage.said += step.messages
        return step

    async def score(self) -> float | None:
        return await self._env.score()
