"""What a run says while it goes on, driven by the events themselves and a clock that the test turns."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

from rich.console import Console

from backtalk.cli.progress import (
    RunDisplay,
    StudyDisplay,
    clock_text,
    comparison_table,
    evaluation_line,
    evaluation_table,
    step_line,
)
from backtalk.envs.base import WorldReport
from backtalk.evidence.compare import ArmResult, Comparison
from backtalk.evidence.study import StudyProgress, StudyRunDone, StudyStarted
from backtalk.run.estimates import Interval
from backtalk.run.evaluate import Evaluation
from backtalk.run.events import EvaluationDone, Notice, RolloutDone, RunDone, RunStarted, StepDone

METRICS = {"reward": 0.25, "env_output_ce": 1.5, "tokens_per_second": 12_345.6, "failed": 0}
EVALUATION = Evaluation(
    step=0,
    samples_per_task=4,
    pass_at_1=Interval(0.25, 0.125, 0.375),
    pass_at_k=Interval(0.5),
    reward=Interval(0.25, 0.125, 0.375),
    env_ce_recorded=Interval(1.5, 1.25, 1.75),
    env_ce_own=None,
    per_rollout={"num_turns": 3.5},
    stop_reasons={"submitted": 3, "max_turns": 1},
    no_reward=1,
    seconds=12.0,
    tasks=(),
    recorded=(),
)


def test_times_are_read_as_on_a_clock() -> None:
    assert [clock_text(s) for s in (0.4, 65, 3725, float("nan"))] == ["0:00", "1:05", "1:02:05", "?"]


def test_a_step_is_one_line() -> None:
    event = StepDone(step=8, steps=50, metrics=METRICS)
    assert step_line(event, 125) == "step  8 (9/50)  reward 0.250  env CE 1.500 nats  12,346 tokens/s  2:05 left"


def test_a_step_says_what_it_could_not_measure_and_what_broke() -> None:
    event = StepDone(step=0, steps=2, metrics={"reward": 0.0, "env_output_ce": float("nan"), "failed": 3})
    line = step_line(event, float("nan"))
    assert line == "step 0 (1/2)  reward 0.000  env CE - nats  - tokens/s  ? left  3 rollouts failed"


def test_plain_lines_where_there_is_no_terminal() -> None:
    out, now = StringIO(), [100.0]
    with RunDisplay(Console(file=out, width=40), clock=lambda: now[0]) as display:
        world = WorldReport("terminal in bubblewrap", ("memory is not limited",))
        display.show(RunStarted(Path("runs/x"), 0, 3, (world,)))
        display.show(EvaluationDone(EVALUATION))
        display.show(Notice("[sic] no markup"))
        display.show(RolloutDone("training", 0, 1, 8))
        now[0] += 10
        display.show(StepDone(0, 3, METRICS))
        now[0] += 20
        display.show(StepDone(1, 3, METRICS))
        display.show(RunDone(Path("runs/x"), 2, False))
    lines = out.getvalue().splitlines()
    assert lines == [
        "starting: 3 steps, into runs/x; terminal in bubblewrap",
        "note: memory is not limited",
        evaluation_line(EVALUATION),
        "note: [sic] no markup",
        "step 0 (1/3)  reward 0.250  env CE 1.500 nats  12,346 tokens/s  0:20 left",  # 2 steps of 10 s
        "step 1 (2/3)  reward 0.250  env CE 1.500 nats  12,346 tokens/s  0:15 left",  # 1 step of (10 + 20) / 2 s
        "stopped after 2 steps: runs/x",
    ]


def test_bars_in_a_terminal() -> None:
    out = StringIO()
    with RunDisplay(Console(file=out, width=100, force_terminal=True)) as display:
        display.show(RunStarted(Path("runs/x"), 1, 3, (WorldReport("terminal in bubblewrap"),)))
        display.show(RolloutDone("training", 1, 5, 64))
        display._bars.refresh()
        display.show(StepDone(1, 3, METRICS))
    text = out.getvalue()
    assert "continuing after 1 step: 3 steps" in text
    assert "5/64" in text and "1/3" in text
    assert "step 1 (2/3)  reward 0.250" in text


def test_an_evaluation_in_full() -> None:
    out = StringIO()
    Console(file=out, width=100).print(evaluation_table(EVALUATION))
    text = out.getvalue()
    for words in ("pass@1", "0.250 [0.125, 0.375]", "pass@4", "turns per rollout", "3.50", "ended with max_turns"):
        assert words in text


def test_a_study_is_a_line_for_every_tenth_of_a_run() -> None:
    out = StringIO()
    with StudyDisplay(Console(file=out, width=100)) as display:
        display.show(StudyStarted(Path("runs/demo"), ("grpo_seed0", "echo_seed0"), ("grpo_seed0",), 2))
        for step in range(1, 41):
            display.show(StudyProgress("echo_seed0", step, 40, METRICS))
        display.show(StudyRunDone("echo_seed0", 1))
    lines = out.getvalue().splitlines()
    assert lines[0] == "study in runs/demo: 2 runs, 2 at a time"
    assert lines[1] == "echo_seed0  4/40 steps  reward 0.250  env CE 1.500 nats"
    assert len(lines) == 1 + 10 + 1
    assert lines[-1] == "echo_seed0  ended with exit code 1"


def test_a_study_in_a_terminal_has_a_bar_for_each_run() -> None:
    out = StringIO()
    with StudyDisplay(Console(file=out, width=100, force_terminal=True)) as display:
        display.show(StudyStarted(Path("runs/demo"), ("grpo_seed0", "echo_seed0"), ("grpo_seed0",), 2))
        display.show(StudyProgress("echo_seed0", 1, 40, METRICS))
        display._bars.refresh()
    text = out.getvalue()
    assert "done before" in text
    assert "1/40" in text and "reward 0.250" in text


def test_a_comparison_has_a_row_for_each_metric_of_each_arm() -> None:
    results = tuple(
        ArmResult(
            arm=arm,
            metric=metric,
            before=Interval(0.25),
            after=Interval(0.5, 0.375, 0.625),
            change=Interval(0.25, 0.125, 0.375),
            against_first=None if arm == "grpo" else Interval(0.0, -0.125, 0.125),
        )
        for metric in ("pass@1", "env CE")
        for arm in ("grpo", "echo")
    )
    out = StringIO()
    comparison = Comparison(study="demo", seeds=(0, 1), interval="seeds", results=results)
    Console(file=out, width=80).print(comparison_table(comparison))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines[0].split() == ["held", "out", "before", "after", "change", "after,", "minus", "grpo"]
    assert lines[1] == "pass@1"
    assert lines[2].split() == ["grpo", "0.250", "0.500", "0.250", "-"]
    assert lines[3].strip() == "[0.375, 0.625] [0.125, 0.375]"
    assert lines[4].split() == ["echo", "0.250", "0.500", "0.250", "0.000"]
    assert lines[5].endswith("[-0.125, 0.125]")
    assert lines[6] == "env CE"
    assert lines[11].startswith("95 % intervals over seeds; seeds 0, 1")
