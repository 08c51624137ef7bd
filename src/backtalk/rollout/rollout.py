"""Run one rollout: from a fresh environment to its trajectory. docs/rollouts.md states the rules.

An ending is a value. If the environment breaks (InfrastructureError), the trajectory has no reward and keeps what was
observed by then; any other exception is a bug and is raised.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import replace
from typing import Any

from backtalk.envs.base import Env, Step
from backtalk.errors import InfrastructureError, VerifierError
from backtalk.language.renderer import Renderer
from backtalk.messages import Message, ParsedAction, Part
from backtalk.rollout.admission import Admission
from backtalk.rollout.limits import Deadline, RolloutLimits, backoff_s
from backtalk.rollout.recorder import Recorder
from backtalk.rollout.sampler import Sampler, SamplerSession, sample_action
from backtalk.tasks.task import Task
from backtalk.trajectory import StopReason, TokenRole, Trajectory

EnvFactory = Callable[[Task], AbstractAsyncContextManager[Env]]
CLOSE_TIMEOUT_S = 60.0
log = logging.getLogger(__name__)


async def run_rollout(
    task: Task,
    open_env: EnvFactory,
    sampler: Sampler,
    renderer: Renderer,
    limits: RolloutLimits,
    *,
    sample_index: int,
    key: str,
    deadline: Deadline | None = None,
    admission: Admission | None = None,
) -> Trajectory:
    """Run one rollout, again in a fresh environment if the first broke before the policy's first action.

    All of it has one deadline, set-up and waits included. ``key`` fixes the random numbers, the same in each retry.
    """
    version, retries = sampler.policy_version, 0
    deadline, admission = deadline or Deadline(limits.timeout_s(task)), admission or Admission()
    while True:
        recorder = await _run_once(task, open_env, sampler, renderer, limits, deadline, admission, key)
        wait_s = backoff_s(key, retries)
        if not recorder.may_be_retried or retries >= limits.max_retries or wait_s >= deadline.left_s:
            break
        await asyncio.sleep(wait_s)
        retries += 1
    recorder.stats["retries"] = float(retries)
    return recorder.trajectory(task, sample_index, version)


async def _run_once(
    task: Task,
    open_env: EnvFactory,
    sampler: Sampler,
    renderer: Renderer,
    limits: RolloutLimits,
    deadline: Deadline,
    admission: Admission,
    key: str,
) -> Recorder:
    """Run a rollout in one environment, which is closed before this returns or raises.

    The deadline covers opening the environment too. The session is opened after it and closed before scoring, so that
    the other rollouts at the sampler wait for neither (`Admission`).
    """
    recorder = Recorder()
    try:
        async with _EnvStack() as env_stack:
            scope = deadline.scope()
            try:
                async with scope, AsyncExitStack() as session_stack:
                    with admission.opening(deadline):
                        with recorder.in_phase("reset"):
                            env = await env_stack.enter_async_context(open_env(task))
                            prompt = await env.reset()
                        session = await session_stack.enter_async_context(sampler.session(key))
                    renderer = renderer.for_tools(env.tools)
                    recorder.append_prompt(prompt, renderer)
                    recorder.stop_reason = await _turns(env, session, renderer, limits, deadline, admission, recorder)
            except (TimeoutError, InfrastructureError):
                if not scope.expired():
                    raise
                recorder.stop_reason = StopReason.DEADLINE
            if recorder.stop_reason is not StopReason.DEADLINE or (limits.deadline == "verify" and recorder.has_acted):
                with recorder.in_phase("score"):
                    recorder.reward = await _score(env, limits)
                    recorder.stats.update(getattr(env, "metrics", {}))
            elif limits.deadline == "zero" and recorder.has_acted and not task.world_model_only:
                recorder.reward = 0.0
            recorder.phase = "close"
    except InfrastructureError as error:
        if recorder.phase != "close":  # the rollout is complete by then
            recorder.fail(error)
    finally:
        admission.rollout_ended()
    return recorder


async def _turns(
    env: Env,
    session: SamplerSession,
    renderer: Renderer,
    limits: RolloutLimits,
    deadline: Deadline,
    admission: Admission,
    recorder: Recorder,
) -> StopReason:
    """Sample actions and append their observations until the rollout ends; return the reason."""
    for turn in range(limits.max_turns):
        room = min(limits.max_tokens - len(recorder.token_ids), limits.max_tokens_per_turn)
        if room < 1:
            return StopReason.MAX_TOKENS
        if deadline.left_s <= 0:  # the environment swallowed the cancellation
            return StopReason.DEADLINE
        with recorder.in_phase("sample"):
            await admission.wait_for_openings()
            completion = await sample_action(session, tuple(recorder.token_ids), room, renderer.action_end)
        action = renderer.parse_action(completion.token_ids, completion.stopped)
        recorder.append_action(completion, action, turn)
        if action.error and len(recorder.token_ids) >= limits.max_tokens:
            return StopReason.MAX_TOKENS  # the limit cut the action, the policy did not write it badly
        recorder.stats["invalid_calls"] += {call.tool for call in action.calls}.isdisjoint(t.name for t in env.tools)
        recorder.stats["unclean_turns"] += bool(action.error or action.warnings)
        recorder.stats["role_confusions"] += renderer.imitates_observation(completion.sampled_ids)
        steps: list[Step] = []
        try:
            with recorder.in_phase("step"):
                await _step(env, action, steps)
        finally:  # if the environment breaks at the second call, the answer to the first is kept
            _append_observation(steps, action, renderer, limits, recorder)
        if steps[-1].done:
            return StopReason.SUBMITTED if steps[-1].submitted else StopReason.ENV_DONE
        if len(recorder.token_ids) >= limits.max_tokens:
            return StopReason.MAX_TOKENS
    return StopReason.MAX_TURNS


async def _step(env: Env, action: ParsedAction, steps: list[Step]) -> None:
    """Carry out an action's calls in order, up to one that ends the rollout; a parse error is an observation too."""
    if action.error:
        steps.append(Step((Message("tool", (Part(action.error, TokenRole.WARNING),)),)))
    for call in action.calls:
        step = await env.step(call)
        steps.append(replace(step, messages=tuple(replace(m, tool=m.tool or call.tool) for m in step.messages)))
        if step.done:
            return


