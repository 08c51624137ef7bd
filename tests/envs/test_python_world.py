"""A world that a user writes in Python: its tools, its faults, and a training on it by its import path."""

import json
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from backtalk.envs.python import PythonEnv, PythonWorld
from backtalk.errors import ConfigError, InfrastructureError, TaskError
from backtalk.messages import ToolCall
from backtalk.run.config import config_from_dict, config_to_dict
from backtalk.run.worlds import Worlds, open_worlds
from backtalk.tasks.task import Split, Task
from backtalk.trajectory import TokenRole

ROOT = Path(__file__).parents[2]


class Lights(PythonEnv):
    """A room with lamps."""

    system = "Switch lamps."

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.on: set[str] = set()

    async def switch(self, lamp: str, times: int = 1) -> str:
        """Switch a lamp."""
        self._count(lamp, times)
        self.done = len(self.on) == 2
        return ", ".join(sorted(self.on)) or "dark"

    def look(self) -> None:
        """Look around."""

    def fuse(self) -> str:
        """Blow the fuse."""
        raise ZeroDivisionError("no current")

    def _count(self, lamp: str, times: int) -> None:
        if times % 2:
            self.on ^= {lamp}

    def reward(self) -> float:
        return len(self.on) / 2


class LightsWorld(PythonWorld):
    """Twenty rooms."""

    env = Lights

    def __init__(self, rooms: int = 20) -> None:
        self.rooms = rooms

    def all_tasks(self) -> list[Task]:
        return [Task(id=f"room/{n}", instruction=f"Light room {n}.") for n in range(self.rooms)]


async def test_methods_are_tools_and_what_they_return_is_environment_output() -> None:
    world = LightsWorld()
    (task,) = world.tasks(Split.TRAIN, 1, seed=0)
    async with world.open(task) as env:
        assert [message.text for message in await env.reset()] == ["Switch lamps.", task.instruction]
        assert [tool.name for tool in env.tools] == ["switch", "look", "fuse"]
        assert env.tools[0].description == "Switch a lamp."
        assert env.tools[0].parameters == {
            "type": "object",
            "additionalProperties": False,
            "properties": {"lamp": {"type": "string"}, "times": {"type": "integer", "default": 1}},
            "required": ["lamp"],
        }
        step = await env.step(ToolCall("switch", {"lamp": "desk"}))
        assert [(p.text, p.role) for p in step.messages[0].parts] == [("desk", TokenRole.ENV_OUTPUT)] and not step.done
        assert (await env.step(ToolCall("look", {}))).messages[0].parts == ()
        unknown = await env.step(ToolCall("reward", {}))
        assert unknown.messages[0].parts[0].role is TokenRole.WARNING
        assert await env.score() == 0.5
        assert (await env.step(ToolCall("switch", {"lamp": "door", "times": 3}))).done
        assert await env.score() == 1.0


async def test_an_exception_of_a_tool_costs_the_rollout_and_is_no_reward() -> None:
    async with LightsWorld().open(Task(id="room/1", instruction="")) as env:
        with pytest.raises(InfrastructureError, match=r"Lights\.fuse\(\{\}\) raised ZeroDivisionError: no current"):
            await env.step(ToolCall("fuse", {}))


def test_tasks_are_split_by_their_ids_and_drawn_by_the_seed() -> None:
    world = LightsWorld(rooms=100)
    train, held_out = world.tasks(Split.TRAIN, 200, seed=0), world.tasks(Split.HELD_OUT, 200, seed=0)
    assert len(train) + len(held_out) == 100 and 10 <= len(held_out) <= 30
    assert (
        world.tasks(Split.TRAIN, 5, seed=1)
        == world.tasks(Split.TRAIN, 5, seed=1)
        != world.tasks(Split.TRAIN, 5, seed=2)
    )

    class Twice(LightsWorld):
        def all_tasks(self) -> list[Task]:
            return [*super().all_tasks(), *super().all_tasks()]

    with pytest.raises(TaskError, match=r"'room/0' is in 'Twice' and again"):
        Twice().tasks(Split.TRAIN, 5, seed=0)


async def test_what_cannot_be_a_world_is_refused() -> None:
    class Empty(PythonEnv):
        """No tool."""

    class Odd(PythonEnv):
        """A tool whose argument is no JSON."""

        def feed(self, cat: Lights) -> str:
            """Feed."""
            return str(cat)

    with pytest.raises(ConfigError, match="Empty has no tool"):
        _ = Empty(Task(id="x", instruction="")).tools
    with pytest.raises(ConfigError, match=r"Odd\.feed cannot be a tool"):
        _ = Odd(Task(id="x", instruction="")).tools

    def worlds(name: str, **options: object) -> AbstractAsyncContextManager[Worlds]:
        return open_worlds(config_from_dict({"tasks": {"source": [{"name": name, "options": options}]}}))

    for name, options, message in (
        ("nowhere:World", {}, "cannot be imported"),
        ("json:JSONDecoder", {}, "which is no world; name a class with tasks"),
        (f"{__name__}:LightsWorld", {"height": 3}, r"cannot be made with options \{'height': 3\}"),
    ):
        with pytest.raises(ConfigError, match=message):
            async with worlds(name, **options):
                pass
    async with worlds(f"{__name__}:LightsWorld", rooms=50) as found:
        train, held_out = (found.tasks(split, 100, 0)[0] for split in Split)
        assert len(train) + len(held_out) == 50
        assert found.reports[0].name == f"{__name__}:LightsWorld"


class WithoutTasks(PythonWorld):
    """A world whose tasks cannot be read, and which counts how often it is closed."""

    env = Lights
    closed = 0

    def all_tasks(self) -> list[Task]:
        raise TaskError("no task can be read")

    async def close(self) -> None:
        type(self).closed += 1


async def test_worlds_are_closed_if_the_run_cannot_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from backtalk.run.log import RunLog
    from backtalk.run.train import evaluate_run, train

    monkeypatch.setattr(WithoutTasks, "closed", 0)
    source = f"{__name__}:WithoutTasks"
    config = config_from_dict({"tasks": {"source": source}})
    with pytest.raises(TaskError, match="no task can be read"):
        await train(config, tmp_path / "run")
    assert WithoutTasks.closed == 1
    RunLog(tmp_path / "other").write_config(config_to_dict(config))
    with pytest.raises(TaskError, match="no task can be read"):
        await evaluate_run(tmp_path / "other", base=True)
    assert WithoutTasks.closed == 2
    with pytest.raises(ConfigError, match="cannot be imported"):  # the second of two
        await train(config_from_dict({"tasks": {"source": [source, "nowhere:World"]}}), tmp_path / "third")
    assert WithoutTasks.closed == 3


async def test_the_example_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from backtalk.run.train import train
    from taught import taught_model_dir

    monkeypatch.chdir(ROOT)
    config = config_from_dict(
        {
            "steps": 1,
            "tasks_per_step": 2,
            "group_size": 2,
            "tasks": {"source": "examples.guess_world:GuessWorld"},
            "evaluation": {"tasks": 2, "samples_per_task": 1},
            "rollout": {"max_turns": 3, "max_tokens": 600, "max_tokens_per_turn": 16},
            "engine": {"model": str(taught_model_dir(tmp_path / "model", steps=1))},
        }
    )
    folder = await train(config, tmp_path / "run")
    (metrics,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert metrics["num_turns"] > 0
