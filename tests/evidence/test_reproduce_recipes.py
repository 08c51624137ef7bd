"""The recipes that measure again: they go on where they were stopped, and what is on record is what the pages say."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from backtalk.evidence.study import load_study
from backtalk.run.log import RunLog

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "recipes/reproduce_cpu/results"


def load(recipe: str) -> Any:
    spec = importlib.util.spec_from_file_location(recipe, ROOT / "recipes" / recipe / "run.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_parts_on_a_cpu_go_on_where_they_were_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load("reproduce_cpu")

    def command(code: str) -> list[str]:
        return [sys.executable, "-c", f"import sys; from pathlib import Path; p = Path(sys.argv[1]); {code}", "{out}"]

    count = "f = p / 'count'; f.write_text(f.read_text() + 'x' if f.exists() else 'x')"
    fails_once = "f = p / 'tried'; tried = f.exists(); f.touch(); print(7); sys.exit(not tried)"
    part = recipe.Part(
        [(command(count), "count"), (command(fails_once), "said.txt")],
        lambda folder: [(folder / name).read_text() for name in ("count", "said.txt")],
        into="said.txt",
    )
    monkeypatch.setattr(recipe, "PARTS", {"small": part})
    with pytest.raises(recipe.subprocess.CalledProcessError):
        recipe.main(["--out", str(tmp_path)])
    assert not (tmp_path / "results").exists()
    for _ in range(2):
        recipe.main(["small", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "results/small.json").read_text())
    assert found["numbers"] == ["x", "7\n"] and found["machine"]["cores"] >= 1 and found["commit"]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_number_on_record_stands_on_its_page(path: Path) -> None:
    record = json.loads(path.read_text())
    assert path.stem in load("reproduce_cpu").PARTS and record["commit"] and record["machine"]
    page = (ROOT / record["from"].split(",")[0]).read_text().replace(" %", "")
    said = {float(number) for number in re.findall(r"(?<![\w.])[+-]?\d+\.?\d*", page)}
    said |= {number / 100 for number in said} | {-number for number in said}

    def numbers(value: Any) -> list[float]:
        if isinstance(value, dict):
            return [x for key, inner in value.items() if key not in ("seed", "seeds") for x in numbers(inner)]
        return [x for inner in value for x in numbers(inner)] if isinstance(value, list) else [value]

    found = [x for x in numbers(record["numbers"]) if isinstance(x, float)]
    assert len(found) > 10 and [x for x in found if not any(abs(x - y) < 1e-9 for y in said)] == []


@pytest.mark.parametrize(("name", "arms"), [("variants", 10), ("out_of_distribution", 3), ("no_verifier", 2)])
def test_planned_studies_have_settings_that_a_run_can_have(name: str, arms: int) -> None:
    study = load_study(ROOT / "recipes" / name / "study.yaml")
    assert len(study.arms) == arms and study.seeds == (0, 1, 2, 3, 4)
    assert all(study.config(arm, 4).objective.has_world_term(1) == (arm != "grpo") for arm in study.arms)


@pytest.mark.slow
def test_a_part_on_a_gpu_ends_in_its_time_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the embedded model on the CPU, one arm, one step, and the shell inside Python of the check of a GPU."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}:{ROOT / 'benchmarks'}")
    recipe = load("reproduce_gpu")
    small = ["--device", "cpu", "--arm", "echo", "--seed", "0", "--out", str(tmp_path), "--set", "steps=1"]
    small += ["--set", "evaluation.tasks=1", "--set", "rollout.max_turns=1", "--set", "rollout.max_tokens_per_turn=8"]
    small += ["--tasks", "gpu_check.world:ShellWorld"]
    assert recipe.main([*small, "--minutes", "0"]) == recipe.MORE_TO_DO
    assert recipe.main(small) == 0
    assert RunLog(tmp_path / "echo_seed0").evaluation_steps() == [0, 1]
    assert {row["arm"] for row in json.loads((tmp_path / "study.json").read_text())["results"]} == {"echo"}
    parts = [json.loads(line) for line in (tmp_path / "parts.jsonl").read_text().splitlines()]
    assert [part["done"] for part in parts] == [False, True]
