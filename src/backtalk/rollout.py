"""One attempt at one task, from an empty world to a trajectory; and many attempts at once.

Endings are values. Where the world breaks (InfrastructureError), the attempt has no reward, and what had been said
by then is kept; any other exception is a bug and is raised.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass

from backtalk.envs.base import Env, Message, Part, Step, Task
from backtalk.errors import ConfigError, InfrastructureError, VerifierError
from backtalk.record import Record
from backtalk.renderer import Renderer
from backtalk.sampler import Sampler, SamplerSession
from backtalk.trajectory import Segment, StopReason, TokenRole, Trajectory, TrajectoryGroup

OpenEnv = Callable[[Task], AbstractAsyncContextManager[Env]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutLimits:
    """Where an attempt ends at the latest."""

    max_turns: int = 16
    max_tokens: int = 16_384  # of the whole history: prompt, actions, observations
    max_tokens_per_turn: int = 2_048  # of one action
    rollout_timeout_s: float = 600.0  # from opening the world to the last turn; scoring has as long again
    concurrency: int = 64  # attempts at once

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_tokens", "max_tokens_per_turn", "rollout_timeout_s", "concurrency"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} leaves no room for an attempt; use a number above 0")


async def run_rollout(
    task: Task,
    open_env: OpenEnv,
    sampler: Sampler,
    renderer: Renderer,
    limits: RolloutLimits,
    *,
    sample_index: int,
    key: str,
) -> Trajectory:
    """One attempt. Its world is closed before this returns or raises, and an InfrastructureError is in the record.

    The deadline covers setting up the world too. Scoring comes after the session is closed, so that the other
    attempts at the sampler do not wait for it.
    """
    record, version = Record(), sampler.policy_version
    try:
        async with AsyncExitStack() as worlds:
            deadline = asyncio.timeout(limits.rollout_timeout_s)
            try:
                async with deadline, sampler.session(key) as session:
                    with record.phase("reset"):
                        env = await worlds.enter_async_context(open_env(task))
                        messages = await env.reset()
                    record.say(messages)
                    record.add(renderer.render_prompt(messages))
                    record.stop_reason = await _play(env, session, renderer, limits, record)
            except (TimeoutError, InfrastructureError):
                if not deadline.expired():
                    raise
                record.stop_reason = StopReason.DEADLINE
            else:
                with record.phase("score"):
                    record.reward = await _score(env, limits)
            record.where = "close"
    except InfrastructureError as error:
        if record.where != "close":  # a world that breaks when all is said and scored takes nothing away
            record.fail(error)
    return record.trajectory(task, sample_index, version)


async def _play(
    env: Env, session: SamplerSession, renderer: Renderer, limits: RolloutLimits, record: Record
) -> StopReason:
    """Turn after turn, until something ends it."""
    for turn in range(limits.max_turns):
        room = limits.max_tokens - len(record.token_ids)
        if room < 1:
            return StopReason.MAX_TOKENS
        with record.phase("sample"):
            completion = await session.sample(tuple(record.token_ids), min(room, limits.max_tokens_per_turn))
        record.add([Segment(TokenRole.ACTION, completion.token_ids, completion.logprobs, turn=turn)])
        action = renderer.parse_action(completion.token_ids, completion.stopped)
        record.messages.append({"role": "assistant", "content": action.text})
        if action.call is None and len(record.token_ids) >= limits.max_tokens:
            return StopReason.MAX_TOKENS  # cut by the history's end, not badly written
        if action.call is None:
            record.stats["invalid_calls"] += 1
            step = Step((Message("tool", (Part(action.error or "[no tool call]", TokenRole.WARNING),)),))
        else:
            record.stats["invalid_calls"] += action.call.tool not in {tool.name for tool in env.tools}
            with record.phase("step"):
                step = await env.step(action.call)
        record.say(step.messages)
        record.stats["command_timeouts"] += step.timed_out
        observation: Sequence[Segment] = ()
        if step.messages or not step.done:  # rendered after the last turn too: what the world said last teaches as well
            tool = None if action.call is None else action.call.tool
            closed = completion.token_ids[-1:] == (renderer.end_of_turn_id,)
            observation = renderer.render_observation(step.messages, turn=turn, tool=tool, closed=closed)
        dropped = record.add(observation, limits.max_tokens)
        record.stats["truncated_observations"] += step.truncated or dropped > 0
        if step.done:
            return StopReason.SUBMITTED if step.submitted else StopReason.ENV_DONE
        if len(record.token_ids) >= limits.max_tokens:
            return StopReason.MAX_TOKENS
    return StopReason.MAX_TURNS


async def _score(env: Env, limits: RolloutLimits) -> float | None:
    guard = asyncio.timeout(limits.rollout_timeout_s)  # the environment's own limit ends it long before
    try:
        async with guard:
            reward = await env.score()
    except TimeoutError as error:
        if not guard.expired():
            raise
        raise VerifierError(f"no reward: scoring did not end within {limits.rollout_timeout_s:g} s") from error
    if reward is not None and not math.isfinite(reward):
        raise VerifierError(f"the verifier gave reward={reward}, which is not finite; it has to be a number or None")
    return reward


async def run_group(
    task: Task,
    open_env: OpenEnv,
    sampler: Sampler,
    renderer: Renderer,
    limits: RolloutLimits,
    *,
    group_size: int,
    key: str,
) -> TrajectoryGroup:
    """``group_size`` attempts at one task, at once."""
    return (await run_groups([task], open_env, sampler, renderer, limits, group_size=group_size, key=key))[0]


async def run_groups(
    tasks: Sequence[Task],
    open_env: OpenEnv,
    sampler: Sampler,
    renderer: Renderer,
    limits: RolloutLimits,
    *,
    group_size: int,
    key: str,
) -> list[TrajectoryGroup]:
    """A group for each task, in order; at most ``limits.concurrency`` attempts at once, over all of them.

    A failed attempt touches no other. A bug, or Ctrl-C, ends them all, closes their worlds and is raised.
    """
    if group_size < 1:
        raise ConfigError(f"group_size={group_size} makes no attempt; use group_size >= 1")
    places = asyncio.Semaphore(limits.concurrency)

    async def attempt(task: Task, index: int) -> Trajectory:
        async with places:
            name = f"{key}/{task.id}/{index}"
            return await run_rollout(task, open_env, sampler, renderer, limits, sample_index=index, key=name)

    try:
        async with asyncio.TaskGroup() as attempts:
            groups = [[attempts.create_task(attempt(task, i)) for i in range(group_size)] for task in tasks]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None  # as it was raised, so that callers can catch it by its class
    return [
        TrajectoryGroup(task.id, tuple(done.result() for done in group))
        for task, group in zip(tasks, groups, strict=True)
    ]
