"""Triage tasks: reproducible, distinct, split by id, solvable by their solutions and by nothing less."""

from __future__ import annotations

import pytest

from backtalk.envs.terminal import TerminalConfig, open_terminal_env
from backtalk.errors import ConfigError
from backtalk.messages import ToolCall
from backtalk.sandboxes import local_sandbox
from backtalk.tasks.task import Split, Task
from backtalk.tasks.triage import LEVELS, triage_task, triage_tasks
from backtalk.tasks.triage.questions import QUESTIONS


def one_of_each_kind() -> list[Task]:
    """The first task of every kind of question."""
    found: dict[str, Task] = {}
    for level in LEVELS:
        seed = 0
        while sum(task.metadata["level"] == level for task in found.values()) < len(QUESTIONS[level]):
            task = triage_task(seed, level)
            found.setdefault(task.metadata["kind"], task)
            seed += 1
    return list(found.values())


KINDS = one_of_each_kind()


async def play(task: Task, commands: list[str], answer: str | None) -> float:
    async with open_terminal_env(task, local_sandbox(), TerminalConfig()) as env:
        await env.reset()
        for command in commands:
            await env.step(ToolCall("bash", {"command": command}))
        if answer is not None:
            await env.step(ToolCall("submit", {"answer": answer}))
        return await env.score()


@pytest.mark.parametrize("task", KINDS, ids=lambda task: task.metadata["kind"])
async def test_the_careful_way_earns_the_reward(task: Task) -> None:
    assert await play(task, task.metadata["commands"], task.metadata["answer"]) == 1.0


@pytest.mark.parametrize("task", KINDS, ids=lambda task: task.metadata["kind"])
async def test_the_solution_finds_the_answer_with_real_tools(task: Task) -> None:
    script = task.solution["solve.sh"].content.decode()
    read_back = "cat /logs/agent/answer.txt"
    async with open_terminal_env(task, local_sandbox(), TerminalConfig()) as env:
        await env.reset()
        await env.step(ToolCall("bash", {"command": script}))
        step = await env.step(ToolCall("bash", {"command": read_back}))
        assert step.messages[0].text.strip() == task.metadata["answer"]


async def test_an_untouched_box_and_a_wrong_answer_earn_nothing() -> None:
    for task in KINDS[::3]:
        assert await play(task, [], None) == 0.0
        assert await play(task, task.metadata["commands"], task.metadata["answer"] + "1") == 0.0


async def test_a_change_that_was_asked_for_is_checked() -> None:
    changing = [task for task in KINDS if task.metadata["kind"] in ("repaired_setting", "restored_config")]
    assert len(changing) == 2
    for task in changing:
        assert await play(task, [], task.metadata["answer"]) == 0.0  # the right answer, nothing repaired


async def test_blanks_around_an_answer_do_not_matter() -> None:
    task = KINDS[0]
    assert await play(task, [], f"  {task.metadata['answer']}\n") == 1.0


def test_a_seed_makes_the_same_task_every_time() -> None:
    assert triage_task(7, 2) == triage_task(7, 2)
    assert triage_task(7, 2).files != triage_task(8, 2).files


def test_thousands_of_tasks_are_distinct_and_the_splits_share_none() -> None:
    train = triage_tasks(split=Split.TRAIN, levels=LEVELS, count=3000)
    held_out = triage_tasks(split=Split.HELD_OUT, levels=LEVELS, count=700)
    assert len({task.id for task in train + held_out}) == 3700
    worlds = {tuple(file.content for file in task.files.values()) for task in train}
    assert len(worlds) == 3000
    assert worlds.isdisjoint(tuple(file.content for file in task.files.values()) for task in held_out)
    assert {task.metadata["level"] for task in held_out} == set(LEVELS)


def test_another_seed_draws_other_tasks() -> None:
    first = {task.id for task in triage_tasks(split=Split.TRAIN, levels=(1,), count=100, seed=0)}
    assert first.isdisjoint(task.id for task in triage_tasks(split=Split.TRAIN, levels=(1,), count=100, seed=1))


def test_an_answer_cannot_be_read_off_the_instruction_or_a_file_name() -> None:
    for task in KINDS:
        words = task.instruction.replace(".", " ").replace(",", " ").split()
        if task.metadata["kind"] != "changed_setting":
            assert task.metadata["answer"] not in words


def test_levels_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match="level 9 does not exist"):
        triage_task(0, 9)
    with pytest.raises(ConfigError, match="without a level"):
        triage_tasks(split=Split.TRAIN, levels=(), count=1)
