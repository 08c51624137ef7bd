"""Record a rollout that an ``Author`` plays, who is shown observations, replies with actions, and is our sampler."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from backtalk.envs.base import Env, Step
from backtalk.errors import RenderError, SamplerError
from backtalk.language.renderer import Renderer
from backtalk.language.tool_formats.values import call_problem
from backtalk.messages import Message, Part, ToolCall, ToolSpec
from backtalk.rollout.limits import RolloutLimits
from backtalk.rollout.rollout import EnvFactory, run_rollout
from backtalk.rollout.sampler import Completion, cut_after_calls
from backtalk.tasks.task import Task
from backtalk.trajectory import StopReason, TokenRole, Trajectory


class Left(SamplerError):
    """The author left before the end: the rollout ends there, without a reward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Input of an author: the tools, the messages since its last reply, and the whole conversation as token ids."""

    tools: tuple[ToolSpec, ...]
    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    stop_token_ids: frozenset[int]
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One action: text, and a call after it.

    ``sampled`` holds token ids instead, where a model sampled them from exactly the tokens it was shown and their
    logprobs are known; only such an action can be trained by the policy term.
    """

    text: str = ""
    call: ToolCall | None = None
    sampled: Completion | None = None
    cut: bool = False  # the text ended at a limit, not by itself


class Author(Protocol):
    """Player of one rollout; each rollout needs a new one."""

    async def reply(self, seen: Seen) -> Reply:
        """Return the next action.

        Raises:
            Left: there is none, because the author has gone.
            SamplerError: the author cannot be reached, and the rollout fails.
        """
        ...


async def capture_episode(
    task: Task,
    open_env: EnvFactory,
    author: Author,
    renderer: Renderer,
    limits: RolloutLimits,
    *,
    sample_index: int = 0,
) -> Trajectory:
    """Play one rollout, recorded by ``run_rollout``.

    An action that was not sampled as the ids it has here (a script's, a person's, a text tokenised anew) has no
    logprobs, as in imported trajectories, so that the policy term never trains it. Where the author left, the rollout
    ends as ``max_turns`` and has no reward. Nothing is retried, as an author has seen the beginning already.
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
    """A ``Sampler`` and its only session; it gets the environment's messages from the environment that it wraps."""

    author: Author
    renderer: Renderer
    max_tokens: int
    tools: tuple[ToolSpec, ...] = ()
    unseen: list[Message] = field(default_factory=list)  # since the last reply
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
        seen = Seen(
            tools=self.tools,
            messages=tuple(self.unseen),
            token_ids=tuple(token_ids),
            stop_token_ids=renderer.stop_token_ids,
            max_tokens=room,
        )
        self.unseen = []
        try:
            reply = await self.author.reply(seen)
        except Left:
            self.author_left = True
            raise
        completion = cut_after_calls(reply.sampled or _written(reply, renderer, room), renderer.action_end)
        action = renderer.parse_action(completion.token_ids, completion.stopped)
        told = action.error or action.notice  # what the rollout answers itself; the environment never hears of it
        if action.error and reply.call is not None and (wrong := call_problem(reply.call, self.tools)):
            told = told if wrong in told else f"[{wrong}]\n{told}"  # it called a tool, and knows nothing of our format
        self.unseen += [Message("tool", (Part(told, TokenRole.WARNING),))] if told else []
        return completion


def _written(reply: Reply, renderer: Renderer, room: int) -> Completion:
    """Return a reply in the renderer's own tokens, which nobody sampled.

    A call that the format cannot hold, such as a number in tags that hold text, is written as text, which is no call.
    """
    try:
        ids = renderer.encode_action(reply.call, reply.text) if reply.call else renderer.encode_message(reply.text)
    except RenderError:
        ids = renderer.encode_message(reply.text, (reply.call,) if reply.call else ())
    kept = ids[:-1][:room] if reply.cut else ids[:room]
    return Completion(kept, None, stopped=not reply.cut and len(kept) == len(ids))


class _Watched:
    """An environment whose messages the stage collects."""

    def __init__(self, env: Env, stage: _Stage) -> None:
        self._env, self._stage = env, stage

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        return self._env.tools

    @property
    def metrics(self) -> Mapping[str, float]:
        return getattr(self._env, "metrics", {})

    async def reset(self) -> tuple[Message, ...]:
        messages = await self._env.reset()
        self._stage.tools, self._stage.unseen = self._env.tools, list(messages)
        return messages

    async def step(self, call: ToolCall) -> Step:
        step = await self._env.step(call)
        self._stage.unseen += step.messages
        return step

    async def score(self) -> float | None:
        return await self._env.score()
