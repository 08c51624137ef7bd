"""The map of cells: which differences it reads from studies, and that it draws cells of either sign."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from backtalk.evidence.compare import compare

RECIPE = Path(__file__).parents[2] / "recipes/map"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(RECIPE))
    monkeypatch.delitem(sys.modules, "draw", raising=False)
    import draw

    yield draw
    sys.modules.pop("draw", None)


def study(folder: Path, name: str, solved: dict[str, list[int]], steps: tuple[int, ...] = (0, 10)) -> Path:
    """Write the study.json of arms that solve so many of four rollouts of each task at the end, and none before."""

    def evaluation(tasks: list[int], share: float) -> dict[str, Any]:
        rows = [{"solved": round(n * share), "scored": 4, "rollouts": 4, "reward_sum": n * share} for n in tasks]
        rows = [row | {"task_id": str(i), "env_nats": 1.0, "env_tokens": 1} for i, row in enumerate(rows)]
        return {"tasks": rows, "recorded": []}

    runs = {
        (arm, seed): {step: evaluation(tasks, step / steps[-1]) for step in steps}
        for arm, tasks in solved.items()
        for seed in (0, 1)
    }
    (folder / name).mkdir()
    comparison = compare(name, tuple(solved), (0, 1), runs)
    (folder / name / "study.json").write_text(json.dumps(comparison.to_dict()))
    return folder / name


def test_cells_of_either_sign_are_read_and_drawn(recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good = study(tmp_path, "good", {"grpo": [0, 1, 0], "echo": [2, 3, 2], "shuffled": [2, 3, 2]})
    bad = study(tmp_path, "bad", {"grpo": [4, 4, 4], "echo": [0, 0, 0]}, steps=(0, 10, 40))
    cell = recipe.read_cell(str(good))
    assert cell == ("good", 2, False, (0.5, 0.5, 0.5), (0.0, 0.0, 0.0))  # every task gained two of four
    assert (cell.control.sign, cell.placebo.sign) == (1, 0)
    cell = recipe.read_cell(f"sparse={bad}")
    # Over the run: 0, 1/4 and 1 at steps 0, 10 and 40 have the mean (1.25 + 18.75) / 40, of GRPO's alone.
    assert cell == ("sparse", 2, True, pytest.approx((-0.5, -0.5, -0.5)), None) and cell.control.sign == -1
    recipe.main([str(good), f"sparse={bad / 'study.json'}", "--out", str(tmp_path / "map.png")])
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "good, 2 seeds: less control +0.500 [0.500, 0.500], helps; less shuffled +0.000" in said
    assert "sparse, 2 seeds: less control -0.500 [-0.500, -0.500], hurts\n" in said


def test_a_study_without_the_arm_is_refused(recipe: Any, tmp_path: Path) -> None:
    path = study(tmp_path, "other", {"grpo": [1, 2], "mine": [2, 3]})
    assert recipe.read_cell(f"{path}:mine").control == (0.25, 0.25, 0.25)
    with pytest.raises(ValueError, match="name the one with the term, not the first one"):
        recipe.read_cell(str(path))
