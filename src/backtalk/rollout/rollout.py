"""One try at one task, from an empty world to a record of what was said in it.

Endings are values. Where the world breaks (InfrastructureError), the record has no reward, and what had been said
by then is kept; any other exception is a bug and is raised.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import replace
from types import TracebackType

from backtalk.envs.base import Env, Step
from backtalk.errors import InfrastructureError, VerifierError
from backtalk.language.renderer import Renderer
from backtalk.messages import Message, ParsedAction, Part
from backtalk.rollout.admission import Admission
from backtalk.rollout.limits import Deadline, RolloutLimits
from backtalk.rollout.recorder import Record
from backtalk.rollout.sampler import Sampler, SamplerSession
from backtalk.tasks.task import Task
from backtalk.trajectory import StopReason, TokenRole

EnvFactory = Callable[[Task], AbstractAsyncContextManager[Env]]

CLOSE_TIMEOUT_S = 60.0

log = logging.getLogger(__name__)


class _Worlds(AsyncExitStack):
    """Closes the world that was opened in it, and does not wait for that forever."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        guard = asyncio.timeout(CLOSE_TIMEOUT_S)
        try:
            async with guard:
                return await super().__aexit__(kind, error, trace)
        except TimeoutError:
            if not guard.expired():
                raise
            log.warning("a world did not close within %g s and is left behind", CLOSE_TIMEOUT_S)
            return None


async def attempt(
    task: Task,
    open_env: EnvFactory,
    sampler: Sampler,
    renderer: Renderer,
    limits: RolloutLimits,
    deadline: Deadline,
    admission: Admission,
    *,
    key: str,
) -> Record:
    """Run one try. Its world is closed before this returns or raises, and an InfrastructureError is in the record.

    The deadline covers setting up the world too. The session is opened when the world is there and closed before
    scoring, so that the other rollouts at the sampler wait for neither (`Admission`).
    """
    record = Record()
    try:
        async with _Worlds() as worlds:
            scope = deadline.scope()
            try:
                async with scope, AsyncExitStack() as sessions:
                    with admission.arriving(deadline):
                        with record.phase("reset"):
                            env = await worlds.enter_async_context(open_env(task))
                            messages = await env.reset()
                        session = await sessions.enter_async_context(sampler.session(key))
                    renderer = renderer.for_tools(env.tools)
                    record.begin(messages, renderer)
                    record.stop_reason = await _play(env, session, renderer, limits, deadline, admission, record)
            except (TimeoutError, InfrastructureError):
                if not scope.expired():
                    raise
                record.stop_reason = StopReason.DEADLINE
            if record.stop_reason is not StopReason.DEADLINE:
                with record.phase("score"):
                    record.reward = await _score(env, limits)
            record.where = "close"
    except InfrastructureError as error:
        if record.where != "close":  # a world that breaks when all is said and scored takes nothing away
            record.fail(error)
    finally:
        admission.ended()
    return record


async def _play(
    env: Env,
    session: SamplerSession,
    renderer: Renderer,
    limits: RolloutLimits,
    deadline: Deadline,
    admission: Admission,
    record: Record,
) -> StopReason:
    """Play turn after turn, until something ends it."""
    for turn in range(limits.max_turns):
        room = limits.max_tokens - len(record.token_ids)
        if room < 1:
            return StopReason.MAX_TOKENS
        if deadline.left_s <= 0:  # the world swallowed the cancellation
            return StopReason.DEADLINE
        with record.phase("sample"):
            await admission.settled()
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
            _observe(steps, action, renderer, limits, record)
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
    steps: Sequence[Step], action: ParsedAction, renderer: Renderer, limits: RolloutLimits, record: Record
) -> None:
    """Append one observation of all that was said; after the last turn too, as that teaches as well."""
    messages = [message for step in steps for message in step.messages]
    dropped = 0
    if messages or (steps and not steps[-1].done):
        if action.notice and messages:
            messages[0] = replace(messages[0], parts=(Part(action.notice, TokenRole.WARNING), *messages[0].parts))
        dropped = record.observe(messages, renderer, limits.max_tokens)
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
