"""Where the time of a step went: attribution by hand, and a real run with and without a profile."""

from __future__ import annotations

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from backtalk.run.config import load_config
from backtalk.run.events import OnEvent
from backtalk.run.log import RunLog
from backtalk.run.profile import STAGES, TABLE, TRACE, exclusive_seconds, profiling
from backtalk.run.train import train
from backtalk.spans import Span, on_track, recording, timed
from tiny import tiny_model_dir


def test_a_moment_belongs_to_one_stage() -> None:
    spans = [
        Span("sample", "a", 0, 4),  # waits for its wave
        Span("step", "b", 0, 3),
        Span("step", "c", 2, 5),
        Span("sampling", "sampler", 3, 4),
        Span("mine", "d", 4, 9),
        Span("optimizer", "engine", 12, 13),
    ]
    seconds = exclusive_seconds(spans, 1, 12.5)
    # 1-3 and 4-5 a command, 3-4 a wave though a command runs too, 5-9 what no stage names, 12-12.5 the optimizer.
    assert seconds == {"step": 3, "sampling": 1, "mine": 4, "optimizer": 0.5}


async def test_spans_are_on_the_track_of_their_task_or_thread() -> None:
    async def rollout(name: str) -> None:
        on_track(name)
        with timed("step"):
            await asyncio.sleep(0.01)

    def wave() -> None:
        with timed("sampling", track="sampler", wait=lambda: time.sleep(0.02)):
            pass

    with timed("step"), recording() as spans:  # the first began before anybody recorded
        await asyncio.gather(rollout("a"), rollout("b"))
        with ThreadPoolExecutor(1) as threads:
            threads.submit(wave).result()
        with pytest.raises(ZeroDivisionError), timed("optimizer"):
            print(1 / 0)
    with timed("step"):
        pass
    assert sorted((span.stage, span.track) for span in spans) == [
        ("optimizer", "run"), ("sampling", "sampler"), ("step", "a"), ("step", "b"),
    ]  # fmt: skip
    assert all(span.end_s - span.start_s >= 0.02 for span in spans if span.stage == "sampling")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model"))


async def test_a_profile_changes_no_number_of_a_run(model: Path, tmp_path: Path) -> None:
    settings = {
        "steps": 2, "tasks_per_step": 2, "group_size": 2, "rollout.max_turns": 2, "rollout.max_tokens_per_turn": 8,
        "tasks.source": "gpu_check.world:ShellWorld",
        "evaluation.tasks": 2, "evaluation.samples_per_task": 1,
        "engine.model": str(model), "engine.device": "cpu", "engine.measure_gradients_every": 1,
    }  # fmt: skip
    said: list[str] = []

    async def run(name: str, profiled: bool) -> list[dict[str, Any]]:
        with ExitStack() as stack:
            on_event: OnEvent = lambda event: None  # noqa: E731
            if profiled:
                on_event = stack.enter_context(profiling(tmp_path / name, said.append))
            await train(load_config("triage", settings), tmp_path / name, on_event=on_event)
        rows = RunLog(tmp_path / name).read_metrics()
        return [{k: v for k, v in row.items() if "second" not in k and "share" not in k} for row in rows]

    plain, profiled = await run("plain", False), await run("profiled", True)
    assert json.dumps(plain) == json.dumps(profiled)
    assert not (tmp_path / "plain" / TRACE).exists()

    (table,) = said
    assert (tmp_path / "profiled" / TABLE).read_text() == table + "\n"
    for stage in ("sampling", "forward", "backward", "gradients", "optimizer", "metrics", "logging", "checkpoint"):
        assert f"| {STAGES[stage]} |" in table
    shares = [float(line.split("|")[3].strip().rstrip("%")) for line in table.splitlines()[2:-1]]
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(shares)) and min(shares) >= 0

    events = json.loads((tmp_path / "profiled" / TRACE).read_text())
    tracks = {event["args"]["name"]: event["tid"] for event in events if event["ph"] == "M"}
    assert {"run", "engine", "sampler", "rollout 000", "rollout 003"} <= tracks.keys()
    timed_events = [event for event in events if event["ph"] == "X"]
    assert all(event["dur"] >= 0 and event["ts"] >= 0 and event["tid"] in tracks.values() for event in timed_events)
    waves = [event for event in timed_events if event["name"] == "sampling"]
    assert waves and {event["tid"] for event in waves} == {tracks["sampler"]}
