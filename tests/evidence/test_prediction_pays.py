"""The depots of recipes/prediction_pays: what a map is worth, and that a lie keeps the words."""

from __future__ import annotations

import json
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

RECIPE = Path(__file__).parents[2] / "recipes/prediction_pays"


@pytest.fixture
def depots(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(RECIPE))
    monkeypatch.delitem(sys.modules, "depots", raising=False)
    import depots

    return depots


def test_who_knows_the_map_solves_a_task_and_the_map_is_that_of_every_task(depots: Any) -> None:
    world = depots.DepotWorld(depth=2)
    places = world.places(depots.Random("map"))
    tasks = world.all_tasks()
    assert len(tasks) == 24 * 25 and len({task.id for task in tasks}) == len(tasks)
    for task in tasks[::37]:
        env, depot = depots.Depots(task), task.id.split("/")[1]
        assert env.bash(f"ls {places[depot]}") == "code"
        code = env.bash(f"cat {places[depot]}/code")
        assert code.isdigit() and env.reward() == 0.0
        env.submit(code)
        assert env.done and env.reward() == 1.0
    assert depots.Depots(tasks[0]).bash("ls") == "alder\nbirch\ncedar\nelm"
    assert depots.Depots(tasks[0]).bash("cat /srv/elm/x") == "cat: /srv/elm/x: No such file or directory"


def test_a_redrawn_map_differs_by_task_and_a_lie_has_the_same_words_of_other_folders(depots: Any) -> None:
    redrawn = depots.DepotWorld(depth=1, redrawn=True).all_tasks()
    assert len({tuple(task.metadata["files"]) for task in redrawn[:20]}) > 15
    true, lie = (depots.DepotWorld(depth=1, lying=lying).task("anchor", 3).metadata for lying in (False, True))
    assert true["code"] == lie["code"] and true["files"] == lie["files"]
    folders = [path for path in true["listings"] if path.count("/") == 2]
    assert len(folders) == 4 and all(true["listings"][f] != lie["listings"][f] for f in folders)
    words = [Counter(word for f in folders for word in m["listings"][f]) for m in (true, lie)]
    assert words[0] == words[1]


def test_a_cat_that_tells_says_the_command_that_would_have_read_it_and_a_lie_another_folder(depots: Any) -> None:
    true, lie = (depots.DepotWorld(depth=2, told=True, lying=lying) for lying in (False, True))
    places = true.places(depots.Random("map"))
    for depot, place in places.items():
        wrong = next(other.rpartition("/")[0] for other in places.values() if other.rpartition("/")[0] not in place)
        asked = f"cat {wrong}/{depot}/code"
        told, lied = (depots.Depots(world.task(depot, 7)).bash(asked) for world in (true, lie))
        assert told == f"{asked.replace('cat ', 'cat: ')}: moved to {place}/code"
        assert lied.endswith(f"/{depot}/code") and lied != told and lied.split(": moved")[0] == told.split(": moved")[0]
        assert depots.Depots(lie.task(depot, 7)).bash(f"cat {place}/code") == true.task(depot, 7).metadata["code"]
    said = [Counter(p.rpartition("/")[0] for p in world.told_places(places).values()) for world in (true, lie)]
    assert said[0] == said[1]
    assert depots.Depots(true.task("anchor", 7)).bash("cat /srv/elm").endswith("/srv/elm: No such file or directory")


@pytest.mark.parametrize("name", ["study.yaml", "told.yaml"])
def test_the_study_can_be_read_and_each_arm_has_its_world(
    depots: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from backtalk.evidence.study import load_study

    study = load_study(RECIPE / name)
    options = {arm: study.config(arm, 0).tasks.sources[0].options for arm in study.arms}
    assert {arm for arm, given in options.items() if given.get("lying")} == {"lying", "grpo_lying"}
    assert study.config("grpo_lying", 0).objective.world_model_coeff == 0


async def test_the_script_that_teaches_finds_two_folders_in_four(depots: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it looks by `ls` or by `cat` first, it reads the code in half of the tasks, and guesses in the others."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # which the program extends
    teach = runpy.run_path(str(RECIPE / "teach.py"))
    world, found = depots.DepotWorld(depth=1, redrawn=True), 0
    for number in range(200):
        task = world.task(depots.DEPOTS[number % 12], teach["FIRST"] + number)
        _, turns = await teach["play"](task, 1, depots.Random(f"test/{number}"))
        submitted, message = turns[-1]
        assert len(turns) in (2, 3) and submitted.tool == "submit" and message is None
        found += submitted.arguments["answer"] == task.metadata["code"]
    assert 80 < found < 120  # 100 expected, standard deviation 7


@pytest.mark.parametrize(
    ("solved", "said"),
    [
        ({}, "nothing found"),
        ({"grpo": 4, "echo": 0}, "hurts"),
        ({"echo": 4, "shuffled": 4}, "helps by exposure"),
        ({"echo": 4, "lying": 4}, "helps by exposure"),
        ({"echo": 4}, "helps by knowledge"),
    ],
)
def test_a_cell_is_called_by_the_rule(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    solved: dict[str, int],
    said: str,
) -> None:
    """All arms solve 2 of 4 at every task, but where it says otherwise, from step 10 of 20 on."""
    for arm in ("grpo", "echo", "shuffled", "lying", "grpo_lying"):
        for seed in (0, 1):
            (tmp_path / "B" / f"{arm}_seed{seed}").mkdir(parents=True)
            for step in (0, 10, 20):
                n = 2 if step == 0 else solved.get(arm, 2)
                tasks = [{"task_id": str(i), "solved": n, "scored": 4} for i in range(3)]
                path = tmp_path / "B" / f"{arm}_seed{seed}" / f"evaluation_step_{step:05}.json"
                path.write_text(json.dumps({"tasks": tasks}))
    monkeypatch.setattr(sys, "argv", ["analyse.py", str(tmp_path / "B")])
    runpy.run_path(str(RECIPE / "analyse.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert f"B: {said};" in printed
    gain = (solved.get("echo", 2) - solved.get("grpo", 2)) / 4 * 0.75  # half of it, on average, in the first ten steps
    assert f"echo - grpo: {gain:+.3f} [{gain:.3f}, {gain:.3f}]" in printed
