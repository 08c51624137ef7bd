"""Draw the curves of a run as PNG. Matplotlib is loaded when one is drawn, and never opens a window."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]

# Metric: (label, colour); the colours are those that tokens of the role have on the page.
ROLE_METRICS = {
    "action_tokens": ("action", "#4ac26b"),
    "env_output_tokens": ("env output", "#54aeff"),
    "warning_tokens": ("warning", "#d4a72c"),
}
# Metric: label.
GRAD_NORMS = {
    "grad_norm": "both terms, before clipping",
    "policy_grad_norm_weights": "policy term",
    "world_grad_norm_weights": "world-model term at coefficient 1",
}
SHARES = {"world_grad_share": "its share", "grad_cosine": "cosine with the policy term's"}
BEHAVIOUR = {"num_turns": "turns", "invalid_calls": "invalid calls", "command_timeouts": "time-outs"}


def draw_run(metrics: Rows, evaluations: Mapping[int, Mapping[str, Any]]) -> Any:
    """Return a figure of eight panels over training steps.

    They show reward, cross-entropy, gradient norms, the world-model term's share of them, tokens, time, behaviour and
    coefficient.

    Metrics and estimates that the run did not measure have no curve.
    """
    figure, axes = new_figure(2, 4)
    (reward, ce, norm, share), (tokens, seconds, behaviour, coeff) = axes
    steps = [row["step"] for row in metrics]
    _line(reward, metrics, "reward", "reward of the step")
    _line(reward, metrics, "solved", "share solved", dashed=True)  # dashed, because both curves often coincide
    _points(reward, evaluations, "pass_at_1", "held-out pass@1")
    reward.set(title="reward", ylim=(-0.02, 1.02))
    _line(ce, metrics, "env_output_ce", "training rollouts")
    _points(ce, evaluations, "env_ce_recorded", "held-out, recorded")
    _points(ce, evaluations, "env_ce_own", "held-out, own")
    ce.set(title="env-output cross-entropy, nats/token", ylim=(0, None))
    for axis, lines in ((norm, GRAD_NORMS), (share, SHARES), (behaviour, BEHAVIOUR)):
        for name, label in lines.items():
            _line(axis, metrics, name, label)
    norm.set(title="gradient norm over all weights")
    if any((row.get(name) or 0) > 0 for row in metrics for name in GRAD_NORMS):  # a run may have had no gradient
        norm.set_yscale("log")
    share.set(title="gradient of the world-model term", ylim=(None, 1.02))
    _line(coeff, metrics, "world_model_coeff", "as used")
    coeff.set(title="world_model_coeff", ylim=(0, None))
    columns = {label: _column(metrics, name) for name, (label, _) in ROLE_METRICS.items()}
    stack(tokens, steps, columns, [color for _, color in ROLE_METRICS.values()])
    tokens.set(title="tokens a step, by role")
    stack(seconds, steps, _time_parts(metrics), ["#8250df", "#bf8700", "#8c959f"])
    seconds.set(title="seconds a step")
    behaviour.set(title="per rollout, on average", ylim=(0, None))
    for axis in (tokens, seconds, behaviour, coeff):
        axis.set_xlabel("training step", fontsize=8)
    return figure


def new_figure(rows: int, columns: int, width: float = 4.2, height: float = 3.0) -> tuple[Any, Any]:
    """Return a figure with a grid of axes, made without pyplot: no global state, no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def finish(figure: Any) -> bytes:
    """Add grid and legends; return the figure as PNG bytes."""
    from matplotlib.ticker import MaxNLocator

    for axis in figure.axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10)
        axis.tick_params(labelsize=8)
        if isinstance(locator := axis.xaxis.get_major_locator(), MaxNLocator):  # of steps, not of names
            locator.set_params(integer=True)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=7, framealpha=0.85, edgecolor="none")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def stack(axis: Any, steps: Sequence[int], parts: Mapping[str, Sequence[float]], colors: Sequence[str]) -> None:
    """Draw stacked areas; a single step as a bar, because an area over one point is invisible."""
    if len(steps) > 1:
        axis.stackplot(steps, *parts.values(), labels=list(parts), colors=colors, alpha=0.8)
        axis.margins(y=0.25)  # room for the legend above
        return
    bottom = 0.0
    for (label, values), color in zip(parts.items(), colors, strict=True):
        axis.bar(list(steps), list(values), bottom=bottom, label=label, color=color, alpha=0.8)
        bottom += sum(values)


def band(
    axis: Any, steps: Sequence[float], intervals: Sequence[Mapping[str, Any]], label: str, color: str | None = None
) -> None:
    """Draw estimates with error bars, their 95 % intervals."""
    values = [interval["value"] for interval in intervals]
    low = [v - (v if i["low"] is None else i["low"]) for v, i in zip(values, intervals, strict=True)]
    high = [(v if i["high"] is None else i["high"]) - v for v, i in zip(values, intervals, strict=True)]
    errors = [[max(x, 0.0) for x in low], [max(x, 0.0) for x in high]]
    style = {"marker": "o", "markersize": 4, "linewidth": 1.2, "capsize": 2}
    axis.errorbar(list(steps), values, yerr=errors, color=color, label=label, **style)


def _line(axis: Any, metrics: Rows, name: str, label: str, *, dashed: bool = False) -> None:
    points = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
    if points:
        steps, values = zip(*points, strict=True)
        style = {"linewidth": 1.2, "linestyle": "--" if dashed else "-", "marker": "." if len(points) < 3 else None}
        axis.plot(steps, values, label=label, **style)


def _points(axis: Any, evaluations: Mapping[int, Mapping[str, Any]], name: str, label: str) -> None:
    steps = [step for step in sorted(evaluations) if evaluations[step].get(name)]
    if steps:
        band(axis, steps, [evaluations[step][name] for step in steps], label)


def _column(metrics: Rows, name: str) -> list[float]:
    return [float(row.get(name) or 0.0) for row in metrics]


def _time_parts(metrics: Rows) -> dict[str, list[float]]:
    rollout = _column(metrics, "rollout_seconds")
    share = _column(metrics, "sandbox_share")
    return {
        "sampling": [seconds * (1 - s) for seconds, s in zip(rollout, share, strict=True)],
        "sandbox": [seconds * s for seconds, s in zip(rollout, share, strict=True)],
        "training": _column(metrics, "train_seconds"),
    }
