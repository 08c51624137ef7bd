"""One attempt at one task, from an empty world to a trajectory; and many attempts at once.

Endings are values. Where the world breaks (InfrastructureError), the attempt has no reward, and what had been said
by then is kept; any other exception is a bug and is raised.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, replace

from backtalk.envs.base import Env, Message, ParsedAction, Part, Step, Task
from backtalk.errors import ConfigError, InfrastructureError, VerifierError
from backtalk.record import Record
from backtalk.renderer import Renderer
from backtalk.sampler import Sampler, SamplerSession
from backtalk.trajectory import StopReason, TokenRole, Trajectory, TrajectoryGroup

EnvFactory = Callable[[Task], AbstractAsyncContextManager[Env]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutLimits:
    """Where an attempt ends at the latest."""

    max_turns: int = 16
    max_tokens: int = 16_384  # of a whole history: prompt, actions, observations
    max_tokens_per_turn: int = 2_048  # of one action
    rollout_timeout_s: float = 600.0  # from opening the world to the last turn; scoring has as long again
    concurrency: int = 64  # attempts at once

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_tokens", "max_tokens_per_turn", "rollout_timeout_s", "concurrency"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} leaves no room for an attempt; use a number above 0")


async def run_rollout(
    task: Task,
    open_env: EnvFactory,
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
                    renderer = renderer.for_tools(env.tools)
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
        action = renderer.parse_action(completion.token_ids, completion.stopped)
        record.act(completion, action, turn)
        if action.error and len(record.token_ids) >= limits.max_tokens:
            return StopReason.MAX_TOKENS  # cut by the history's end, not badly written
        record.stats["invalid_calls"] += {call.tool for call in action.calls}.isdisjoint(t.name for t in env.tools)
        record.stats["unclean_turns"] += bool(action.error or action.warnings)
        record.stats["role_confusions"] += renderer.imitates_observation(completion.token_ids)
        steps: list[Step] = []
        try:
            with record.phase("step"):
                await _carry_out(action, env, steps)
        finally:  # if the world breaks at the second call, what it said to the first is kept
            _observe(steps, action, turn, renderer, limits, record)
        if steps[-1].done:
            return StopReason.SUBMITTED if steps[-1].submitted else StopReason.ENV_DONE
        if len(record.token_ids) >= limits.max_tokens:
            return StopReason.MAX_TOKENS
    return StopReason.MAX_TURNS


async def _carry_out(action: ParsedAction, env: Env, steps: list[Step]) -> None:
    """The calls in order, up to the first that ends the episode; what was wrong is an answer too."""
    if action.error:
        steps.append(Step((Message("tool", (Part(action.error, TokenRole.WARNING),)),)))
    for call in action.calls:
        step = await env.step(call)
        steps.append(replace(step, messages=tuple(replace(m, tool=m.tool or call.tool) for m in step.messages)))
        if step.done:
            return


def _observe(
    steps: Sequence[Step], action: ParsedAction, turn: int, renderer: Renderer, limits: RolloutLimits, record: Record
) -> None:
    """Append one observation of all that was said; after the last turn too, as that teaches as well."""
    messages = [message for step in steps for message in step.messages]
    dropped = 0
    if messages or (steps and not steps[-1].done):
        if action.notice and messages:
            messages[0] = replace(messages[0], parts=(Part(action.notice, TokenRole.WARNING), *messages[0].parts))
        dropped = record.observe(messages, renderer, turn, limits.max_tokens)
    record.stats["command_timeouts"] += sum(step.timed_out for step in steps)
    record.stats["truncated_observations"] += dropped > 0 or any(step.truncated for step in steps)


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
    open_env: EnvFactory,
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
    open_env: EnvFactory,
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
