"""Tasks from rows of files: what a row may hold, and what is said of one that cannot be a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from backtalk.envs.terminal import TerminalConfig, open_terminal_env
from backtalk.errors import ConfigError, TaskError
from backtalk.messages import ToolCall
from backtalk.run.config import load_config
from backtalk.run.tasks import Pool, mixed_tasks_of_step
from backtalk.tasks.load import load_tasks, read_tasks
from backtalk.tasks.task import Split
from sandbox_help import backend_or_skip

ROW = {
    "id": "count",
    "instruction": "How many lines has a.txt? Submit the number.",
    "files": {"a.txt": "1\n2\n"},
    "tests": "{ grep -qx 2 /logs/agent/answer.txt && echo 1 || echo 0; } >/logs/verifier/reward.txt",
}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


async def test_a_row_is_a_task_that_runs(tmp_path: Path) -> None:
    (task,) = read_tasks(str(write(tmp_path / "tasks.jsonl", ROW)))
    for answer, reward in (("2", 1.0), ("3", 0.0)):
        async with open_terminal_env(task, backend_or_skip(), TerminalConfig()) as env:
            await env.reset()
            seen = await env.step(ToolCall("bash", {"command": "wc -l <a.txt"}))
            assert seen.messages[0].text.strip() == "2"
            await env.step(ToolCall("submit", {"answer": answer}))
            assert await env.score() == reward


def test_parquet_holds_the_same_tasks(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "id": "other", "metadata": {"level": 2}}]
    table = pyarrow.Table.from_pylist([{**row, "files": json.dumps(row["files"])} for row in rows])
    pyarrow.parquet.write_table(table.select(["id", "instruction", "tests"]), tmp_path / "tasks.parquet")
    tasks = read_tasks(str(tmp_path / "tasks.parquet"))
    lines = read_tasks(str(write(tmp_path / "tasks.jsonl", *rows)))
    assert [task.id for task in tasks] == [task.id for task in lines] == ["count", "other"]
    assert tasks[0].tests == lines[0].tests and lines[1].metadata["level"] == 2


def test_nulls_that_parquet_fills_in_are_no_fields_of_a_task(tmp_path: Path) -> None:
    rows = [
        {**ROW, "env": {"A": "1"}, "metadata": {"level": 1, "world": {"kind": "shop", "sizes": [1, None]}}},
        {**ROW, "id": "two", "files": {"b.txt": {"content": "b", "mode": "755"}}, "env": {"B": "2"}},
        {**ROW, "id": "three", "files": {"b.txt": {"base64": "Yg=="}}, "metadata": {"world": {"door": "red"}}},
    ]
    rows[0]["files"] = {"a.txt": {"content": "1"}}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "tasks.parquet")
    filled, lines = read_tasks(str(tmp_path / "tasks.parquet")), read_tasks(str(write(tmp_path / "t.jsonl", *rows)))
    assert filled == lines
    assert filled[0].metadata["world"] == {"kind": "shop", "sizes": [1, None]}  # a list has what it had
    assert [dict(task.env) for task in filled] == [{"A": "1"}, {"B": "2"}, {}]
    nulls = {**ROW, "env": {"A": "1", "B": None}, "metadata": {"level": 1, "world": {"kind": "shop", "door": None}}}
    (null,) = read_tasks(str(write(tmp_path / "n.jsonl", nulls)))  # a null field of a task is no field, anywhere
    assert (dict(null.env), null.metadata["world"]) == ({"A": "1"}, {"kind": "shop"})
    columns = {name: [value] for name, value in {**ROW, "files": "{}"}.items()}
    columns["env"] = pyarrow.array([[("A", "1")]], pyarrow.map_(pyarrow.string(), pyarrow.string()))
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "map.parquet")
    assert dict(read_tasks(str(tmp_path / "map.parquet"))[0].env) == {"A": "1"}


def test_every_bad_row_is_named_and_nothing_runs(tmp_path: Path) -> None:
    unscored = {name: value for name, value in ROW.items() if name != "tests"} | {"id": "c"}
    path = write(tmp_path / "tasks.jsonl", ROW, "{", unscored, ROW)
    with pytest.raises(TaskError) as raised:
        read_tasks(str(path))
    for said in (
        "3 of 4 rows",
        "line 2: is not JSON",
        "line 3: tests",
        "line 4: id: 'count' is the id of line 1",
    ):
        assert said in str(raised.value)


def test_each_wrong_field_of_a_row_is_named_with_what_to_write(tmp_path: Path) -> None:
    wrong = {"id": True, "workdir": "a b", "env": {"A-B": "1"}, "files": {"x": {"base64": "!"}}, "agent_timeout_s": 0}
    with pytest.raises(TaskError) as raised:
        read_tasks(str(write(tmp_path / "tasks.jsonl", {**ROW, **wrong})))
    for field in ("id: True", "workdir: 'a b'", "env: A-B", "files: x: ", "agent_timeout_s: 0"):
        assert field in str(raised.value)
    assert "write a plain absolute path" in str(raised.value)
    with pytest.raises(TaskError, match="test: is no field; did you mean 'tests'"):
        read_tasks(str(write(tmp_path / "tasks.jsonl", {**ROW, "test": "true"})))


def test_rows_for_the_world_model_need_no_tests(tmp_path: Path) -> None:
    unscored = {name: value for name, value in ROW.items() if name != "tests"}
    (task,) = read_tasks(str(write(tmp_path / "tasks.jsonl", unscored)), world_model_only=True)
    assert task.world_model_only and not task.tests


def test_a_source_that_is_none_says_what_one_can_be() -> None:
    with pytest.raises(ConfigError, match=r"workbench"):
        read_tasks("no/such/place")


def test_sources_are_mixed_by_weight_and_drawn_again_alike(tmp_path: Path) -> None:
    def pool(name: str, weight: float) -> Pool:
        rows = [{**ROW, "id": f"{name}-{i}"} for i in range(24)]
        tasks = load_tasks(str(write(tmp_path / f"{name}.jsonl", *rows)), split=Split.TRAIN, count=99)
        return Pool(tasks, weight)

    pools = [pool("a", 3.0), pool("b", 1.0)]
    steps = [mixed_tasks_of_step(pools, 4, seed=1, step=step) for step in range(8)]
    assert all(len(step) == 4 for step in steps)
    assert sum(task.id.startswith("a") for step in steps for task in step) == 24
    assert mixed_tasks_of_step(pools, 4, seed=1, step=5) == steps[5]
    assert mixed_tasks_of_step(pools, 4, seed=2, step=5) != steps[5]


def test_sources_in_the_settings() -> None:
    one = load_config("triage", ["tasks.source=workbench"]).tasks.sources
    assert [(source.name, source.weight) for source in one] == [("workbench", 1.0)]
    mixed = load_config(
        "triage", ["tasks.source=[triage, {name: logs.jsonl, weight: 0.25, world_model_only: true}]"]
    ).tasks.sources
    assert [(s.name, s.weight, s.world_model_only) for s in mixed] == [
        ("triage", 1.0, False),
        ("logs.jsonl", 0.25, True),
    ]
    with pytest.raises(ConfigError, match="weight=0"):
        load_config("triage", ["tasks.source=[{name: triage, weight: 0}]"])


def test_forms_in_which_writers_of_data_sets_give_a_row(tmp_path: Path) -> None:
    """The same task, its fields as text, as parts, as messages and as JSON."""
    plain = {**ROW, "setup": ["touch b"], "env": {"PORT": "80"}, "agent_timeout_s": 900, "solution": {"solve.sh": "ls"}}
    text = ROW["instruction"]
    forms: list[dict[str, Any]] = [
        {"instruction": [{"type": "text", "text": text}]},
        {"instruction": [{"role": "user", "content": text}]},
        {"instruction": [{"from": "human", "value": text}]},
        {"instruction": {"role": "user", "content": [{"type": "text", "text": text}]}},
        {"instruction": json.dumps([{"role": "user", "content": text}])},
        {"tests": json.dumps({"test.sh": ROW["tests"]})},
        {"tests": json.dumps([{"path": "test.sh", "content": ROW["tests"]}])},
        {"files": json.dumps(ROW["files"])},
        {"files": [{"path": "a.txt", "content": "1\n2\n"}]},
        {"files": json.dumps([{"path": "a.txt", "content": "1\n2\n"}])},
        {"setup": "touch b"},
        {"setup": json.dumps(["touch b"])},
        {"env": json.dumps({"PORT": 80})},
        {"env": {"PORT": 80}},
        {"agent_timeout_s": "900"},
        {"solution": json.dumps({"solve.sh": "ls"})},
    ]
    rows = [{**plain, **form, "id": f"t{number}"} for number, form in enumerate([{}, *forms])]
    first, *others = read_tasks(str(write(tmp_path / "tasks.jsonl", *rows)))
    for form, task in zip(forms, others, strict=True):
        for part in ("instruction", "files", "setup", "env", "agent_timeout_s"):
            assert getattr(task, part) == getattr(first, part), form
        assert {name: file.content for name, file in task.tests.items()} == {
            name: file.content for name, file in first.tests.items()
        }, form
    # What only looks like JSON is what it says.
    for instruction in ('{"answer": "what is the value?"}', "[1, 2, 3]: which is the largest?", '["a", "b"]'):
        (task,) = read_tasks(str(write(tmp_path / "t.jsonl", {**ROW, "instruction": instruction})))
        assert task.instruction == instruction
    with pytest.raises(TaskError, match=r"line 1: instruction: .*messages of an instruction are the system's and"):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        read_tasks(str(write(tmp_path / "t.jsonl", {**ROW, "instruction": turns})))
