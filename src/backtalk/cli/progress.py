"""Show the progress of runs and studies: a live display in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from backtalk.cli.heartbeat import Heartbeat
from backtalk.evidence.compare import Comparison
from backtalk.evidence.study import StudyEvent, StudyProgress, StudyRunDone, StudyStarted
from backtalk.run.benchmark import BenchmarkResult
from backtalk.run.estimates import Interval, interval_text
from backtalk.run.evaluate import Evaluation
from backtalk.run.events import (
    EvaluationDone,
    Event,
    Notice,
    RolloutDone,
    RunDone,
    RunStarted,
    StepDone,
    WorldModelMeasured,
)

RECENT_STEPS = 10  # the time left is estimated from these


class _Display:
    """Progress bars beneath printed lines; without a terminal, the lines alone. A context manager."""

    def __init__(self, console: Console, description: str, *, transient: bool = False) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn(description),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
            transient=transient,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class RunDisplay(_Display):
    """Display of one run: a line for each step, with bars for the run and the rollouts of the current step.

    A context manager; pass ``show`` as ``on_event``.
    """

    def __init__(
        self, console: Console, clock: Callable[[], float] = time.monotonic, heartbeat: Heartbeat | None = None
    ) -> None:
        super().__init__(console, "{task.description:>12}", transient=True)
        self._clock = clock
        self._heartbeat = heartbeat or Heartbeat(None, "")
        self._steps: TaskID | None = None
        self._rollouts: TaskID | None = None
        self._last_step_at = clock()
        self._recent_seconds: deque[float] = deque(maxlen=RECENT_STEPS)

    def show(self, event: Event) -> None:
        """Display an event."""
        match event:
            case RunStarted():
                self._started(event)
            case RolloutDone():
                self._rollout_done(event)
            case StepDone():
                self._step_done(event)
            case EvaluationDone():
                self._print(evaluation_line(event.evaluation))
                self._last_step_at = self._clock()  # an evaluation does not count as the time of a step
            case WorldModelMeasured():
                self._print(world_model_text(event.measured, event.path))
                self._last_step_at = self._clock()
            case Notice():
                self._print(f"note: {event.text}")
            case RunDone():
                ending = "finished" if event.finished else "stopped"
                self._print(f"{ending} after {_steps(event.step)}: {event.folder}")
                self._heartbeat.doing("writing the report")

    def _print(self, text: str) -> None:
        super()._print(text)
        self._heartbeat.heard()

    def _started(self, event: RunStarted) -> None:
        begin = f"continuing after {_steps(event.first_step)}" if event.first_step else "starting"
        worlds = ", ".join(world.name for world in event.worlds)
        self._print(f"{begin}: {_steps(event.steps)}, into {event.folder}; {worlds}")
        self._heartbeat.doing("preparing the first rollouts")
        for warning in (warning for world in event.worlds for warning in world.warnings):
            self._print(f"note: {warning}")
        self._last_step_at = self._clock()
        self._steps = self._bars.add_task("steps", total=event.steps, completed=event.first_step, note="")
        self._rollouts = self._bars.add_task("rollouts", total=None, note="")

    def _rollout_done(self, event: RolloutDone) -> None:
        if self._rollouts is not None:
            name = "rollouts" if event.phase == "training" else event.phase
            self._bars.update(self._rollouts, description=name, total=event.total, completed=event.done)
        done = f"{event.done} of {event.total} rollouts"
        self._heartbeat.doing(f"{event.phase}, step {event.step}: {done}", goes_on=event.done > 1)

    def _step_done(self, event: StepDone) -> None:
        now = self._clock()
        self._recent_seconds.append(now - self._last_step_at)
        self._last_step_at = now
        left = self.seconds_left(event.steps - event.step - 1)
        self._print(step_line(event, left))
        self._heartbeat.doing(f"the rollouts of step {event.step + 1}")
        if self._steps is not None:
            self._bars.update(self._steps, completed=event.step + 1, note=f"{clock_text(left)} left")

    def seconds_left(self, steps: int) -> float:
        """Estimate the seconds of the remaining training steps from the last ones; evaluations are not counted."""
        pace = sum(self._recent_seconds) / len(self._recent_seconds) if self._recent_seconds else math.nan
        return steps * pace


class StudyDisplay(_Display):
    """Display of one study: a bar for each run in a terminal, a line for every tenth of a run elsewhere."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, "{task.description}")
        self._tasks: dict[str, TaskID] = {}

    def show(self, event: StudyEvent) -> None:
        """Display an event."""
        match event:
            case StudyStarted():
                self._print(f"study in {event.folder}: {len(event.runs)} runs, {event.parallel} at a time")
                for run in event.runs:
                    note = "done before" if run in event.finished else "waiting"
                    self._tasks[run] = self._bars.add_task(run, total=None, note=note)
            case StudyProgress():
                self._progress(event)
            case StudyRunDone():
                ending = "finished" if event.exit_code == 0 else f"ended with exit code {event.exit_code}"
                self._bars.update(self._tasks[event.run], note=ending)
                if not self._console.is_terminal or event.exit_code:
                    self._print(f"{event.run}  {ending}")

    def _progress(self, event: StudyProgress) -> None:
        reward = _number(event.metrics.get("reward"), ".3f")
        ce = _number(event.metrics.get("env_output_ce"), ".3f")
        note = f"reward {reward}  env CE {ce} nats"
        self._bars.update(self._tasks[event.run], total=event.steps, completed=event.step, note=note)
        if not self._console.is_terminal and event.step % max(1, event.steps // 10) == 0:
            self._print(f"{event.run}  {event.step}/{event.steps} steps  {note}")


def comparison_table(comparison: Comparison) -> Table:
    """Return the result of a study: a row for each metric of each arm, estimates with their 95 % intervals."""
    first = comparison.results[0].arm if comparison.results else "the first arm"
    has_p = any(result.p_holm is not None for result in comparison.results)
    table = Table(
        *("held out", "before", "after", "change", f"after, minus {first}", *(["p"] if has_p else [])),
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    metric = ""
    for result in comparison.results:
        if result.metric != metric:
            metric = result.metric
            table.add_row(metric, style="bold")
        found = (result.before, result.after, result.change, result.against_first)
        cells = [interval_text(interval).replace(" ", "\n", 1) for interval in found]
        table.add_row(f"  {result.arm}", *cells, *([_number(result.p_holm, ".3f")] if has_p else []))
    seeds = ", ".join(map(str, comparison.seeds))
    table.caption = (
        f"95 % intervals over {comparison.interval}; seeds {seeds}; CE in nats per token of environment output"
        + ("; p by the same bootstrap, corrected for the number of arms (Holm)" if has_p else "")
    )
    table.caption_justify = "left"
    return table


def step_line(event: StepDone, seconds_left: float) -> str:
    """Return a step, counted from 0, as a line: reward, cross-entropy of the environment's output, speed, time left."""
    metrics = event.metrics
    width = len(str(event.steps))
    words = [
        f"step {event.step:>{width}} ({event.step + 1}/{event.steps})",
        f"reward {_number(metrics.get('reward'), '.3f')}",
        f"env CE {_number(metrics.get('env_output_ce'), '.3f')} nats",
        f"{_number(metrics.get('tokens_per_second'), ',.0f')} tokens/s",
        f"{clock_text(seconds_left)} left",
    ]
    if metrics.get("failed"):
        words.append(f"{metrics['failed']:.0f} rollouts failed")
    return "  ".join(words)


def evaluation_line(evaluation: Evaluation) -> str:
    """Return an evaluation as a line, every estimate with its 95 % interval."""
    words = [
        f"held out, after {evaluation.step} steps:",
        f"pass@1 {interval_text(evaluation.pass_at_1)}",
        *([f"pass@{k} {interval_text(evaluation.pass_at_k)}"] if (k := evaluation.samples_per_task) > 1 else []),
        f"env CE {interval_text(evaluation.env_ce_recorded)} recorded, {interval_text(evaluation.env_ce_own)} own",
    ]
    if evaluation.no_reward:
        words.append(f"{evaluation.no_reward} rollouts without a reward")
    return "  ".join(words)


def world_model_text(measured: Mapping[str, Any], path: Path) -> str:
    """Return a line for each set of rollouts: what the policy knows of its world, each with its 95 % interval."""
    forms = {
        "ce_per_token": "env CE {} nats a token",
        "ce_per_byte": "{} a byte",
        "token_accuracy": "token accuracy {}",
        "true_preferred": "true answer preferred {}",
        "line_recall": "lines predicted {}",
    }
    lines = []
    for name, found in ((name, found) for name, found in measured["sets"].items() if found):
        texts = {key: interval_text(Interval.from_dict(found["estimates"][key])) for key in forms}
        ece = "" if found["calibration"] is None else f", calibration error {found['calibration']['ece']:.3f}"
        lines.append(f"{name}: {', '.join(form.format(texts[key]) for key, form in forms.items())}{ece}")
    return "\n".join([f"world model after {measured['step']} steps, in {path}", *lines])


def evaluation_table(evaluation: Evaluation) -> Table:
    """Return an evaluation as a table."""
    table = Table("held out", f"after {evaluation.step} steps")
    table.add_row("pass@1", interval_text(evaluation.pass_at_1, "{:.1%}"))
    if (k := evaluation.samples_per_task) > 1:
        table.add_row(f"pass@{k}", interval_text(evaluation.pass_at_k, "{:.1%}"))
    table.add_row("reward", interval_text(evaluation.reward))
    table.add_row("env CE on recorded trajectories, nats/token", interval_text(evaluation.env_ce_recorded))
    table.add_row("env CE on own rollouts, nats/token", interval_text(evaluation.env_ce_own))
    for name, count in evaluation.per_rollout.items():
        table.add_row(f"{name.removeprefix('num_').replace('_', ' ')} per rollout", f"{count:.2f}")
    table.add_row("rollouts without a reward", str(evaluation.no_reward))
    for reason, count in sorted(evaluation.stop_reasons.items()):
        table.add_row(f"ended with {reason}", str(count))
    table.add_row("seconds", f"{evaluation.seconds:.0f}")
    return table


def benchmark_table(result: BenchmarkResult, dataset: str) -> Table:
    """Return pass@k of a dataset, every rollout counted."""
    evaluation = result.evaluation
    rollouts = sum(task.rollouts for task in evaluation.tasks)
    solved = sum(task.solved for task in evaluation.tasks)
    table = Table(dataset, f"{len(evaluation.tasks)} tasks, {solved} of {rollouts} rollouts solved")
    for k, interval in result.pass_at.items():
        table.add_row(f"pass@{k}", interval_text(interval))
    return table


def clock_text(seconds: float) -> str:
    """Return seconds as 3:05, or 2:03:05 from an hour on; "?" where they are not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _steps(count: int) -> str:
    return f"{count} step{'s' if count != 1 else ''}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)
