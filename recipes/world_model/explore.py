"""Episodes of a scripted explorer in real terminals: commands on files, and what the terminal returned.

The boxes are those of triage tasks; nobody scores anything. Two explorers in one box type other commands, so there are
three kinds of episode: those trained on, others over the same files, and others in boxes that were never seen.
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
class Episodes:
    """Each a list of trajectories without reward."""

    trained: tuple[Trajectory, ...]
    same_files: tuple[Trajectory, ...]
    new_files: tuple[Trajectory, ...]


async def record(renderer: Renderer, *, boxes: int, sessions: int, held_out: int, seed: int) -> Episodes:
    """``sessions`` trained episodes in each of ``boxes`` boxes, one more over the same files, one in each new box."""
    seen = triage_tasks(split=Split.TRAIN, levels=(1, 2), count=boxes, seed=seed + 17)  # not those of a preset
    new = triage_tasks(split=Split.HELD_OUT, levels=(1, 2), count=held_out, seed=seed + 17)
    world = TerminalWorld(local_sandbox(), TERMINAL)
    places = asyncio.Semaphore(16)
    limits = RolloutLimits(max_turns=TURNS, max_tokens=2048, max_tokens_per_turn=200)
    shell = renderer.for_tools((BASH, SUBMIT))

    async def episode(task: Task, number: int) -> Trajectory:
        sampler = ScriptedSampler(explore(task, number), lambda command: _encode(shell, command))
        async with places:
            unscored = replace(task, metadata={**task.metadata, "world_model_only": True})
            key = f"{task.id}/{number}"
            return await run_rollout(unscored, world.open, sampler, shell, limits, sample_index=number, key=key)

    trained, same, fresh = await asyncio.gather(
        asyncio.gather(*(episode(task, n) for task in seen for n in range(sessions))),
        asyncio.gather(*(episode(task, sessions) for task in seen)),
        asyncio.gather(*(episode(task, 0) for task in new)),
    )
    return Episodes(tuple(trained), tuple(same), tuple(fresh))


def explore(task: Task, number: int) -> list[str]:
    """What somebody types who looks around this box; other commands for another number."""
    random = Random(f"explore/{task.id}/{number}")
    return [_command(random, sorted(task.files)) for _ in range(TURNS)]


def shuffled(trajectories: Sequence[Trajectory], seed: int) -> tuple[Trajectory, ...]:
    """The control: each turn is answered by what some other turn of the whole set was answered with."""
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
