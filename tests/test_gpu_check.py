"""The check of a GPU: its formulas against PyTorch's own counts, its files, and its limits. The parts run in CI."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_check.correctness import read_report
from gpu_check.picture import draw
from gpu_check.results import FAILED, Part, Results, show, table
from gpu_check.shapes import LARGE, MIDDLE, SMALL, SMOL, TINY, Shape
from gpu_check.speed import rollouts
from gpu_check.world import Shell, make_task
from torch.utils.flop_counter import FlopCounterMode

from backtalk.messages import ToolCall

ABOUT: dict[str, Any] = {"device": "a card", "torch": "2"}
CPU = torch.device("cpu")


def test_operations_are_those_that_pytorch_counts() -> None:
    model = TINY.random_model(CPU, torch.float32)
    model.set_attn_implementation("eager")  # which computes the whole square
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(100, (2, 64))).logits.sum().backward()
    causal_half = TINY.attention_operations(128, 64)
    assert counter.get_total_flops() == TINY.step_operations(128, 64, 128) + causal_half
    frozen = replace(TINY, lora_rank=2)
    assert frozen.step_operations(128, 64, 0) - causal_half == 4 * 128 * TINY.body + 6 * 128 * frozen.adapters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_block_are_those_that_it_keeps(dtype: torch.dtype) -> None:
    def kept(shape: Shape) -> int:
        model, seen = shape.random_model(CPU, dtype), {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes(), tensor  # alive, so that no address is used twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            states = model.model(torch.randint(100, (1, 256))).last_hidden_state
        assert states.requires_grad
        return sum(size for size, _ in seen.values())

    block = (kept(replace(TINY, layers=2)) - kept(replace(TINY, layers=1))) / 256
    assert TINY.activation_bytes(dtype.itemsize) == pytest.approx(block, rel=0.01)


def test_shapes_have_the_published_sizes() -> None:
    sizes = {shape.name: round(shape.parameters / 1e9, 2) for shape in (SMOL, SMALL, MIDDLE, LARGE)}
    assert sizes == {"0.1B": 0.13, "0.6B": 0.6, "1.5B": 1.54, "8B LoRA": 8.19}
    card = 80e9  # 8B with adapters at 16k tokens fits on one card of 80 GB, with activations computed again
    assert (
        LARGE.step_bytes(2, 16_384, checkpointing=True)
        < 0.4 * card
        < card
        < LARGE.step_bytes(2, 16_384, checkpointing=False)
    )


def test_rollouts_have_the_length_asked_for() -> None:
    for count in (1, 3):
        samples = rollouts(count, 300, 1000)
        assert [len(sample) for sample in samples] == [300] * count
        assert any(sample.advantage for sample in samples)


def test_a_second_call_goes_on_where_the_first_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []

    def work(name: str) -> dict[str, Any]:
        calls.append(name)
        if name == "no memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nmore")
        if name == "bug" and calls.count("bug") == 1:
            raise ZeroDivisionError("of the first call")
        return {"tokens/s": 1234.5}

    def run() -> Part:
        part = Part(Results(tmp_path, ABOUT), "speed", seconds=60)
        for name in ("good", "no memory", "bug"):
            part.measure(name, lambda name=name: work(name), expected_s=1)
        part.measure("long", lambda: work("long"), expected_s=100)
        return part

    part = run()
    assert part.not_reached == ["long"] and "ZeroDivisionError: of the first call" in part.results.failures[0]
    assert "out of memory: CUDA out of memory. Tried to allocate 3 GiB" in (tmp_path / "gpu_check.md").read_text()
    assert run().results.failures == []
    assert calls == ["good", "no memory", "bug", "bug"]  # what failed is done again, what had no memory is not
    assert json.loads((tmp_path / "gpu_check.json").read_text())["parts"]["speed"]["good"]["tokens/s"] == 1234.5
    assert "ZeroDivisionError" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="another machine"):
        Results(tmp_path, ABOUT | {"torch": "3"})


def test_a_table_by_hand() -> None:
    rows = {"a": {"x": 1234.5, "took_s": 3.0}, "b": {"y": [1.0, 0.95, 1.05], FAILED: "a|b"}}
    assert (
        table(rows) == "| | x | y | failed |\n|---|---|---|---|\n| a | 1,234 |  |  |\n| b |  | 1 [0.95, 1.05] | a/b |"
    )
    assert [show(value) for value in (0.012345, float("nan"), 0.0, 7, "yes")] == ["0.0123", "nan", "0", "7", "yes"]


def test_a_picture_of_steps(tmp_path: Path) -> None:
    results = Results(tmp_path, ABOUT)
    draw(results)
    assert not (tmp_path / "gpu_check.png").exists()
    for length in (256, 1024):
        row = {"memory GiB": float("nan"), "predicted GiB": 0.5, "tokens/s": 100.0}
        results.write("speed", f"step, 2M, {length} tokens", row)
    draw(results)
    assert (tmp_path / "gpu_check.png").stat().st_size > 1000


def test_a_report_of_tests_is_read(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    path.write_text(
        "<testsuites><testsuite>"
        '<testcase name="test_a[cpu]"><properties><property name="loss" value="0 &lt;= 1"/></properties></testcase>'
        '<testcase name="test_b[cpu]"><failure message="too far">trace</failure></testcase>'
        '<testcase name="test_c[cuda]"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    assert read_report(path) == {
        "a[cpu]": {"errors and bounds": "loss 0 <= 1"},
        "b[cpu]": {"errors and bounds": "", FAILED: "too far"},
    }


async def test_the_shell_in_this_process_answers() -> None:
    task = make_task(3)
    answer, lines = task.metadata["answer"], task.metadata["files"]["app.log"].count("\n")
    word = task.instruction.split()[-4].rstrip("?")
    shell = Shell(task)

    async def say(tool: str, **arguments: str) -> str:
        return (await shell.step(ToolCall(tool, arguments))).messages[0].text

    assert await say("bash", command=f"grep -c {word} app.log") == answer
    assert await say("bash", command="wc -l app.log") == f"{lines} app.log"
    assert await say("bash", command="cat /etc/passwd") == "cat: /etc/passwd: No such file or directory"
    assert await say("bash", command="vi") == "bash: line 1: vi: command not found"
    assert await say("bash", command="echo '") == "bash: unexpected end of line"
    assert await say("submit", answer=answer) == "submitted"
    assert shell.done and await shell.score() == 1.0
