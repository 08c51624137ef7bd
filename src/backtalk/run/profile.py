"""Profile of a run: where the time of its steps went, as a table, and as a trace that Perfetto opens."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backtalk.run.events import EvaluationDone, Event, OnEvent, StepDone
from backtalk.spans import Span, recording

# Stages by the names of their spans. Of those at work at one moment, the first has its time: rollouts overlap, and a
# command that runs while a wave is sampled holds nothing up.
STAGES = {
    "sampling": "sampling",
    "forward": "forward",
    "backward": "backward",
    "gradients": "both terms' gradients",
    "optimizer": "optimizer",
    "metrics": "metrics",
    "logging": "logging",
    "checkpoint": "checkpoint",
    "step": "waiting for commands",
    "reset": "opening environments",
    "score": "scoring",
    "sample": "waiting for the sampler",
}
TRACE, TABLE = "trace.json", "profile.md"


@contextmanager
def profiling(folder: Path, say: Callable[[str], None]) -> Iterator[OnEvent]:
    """Record a run's spans inside the block; yield a callback for its events.

    Every step is added to ``trace.json``. At the end the table is written to ``profile.md``, and said.
    """
    with recording() as spans:
        profile = Profile(folder, spans)
        try:
            yield profile.on_event
        finally:
            profile.close()
            if profile.steps:
                (folder / TABLE).write_text(profile.table() + "\n")
                say(profile.table())


@dataclass(slots=True)
class Profile:
    """Seconds of the steps so far, by stage, and the trace on disk."""

    folder: Path
    spans: list[Span]
    clock: Callable[[], float] = time.perf_counter
    steps: int = 0
    seconds: float = 0.0  # of all steps
    exclusive_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    summed_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _start_s: float = field(init=False)
    _origin_s: float = field(init=False)
    _tracks: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._start_s = self._origin_s = self.clock()

    def on_event(self, event: Event) -> None:
        """Take the spans since the last step or evaluation as those of the one that is done."""
        if not isinstance(event, (StepDone, EvaluationDone)):
            return
        now_s = self.clock()
        spans, self.spans[:] = list(self.spans), []
        if isinstance(event, StepDone):
            self.steps += 1
            self.seconds += now_s - self._start_s
            for stage, one_s in exclusive_seconds(spans, self._start_s, now_s).items():
                self.exclusive_s[stage] += one_s
            for span in spans:
                self.summed_s[span.stage] += span.end_s - span.start_s
        self._append(spans)
        self._start_s = now_s

    def table(self) -> str:
        """Return seconds a step by stage, in Markdown, the largest first."""
        rows = [
            (STAGES.get(stage, stage), seconds, self.summed_s[stage]) for stage, seconds in self.exclusive_s.items()
        ]
        other = self.seconds - sum(self.exclusive_s.values())
        rows = [*sorted(rows, key=lambda row: -row[1]), ("everything else", other, other)]
        lines = ["| stage | s a step | share | s a step, summed over rollouts |", "|---|---|---|---|"]
        lines += [
            f"| {name} | {one / self.steps:.3f} | {one / self.seconds:.1%} | {summed / self.steps:.3f} |"
            for name, one, summed in rows
        ]
        return "\n".join([*lines, f"| a step ({self.steps} of them) | {self.seconds / self.steps:.3f} | | |"])

    def close(self) -> None:
        """End the trace."""
        if (path := self.folder / TRACE).exists() and self._tracks:
            with path.open("a") as file:
                file.write("\n]\n")

    def _append(self, spans: Sequence[Span]) -> None:
        """Add spans to the trace, in the format of Chrome's trace viewer; times are in microseconds."""
        events: list[dict[str, Any]] = []
        is_first = not self._tracks
        for span in sorted(spans, key=lambda span: span.start_s):
            if span.track not in self._tracks:
                number = self._tracks[span.track] = len(self._tracks) + 1
                name = {"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": span.track}}
                events.append(name)
            times = {"ts": 1e6 * (span.start_s - self._origin_s), "dur": 1e6 * (span.end_s - span.start_s)}
            stage = STAGES.get(span.stage, span.stage)
            events.append({"name": stage, "ph": "X", "pid": 1, "tid": self._tracks[span.track], **times})
        if events:
            with (self.folder / TRACE).open("w" if is_first else "a") as file:
                file.write(("[\n" if is_first else ",\n") + ",\n".join(map(json.dumps, events)))


def exclusive_seconds(spans: Sequence[Span], start_s: float, end_s: float) -> dict[str, float]:
    """Return the seconds of each stage between two times, where each moment belongs to one stage: see ``STAGES``.

    Stages that are not listed come after those that are.
    """
    order = {stage: rank for rank, stage in enumerate(dict.fromkeys([*STAGES, *(span.stage for span in spans)]))}
    edges: list[tuple[float, str, int]] = []
    for span in spans:
        first, last = max(span.start_s, start_s), min(span.end_s, end_s)
        if first < last:
            edges += [(first, span.stage, 1), (last, span.stage, -1)]
    seconds: defaultdict[str, float] = defaultdict(float)
    active, before_s = Counter[str](), start_s
    for at_s, stage, change in sorted(edges):
        running = [name for name, count in active.items() if count]
        if running and at_s > before_s:
            seconds[min(running, key=order.__getitem__)] += at_s - before_s
        active[stage] += change
        before_s = at_s
    return dict(seconds)
