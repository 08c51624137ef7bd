"""Record rollouts of a scripted explorer in real terminals: commands on files, and their output.

The machines are those of triage tasks; nothing is scored. Two rollouts on one machine have different commands, so there
are three kinds: rollouts to train on, others over the same files, and others on machines that were never seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from backtalk.envs.terminal import BASH, SUBMIT, TerminalConfig, TerminalWorld
from backtalk.language.renderer import Renderer
from backtalk.messages import ToolCall
from backtalk.rollout.limits import RolloutLimits
from backtalk.rollout.rollout import run_rollout
from backtalk.rollout.sampler import ScriptedSampler
from backtalk.sandboxes import local_sandbox
from backtalk.tasks.task import Split, Task
from backtalk.tasks.triage import triage_tasks
from backtalk.trajectory import TokenRole, Trajectory

TURNS = 4
TERMINAL = TerminalConfig(max_output_chars=600, command_timeout_s=30)


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Trajectories without reward: trained on, over the same files, and on new machines."""

    trained: tuple[Trajectory, ...]
    same_files: tuple[Trajectory, ...]
    new_files: tuple[Trajectory, ...]


async def record(renderer: Renderer, *, machines: int, sessions: int, held_out: int, seed: int) -> Rollouts:
    """Record rollouts on machines of triage tasks: ``sessions`` a machine to train on, and one more each.

    ``held_out`` is how many other machines have one rollout each.
    """
    seen = triage_tasks(split=Split.TRAIN, levels=(1, 2), count=machines, seed=seed + 17)  # not those of a preset
    new = triage_tasks(split=Split.HELD_OUT, levels=(1, 2), count=held_out, seed=seed + 17)
    world = TerminalWorld(local_sandbox(), TERMINAL)
    places = asyncio.Semaphore(16)
    limits = RolloutLimits(max_turns=TURNS, max_tokens=2048, max_tokens_per_turn=200)
    shell = renderer.for_tools((BASH, SUBMIT))

    async def rollout(task: Task, number: int) -> Trajectory:
        sampler = ScriptedSampler(explore(task, number), lambda command: _encode(shell, command))
        async with places:
            unscored = replace(task, metadata={**task.metadata, "world_model_only": True})
            key = f"{task.id}/{number}"
            return await run_rollout(unscored, world.open, sampler, shell, limits, sample_index=number, key=key)

    trained, same, fresh = await asyncio.gather(
        asyncio.gather(*(rollout(task, n) for task in seen for n in range(sessions))),
        asyncio.gather(*(rollout(task, sessions) for task in seen)),
        asyncio.gather(*(rollout(task, 0) for task in new)),
    )
    return Rollouts(tuple(trained), tuple(same), tuple(fresh))


def explore(task: Task, number: int) -> list[str]:
    """Return commands that look around a task's machine; another number gives other ones."""
    random = Random(f"explore/{task.id}/{number}")
    return [_command(random, sorted(task.files)) for _ in range(TURNS)]


def shuffled(trajectories: Sequence[Trajectory], seed: int) -> tuple[Trajectory, ...]:
    """Return the control: each turn has the observation of some other turn of the whole set."""
    answers = [(t, n) for t, one in enumerate(trajectories) for n in range(one.num_turns)]
    moved = Random(f"shuffle/{seed}").sample(answers, len(answers))
    source = dict(zip(answers, moved, strict=True))
    by_turn = [
        {n: [s for s in one.segments if s.turn == n and s.role is not TokenRole.ACTION] for n in range(one.num_turns)}
        for one in trajectories
    ]
    result = []
    for t, one in enumerate(trajectories):
        segments = []
        for segment in one.segments:
            if segment.turn is None or segment.role is TokenRole.ACTION:
                segments.append(segment)
            if segment.role is TokenRole.ACTION and segment.turn is not None:
                other, turn = source[t, segment.turn]
                segments += [replace(said, turn=segment.turn) for said in by_turn[other][turn]]
        result.append(replace(one, segments=tuple(segments)))
    return tuple(result)


def _command(random: Random, paths: Sequence[str]) -> str:
    path = random.choice(paths)
    folder = path.rsplit("/", 1)[0]
    return random.choice(
        (
            f"ls {folder}",
            f"cat {path}",
            f"head -n {random.randint(1, 4)} {path}",
            f"tail -n {random.randint(1, 4)} {path}",
            f"wc -l {path}",
            f"sort {path} | head -n 3",
            f"cat {path}x",
            f"cut -d ' ' -f 1 {path}",
            f"find {folder} -type f",
        )
    )


def _encode(renderer: Renderer, command: str) -> tuple[int, ...]:
    return renderer.encode_action(ToolCall("bash", {"command": command}))
