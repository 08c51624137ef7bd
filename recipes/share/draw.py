"""Draw what a fixed coefficient and a share are, and what they do, from what measure.py and the studies left.

python recipes/share/draw.py --out share --old old_base --present present_base
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backtalk.viewer.web.curves import new_figure
from measure import COEFFICIENTS, TRAINED, shares

RED, BLUE = COLORS = ("#cf222e", "#0969da")  # a fixed coefficient, a share
KIND_NAMES = {"actions": "fresh", "both": "both halves"}
MARKS = dict(zip(TRAINED, "osD", strict=True))
ARMS = {"fixed_0_1": ("fixed 0.1", RED), "share_0_2": ("share 0.2", BLUE)}


def model_name(entry: dict[str, Any]) -> str:
    """Return the label of a model."""
    return f"{entry['parameters'] / 1e6:.2f} M\n{KIND_NAMES[entry['model'].partition('_')[0]]}"


def places(results: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """Return a place on the axis for each model, fresh ones first, and its label."""
    models = {e["model"]: e for e in results.values()}
    order = sorted(models, key=lambda m: (m.partition("_")[0], models[m]["parameters"]))
    return {m: (i, model_name(models[m])) for i, m in enumerate(order)}


def draw_norms(axis: Any, norms: dict[str, Any]) -> None:
    """Draw the share of each normaliser on the model as it is."""
    for name, (x, _) in places(norms).items():
        for dx, key, color in ((-0.15, "fixed", RED), (0.15, "kept", BLUE)):
            for rows in norms[name]["result"].values():
                seen = [row[key] for row in rows if row[key] == row[key]]
                if seen:
                    axis.plot([x + dx], [statistics.median(seen)], "o", color=color, alpha=0.55, markersize=4)
    axis.set(title="share of the gradient, ten choices of normaliser and targets", ylim=(0, 1))


def trained_of(trained: dict[str, Any], coefficient: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield model, normaliser and result of the trained runs of a setting."""
    for entry in trained.values():
        if entry["result"]["coefficient"] == coefficient:
            yield entry["model"], entry["result"]["normaliser"], entry["result"]


def draw_trained(share: Any, effect: Any, trained: dict[str, Any]) -> None:
    """Draw the realised share and the change of cross-entropy of each trained run."""
    place = places(trained)
    for side, coefficient, color in zip((-1, 1), COEFFICIENTS, COLORS, strict=True):
        for model, normaliser, result in trained_of(trained, coefficient):
            x = place[model][0] + 0.15 * side + 0.07 * (TRAINED.index(normaliser) - 1)
            seen, mark = shares(result), MARKS[normaliser]
            if seen:
                m = statistics.median(seen)
                share.errorbar([x], [m], [[m - min(seen)], [max(seen) - m]], fmt=mark, color=color, ms=4, lw=1)
            effect.plot([x], [result["recorded_ce"][-1] - result["recorded_ce"][0]], mark, color=color, markersize=4)
    share.set(title="the same, in training: median, least, most of the steps", ylim=(0, 1))
    effect.set(title="cross-entropy of recorded output, change in nats a token")
    for name, mark in MARKS.items():
        effect.plot([], [], mark, color="#57606a", markersize=4, label=name)


def draw_reward(axis: Any, studies: dict[str, dict[str, Any]]) -> None:
    """Draw pass@1 after training less that of GRPO, with its interval."""
    for x, study in enumerate(studies.values()):
        found = {r["arm"]: r["against_first"] for r in study["results"] if r["metric"] == "pass@1"}
        for side, (arm, (_, color)) in zip((-0.1, 0.1), ARMS.items(), strict=True):
            if difference := found.get(arm):
                value, low, high = (difference[key] for key in ("value", "low", "high"))
                axis.errorbar([x + side], [value], [[value - low], [high - value]], fmt="o", color=color, capsize=3)
    axis.set_xticks(range(len(studies)), studies)
    axis.set(title="pass@1 after training, less GRPO's", xlim=(-0.5, len(studies) - 0.5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("share"), help="holds norms.json and trained.json")
    parser.add_argument("--old", type=Path, default=Path("old_base"), help="study of the old base model")
    parser.add_argument("--present", type=Path, default=Path("present_base"), help="study of the present base model")
    args = parser.parse_args()
    norms, trained = (json.loads((args.out / f"{part}.json").read_text()) for part in ("norms", "trained"))
    figure, axes = new_figure(2, 2, width=5.6, height=3.4)
    (by_norms, by_steps), (effect, reward) = axes
    draw_norms(by_norms, norms)
    draw_trained(by_steps, effect, trained)
    paths = {"fresh base\n(the first one)": args.old, "both halves\n(the present one)": args.present}
    draw_reward(reward, {name: json.loads((path / "study.json").read_text()) for name, path in paths.items()})
    for axis, results in ((by_norms, norms), (by_steps, trained), (effect, trained)):
        axis.set_xticks(*zip(*places(results).values(), strict=True), fontsize=7)
    for axis in (by_norms, by_steps):
        axis.axhline(0.2, color="#8c959f", linewidth=1, linestyle=":")
        for label, color in zip(COEFFICIENTS, COLORS, strict=True):
            axis.plot([], [], "o", color=color, markersize=4, label=label)
    for label, color in ARMS.values():
        reward.plot([], [], "o", color=color, label=label)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(9)
        axis.legend(fontsize=7)
    for axis in (effect, reward):
        axis.axhline(0, color="#8c959f", linewidth=1, linestyle=":")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    (args.out / "share.png").write_bytes(out.getvalue())


if __name__ == "__main__":
    main()