def _append_observation(
    steps: Sequence[Step], action: ParsedAction, renderer: Renderer, limits: RolloutLimits, recorder: Recorder
) -> None:
    """Append the messages of a turn's steps as one observation, after the last turn too: it is learned from."""
    messages = [message for step in steps for message in step.messages]
    dropped = 0
    if messages or (steps and not steps[-1].done):
        if action.notice and messages:
            messages[0] = replace(messages[0], parts=(Part(action.notice, TokenRole.WARNING), *messages[0].parts))
        dropped = recorder.append_observation(messages, renderer, limits.max_tokens)
    recorder.stats["command_timeouts"] += sum(step.timed_out for step in steps)
    recorder.stats["truncated_observations"] += dropped > 0 or any(step.truncated for step in steps)


async def _score(env: Env, limits: RolloutLimits) -> float | None:
    timeout = asyncio.timeout(limits.rollout_timeout_s)  # the environment's own limit ends it long before
    try:
        async with timeout:
            reward = await env.score()
    except TimeoutError as error:
        if not timeout.expired():
            raise
        raise VerifierError(f"no reward: scoring did not end within {limits.rollout_timeout_s:g} s") from error
    if reward is not None and not math.isfinite(reward):
        raise VerifierError(f"the verifier gave reward={reward}, which is not finite; it has to be a number or None")
    return reward


class _EnvStack(AsyncExitStack):
    """An exit stack for an environment, which waits at most ``CLOSE_TIMEOUT_S`` for it to close."""

    async def __aexit__(self, *error: Any) -> bool | None:
        timeout = asyncio.timeout(CLOSE_TIMEOUT_S)
        try:
            async with timeout:
                return await super().__aexit__(*error)
        except TimeoutError:
            if not timeout.expired():
                raise
            log.warning("an environment did not close within %g s and is left behind", CLOSE_TIMEOUT_S)
            return None
