"""Write the report of a study: one picture and one page, every arm before, during and after training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backtalk.errors import DataError
from backtalk.files import read_json, write_bytes
from backtalk.run.estimates import Interval, interval_text
from backtalk.run.log import RunLog
from backtalk.viewer.web import page
from backtalk.viewer.web.curves import band, finish, new_figure

SMOOTHED_STEPS = 5  # of the reward curve: a step has few tasks


def write_study_report(folder: str | Path) -> Path:
    """Write study.png and report.html into a study's folder; return the path of the page.

    Raises:
        DataError: the study has not finished.
    """
    folder = Path(folder)
    study = read_study(folder)
    picture = draw(folder, study)
    write_bytes(folder / "study.png", picture)
    parts = [
        page.paragraph(_summary(study)),
        page.image(picture, "held-out pass@1, and env-output cross-entropy"),
        page.section("Held-out tasks", comparison_html(study)),
        *([page.section("Evaluations", curves_html(study))] if len(_steps(study)) > 2 else []),
        *([page.section("Single tasks and runs", scores_html(study))] if study.get("scores") else []),
        *([page.section("At equal cost of training", equal_html(study))] if study.get("equal") else []),
        *([page.section("To reach the control's best", *reached_html(study))] if study.get("reached") else []),
        page.section("Runs", *[page.link(f"{name}/report.html", name) for name in _runs(study).values()]),
    ]
    path = folder / "report.html"
    write_bytes(path, page.page(f"backtalk study {study['study']}", parts).encode())
    return path


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


def comparison_html(study: Mapping[str, Any]) -> str:
    """Return an HTML table with a row for each metric of each arm."""
    first = study["results"][0]["arm"] if study["results"] else "the first arm"
    columns = {"before": "before", "after": "after", "change": "change", "against_first": f"after, minus {first}"}
    if len(_steps(study)) > 2:
        columns |= {"over_run": "mean over the run", "over_run_against_first": f"mean, minus {first}"}
    has_p, rows = any(result.get("p_holm") is not None for result in study["results"]), []
    for result in study["results"]:
        form = _form(result["metric"])
        signed = form.replace(":", ":+")
        forms = [form if name in ("before", "after", "over_run") else signed for name in columns]
        cells = [interval_text(Interval.from_dict(result[n]), f) for n, f in zip(columns, forms, strict=True)]
        p_values = [_number(result.get(name), "{:.3f}") for name in ("p", "p_holm")] if has_p else []
        rows.append([f"{result['metric']}, {result['arm']}", *cells, *p_values])
    return page.table(["", *columns.values(), *(["p", "p, Holm"] if has_p else [])], rows)


def scores_html(study: Mapping[str, Any]) -> str:
    """Return an HTML table of interquartile means, and of each arm's probability of improvement over the first."""
    rows = []
    for row in study["scores"]:
        iqm = interval_text(Interval.from_dict(row["iqm"]), _form(row["metric"]))
        improvement = interval_text(Interval.from_dict(row["improvement"]), "{:.2f}")
        rows.append([f"{row['metric']}, {row['arm']}", iqm, improvement])
    first = study["scores"][0]["arm"]
    return page.table(["", "interquartile mean", f"probability of improvement over {first}"], rows)


def equal_html(study: Mapping[str, Any]) -> str:
    """Return an HTML table of each metric where every run has spent the same rollouts, tokens and seconds."""
    units = {row["unit"]: row["amount"] for row in study["equal"]}
    found = {(row["metric"], row["arm"], row["unit"]): row for row in study["equal"]}
    rows = []
    for metric, arm in dict.fromkeys((metric, arm) for metric, arm, _ in found):
        cells = [f"{metric}, {arm}"]
        for unit in units:
            row, form = found[metric, arm, unit], _form(metric)
            against = Interval.from_dict(row["against_first"])
            cells += [interval_text(Interval.from_dict(row["value"]), form)]
            cells += [interval_text(against, form.replace(":", ":+"))]
        rows.append(cells)
    first = study["equal"][0]["arm"]
    heads = [head for unit, amount in units.items() for head in (f"at {amount:,.0f} {unit}", f"minus {first}")]
    return page.table(["", *heads], rows)


def reached_html(study: Mapping[str, Any]) -> list[str]:
    """Return the rule as HTML, and a table of what each arm had spent when it reached the first arm's best."""
    rows = []
    for row in study["reached"]:
        pairs = zip(row["amounts"], row["ended"], strict=True)
        amounts = [f"> {end:,.0f}" if amount is None else f"{amount:,.0f}" for amount, end in pairs]
        speedup = interval_text(Interval.from_dict(row["speedup"]), "{:.2f}")
        rows.append([f"{row['metric']}, {row['arm']}", row["unit"], ", ".join(amounts), speedup])
    seeds = ", ".join(map(str, study["seeds"]))
    heads = ["", "unit", f"reached after, seeds {seeds}; > where censored", "speed-up"]
    return [page.paragraph(study["reach_rule"]), page.table(heads, rows)]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def curves_html(study: Mapping[str, Any]) -> str:
    """Return an HTML table with a row for each metric of each arm, and a column for each step that was evaluated."""
    points = {(p["metric"], p["arm"], p["step"]): Interval.from_dict(p["interval"]) for p in study["curves"]}
    rows = [
        [f"{metric}, {arm}", *[interval_text(points.get((metric, arm, step)), _form(metric)) for step in _steps(study)]]
        for metric, arm in dict.fromkeys((metric, arm) for metric, arm, _ in points)
    ]
    return page.table(["after steps", *map(str, _steps(study))], rows)


def _form(metric: str) -> str:
    return "{:.1%}" if metric == "pass@1" else "{:.3f}"


def _steps(study: Mapping[str, Any]) -> list[int]:
    """Return the steps at which all runs were evaluated."""
    return sorted({point["step"] for point in study["curves"]})


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


def _summary(study: Mapping[str, Any]) -> str:
    seeds = ", ".join(map(str, study["seeds"]))
    over = "seeds and tasks" if len(study["seeds"]) > 1 else "tasks: one seed says nothing about how others would do"
    return (
        f"Seeds {seeds}. Means over seeds; brackets are 95 % intervals by a bootstrap over {over}. Differences are in "
        "pairs of seed and task. Cross-entropies in nats per ENV_OUTPUT token, invalid calls per rollout. p is the "
        "bootstrap's, of no difference from the first arm after training; Holm's is corrected for the number of arms."
    )


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
