"""Write the report of a study: one picture and one page, every arm before, during and after training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backtalk.errors import DataError
from backtalk.files import read_json, write_bytes
from backtalk.run.estimates import Interval
from backtalk.run.log import RunLog
from backtalk.viewer.live.export import write_page
from backtalk.viewer.report.curves import band, finish, new_figure
from backtalk.viewer.report.run import MAX_TOKENS

SMOOTHED_STEPS = 5  # of the reward curve: a step has few tasks


def write_study_report(folder: str | Path) -> Path:
    """Write study.png and report.html into a study's folder; return the path of the page.

    Raises:
        DataError: the study has not finished.
    """
    folder = Path(folder)
    write_bytes(folder / "study.png", draw(folder, read_study(folder)))
    return write_page([folder], folder / "report.html", max_tokens=MAX_TOKENS)


def read_study(folder: Path) -> dict[str, Any]:
    """Return the content of study.json.

    Raises:
        DataError: the study has not finished, or the file is damaged.
    """
    path = folder / "study.json"
    if not path.is_file():
        raise DataError(f"{folder} holds no finished study: no study.json; start it again to finish it")
    study = read_json(path, "; start the study again, which keeps its runs")
    if "curves" not in study:
        raise DataError(f"{path} is of an older version, without curves; start the study again, which keeps its runs")
    return study


def draw(folder: Path, study: Mapping[str, Any]) -> bytes:
    """Draw reward and pass@1, cross-entropy of env output (recorded, if there is any) and its change; PNG bytes."""
    figure, (left, right, change) = new_figure(1, 3, width=4.6, height=3.8)
    by_arm: dict[str, list[RunLog]] = defaultdict(list)
    for (arm, _), name in _runs(study).items():
        by_arm[arm].append(RunLog(folder / name))
    recorded = [r for r in study["results"] if r["metric"] == "env CE, recorded" and r["before"] is not None]
    metric = "env CE, recorded" if recorded else "env CE, own"
    for number, (arm, logs) in enumerate(by_arm.items()):
        color = f"C{number}"
        steps, values = _mean_curve(logs, "reward")
        left.plot(steps, _smooth(values), color=color, alpha=0.5, linewidth=1.2, label=f"{arm}, training reward")
        for axis, name in ((left, "pass@1"), (right, metric)):
            found = [p for p in study["curves"] if (p["arm"], p["metric"]) == (arm, name)]
            points = {point["step"]: point["interval"] for point in found}
            if points:
                label = f"{arm}, held-out pass@1" if axis is left else arm
                # All arms begin at the same point: a little apart, both can be seen.
                aside = (number - (len(by_arm) - 1) / 2) * 0.012 * max(points)
                band(axis, [step + aside for step in points], list(points.values()), label, color=color)
    left.set(title="training reward, and held-out pass@1", xlabel="step", ylim=(-0.02, None))
    what = "recorded trajectories" if metric == "env CE, recorded" else "own rollouts"
    right.set(title=f"held-out env-output cross-entropy,\n{what}", xlabel="step", ylabel="nats/token")
    draw_change(change, [r for r in study["results"] if r["metric"] == metric])
    return finish(figure)


def draw_change(axis: Any, results: Sequence[Mapping[str, Any]]) -> None:
    """Draw how a metric changed in each arm, with the interval of pairs, which is narrower than those of its ends."""
    for number, result in enumerate(results):
        if found := Interval.from_dict(result["change"]):
            low, high = found.low, found.high
            errors = None if low is None or high is None else [[found.value - low], [high - found.value]]
            axis.errorbar([number], [found.value], errors, fmt="o", color=f"C{number}", capsize=4)
    axis.axhline(0, color="#8c959f", linewidth=1)
    axis.set_xticks(range(len(results)), [result["arm"] for result in results])
    axis.set(title="its change over training,\nin pairs of the same task", xlim=(-0.5, max(len(results), 1) - 0.5))


def _runs(study: Mapping[str, Any]) -> dict[tuple[str, int], str]:
    arms = dict.fromkeys(result["arm"] for result in study["results"])
    return {(arm, seed): f"{arm}_seed{seed}" for arm in arms for seed in study["seeds"]}


def _mean_curve(logs: Sequence[RunLog], name: str) -> tuple[list[int], list[float]]:
    """Return steps, and the mean over seeds of a training metric at each."""
    values: dict[int, list[float]] = defaultdict(list)
    for log in logs:
        for row in log.read_metrics():
            if row.get(name) is not None:
                values[row["step"]].append(row[name])
    return sorted(values), [sum(values[step]) / len(values[step]) for step in sorted(values)]


def _smooth(values: Sequence[float]) -> list[float]:
    windows = [values[max(0, i + 1 - SMOOTHED_STEPS) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
