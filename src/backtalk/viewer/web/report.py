"""Write the report of a run folder: one self-contained page, and its curves as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backtalk.errors import DataError
from backtalk.files import write_bytes
from backtalk.run.estimates import Interval, interval_text
from backtalk.run.log import RunLog
from backtalk.trajectory import TrajectoryGroup
from backtalk.viewer.data import ShownRollout, load_tokenizer, token_texts
from backtalk.viewer.web import page
from backtalk.viewer.web.curves import draw_run, finish

EVALUATION_ROWS = (
    ("pass@1", "pass_at_1", "{:.1%}"),
    ("pass@k", "pass_at_k", "{:.1%}"),
    ("reward", "reward", "{:.3f}"),
    ("env CE on recorded trajectories, nats/token", "env_ce_recorded", "{:.3f}"),
    ("env CE on own rollouts, nats/token", "env_ce_own", "{:.3f}"),
)


def write_report(folder: str | Path) -> Path:
    """Write report.html and curves.png into a run folder, finished or not; return the path of the page.

    Raises:
        DataError: the folder is no run.
    """
    log = RunLog(folder)
    config, metrics = log.read_config(), log.read_metrics()
    evaluations = {step: log.read_evaluation(step) for step in log.evaluation_steps()}
    curves = finish(draw_run(metrics, evaluations))
    write_bytes(log.folder / "curves.png", curves)
    parts = [
        page.paragraph(_summary(config, metrics)),
        page.image(curves, "curves of the run"),
        page.section("Held-out tasks", _evaluation_table(evaluations)),
        page.section("Rollouts", page.legend(), *_trajectories(log)),
        page.section("Settings", page.settings(config)),
    ]
    path = log.folder / "report.html"
    write_bytes(path, page.page(f"backtalk run {log.folder.resolve().name}", parts).encode())
    return path


def _summary(config: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    rollouts = sum(int(row.get("rollouts") or 0) for row in metrics)
    seconds = sum((row.get("rollout_seconds") or 0.0) + (row.get("train_seconds") or 0.0) for row in metrics)
    objective = config["objective"]
    coeff = objective["world_model_coeff"]
    if isinstance(coeff, Mapping):  # a schedule or a share
        used = [row["world_model_coeff"] for row in metrics if row.get("world_model_coeff") is not None]
        coeff = f"{dict(coeff)}" + (f" ({min(used):.3g} to {max(used):.3g})" if used else "")
    return (
        f"{len(metrics)} of {config['steps']} steps, {rollouts} rollouts, {seconds / 60:.1f} minutes of training. "
        f"Model {config['engine']['model']}, tasks {config['tasks']['source']}, policy_coeff "
        f"{objective['policy_coeff']}, world_model_coeff {coeff} on "
        f"{objective['world_loss_target']} tokens."
    )


def evaluation_rows(evaluations: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return table rows: a label, then a cell for each evaluation, given as plain data."""
    first, rows = evaluations[0], []
    for label, name, form in EVALUATION_ROWS:
        if name == "pass_at_k" and first["samples_per_task"] == 1:
            continue  # pass@1 once more
        label = label.replace("@k", f"@{first['samples_per_task']}")
        rows.append([label, *[interval_text(Interval.from_dict(e.get(name)), form) for e in evaluations]])
    for name in first["per_rollout"]:
        label = f"{name.removeprefix('num_').replace('_', ' ')} per rollout"
        rows.append([label, *[_number(e["per_rollout"], name) for e in evaluations]])
    return [*rows, ["rollouts without a reward", *[str(e["no_reward"]) for e in evaluations]]]


def _number(row: Mapping[str, float], name: str) -> str:
    return f"{row[name]:.2f}" if name in row else "-"


def _evaluation_table(evaluations: Mapping[int, Mapping[str, Any]]) -> str:
    if not evaluations:
        return page.paragraph("not measured")
    header = ["", *[f"after {step} steps" for step in evaluations]]
    return page.table(header, evaluation_rows(list(evaluations.values())))


def _trajectories(log: RunLog) -> list[str]:
    steps = log.group_steps()
    if not steps:
        return [page.paragraph("no step has finished yet")]
    try:
        tokenizer = load_tokenizer(log.tokenizer_path)
    except DataError as error:
        return [page.paragraph(str(error))]
    parts = []
    for step in dict.fromkeys((steps[0], steps[-1])):
        groups = log.read_groups(step)
        weights = log.read_weights(step, groups)
        for number, sample in _best_and_worst(groups):
            chosen = groups[number].trajectories[sample]
            title = f"training step {step}, group {number}, sample {sample}"
            row = weights[number][sample] if weights else None
            shown = ShownRollout(chosen, token_texts(tokenizer, chosen.token_ids), row, title)
            parts.append(page.trajectory(shown, opened=not parts))
    return parts


def _best_and_worst(groups: Sequence[TrajectoryGroup]) -> list[tuple[int, int]]:
    """Return (group, sample) of the highest and of the lowest reward; of the longer rollout where rewards are equal."""
    scored = [
        (trajectory.reward, trajectory.num_turns, number, sample)
        for number, group in enumerate(groups)
        for sample, trajectory in enumerate(group)
        if trajectory.reward is not None
    ]
    if not scored:
        return [(0, 0)]
    best = max(scored)
    worst = min(scored, key=lambda row: (row[0], -row[1]))
    return list(dict.fromkeys(row[2:] for row in (best, worst)))
