"""The tasks of the workbench: each solved by its solution, and by nothing less."""

from __future__ import annotations

from dataclasses import replace

import pytest

from backtalk.envs import read_tasks
from backtalk.envs.base import Task, ToolCall
from backtalk.envs.terminal import TerminalConfig, open_terminal_env
from sandbox_help import backend_or_skip

TASKS = read_tasks("workbench")


async def play(task: Task, *commands: str) -> float | None:
    async with open_terminal_env(task, backend_or_skip(), TerminalConfig(command_timeout_s=60)) as env:
        await env.reset()
        for command in commands:
            await env.step(ToolCall("bash", {"command": command}))
        return await env.score()


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.id)
async def test_its_solution_earns_the_whole_reward(task: Task) -> None:
    assert await play(task, task.solution["solve.sh"].content.decode()) == 1.0


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.id)
async def test_an_untouched_world_is_a_valid_failure(task: Task) -> None:
    reward = await play(task)
    assert reward is not None and reward < 1


def test_there_is_something_to_choose_from() -> None:
    assert len({task.id for task in TASKS}) == len(TASKS) >= 5
    assert all(task.instruction.strip() and "solve.sh" in task.solution for task in TASKS)
    assert all(task == replace(task) and task.metadata.get("needs") for task in TASKS)
