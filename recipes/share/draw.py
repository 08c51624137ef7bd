"""Draw what a fixed coefficient and a share are, and what they do, from what measure.py and the studies left.

python recipes/share/draw.py --results recipes/share/results --out docs/share.png
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backtalk.viewer.report.curves import new_figure
from measure import COEFFICIENTS, NORMALISERS, TRAINED

RED, BLUE = "#cf222e", "#0969da"  # a fixed coefficient, a share
COLORS = dict(zip(COEFFICIENTS, (RED, BLUE), strict=True))
KINDS = {"actions": ("fresh", "o", "--"), "both": ("both halves", "s", "-")}
BASES = ("actions_first", "both_medium")  # the package's first base model and its present one
ARMS = {"fixed_0_1": RED, "share_0_2": BLUE}
# pass@1 less GRPO's of the share on the present base model, from docs/demo.md
DEMO = {"arm": "share_0_2", "metric": "pass@1", "against_first": {"value": -0.009, "low": -0.030, "high": 0.011}}

Results = Mapping[str, Mapping[str, Any]]


def draw_sizes(share: Any, effect: Any, trained: Results) -> None:
    """Draw share and effect of the trained models of several sizes, with the default normaliser."""
    for coefficient, color in COLORS.items():
        for kind, (label, mark, line) in KINDS.items():
            names = [f"{kind}_{size}/sequence_mean/{coefficient}" for size in ("small", "medium", "large")]
            entries = [trained[name] for name in names]
            sizes, results = [e["parameters"] for e in entries], [e["result"] for e in entries]
            middle = [r["share"][0] for r in results]
            spread = [[abs(r["share"][end] - r["share"][0]) for r in results] for end in (1, 2)]
            style = {"marker": mark, "linestyle": line, "color": color, "markersize": 4}
            share.errorbar(sizes, middle, spread, capsize=3, label=f"{coefficient}, {label}", **style)
            effect.plot(sizes, [r["recorded_ce"][1] - r["recorded_ce"][0] for r in results], **style)
    for axis in (share, effect):
        axis.set_xscale("log")
        axis.set_xticks(sizes, [f"{size / 1e6:.2f} M" for size in sizes], fontsize=7)
        axis.minorticks_off()


def draw_norms(axis: Any, norms: Results) -> None:
    """Draw the share of each normaliser on the models as they are: of 0.05, and as a controller keeps it."""
    for base in BASES:
        label, mark, _ = KINDS[base.partition("_")[0]]
        for (key, coefficient), side in zip((("fixed", "0.05"), ("kept", "share 0.2")), (-0.15, 0.15), strict=True):
            rows = [norms[base]["result"][name] for name in NORMALISERS]
            middle = [statistics.median(x[key] for x in batches if not math.isnan(x[key])) for batches in rows]
            places = [x + side for x in range(len(middle))]
            axis.plot(places, middle, mark, color=COLORS[coefficient], ms=4, label=f"{coefficient}, {label}")
    axis.set_xticks(range(len(NORMALISERS)), list(NORMALISERS), fontsize=6, rotation=30, ha="right")


def draw_trained(share: Any, effect: Any, trained: Results) -> None:
    """Draw share and effect in training with the normalisers that weigh the term least and most."""
    places = [(base, normaliser) for base in BASES for normaliser in TRAINED[:2]]
    for coefficient, color in COLORS.items():
        side = 0.1 if color == BLUE else -0.1
        for x, (base, normaliser) in enumerate(places):
            if entry := trained.get(f"{base}/{normaliser}/{coefficient}"):
                mark, result = KINDS[base.partition("_")[0]][1], entry["result"]
                m, low, high = result["share"]
                share.errorbar([x + side], [m], [[m - low], [high - m]], fmt=mark, color=color, capsize=3, ms=4)
                effect.plot([x + side], [result["recorded_ce"][1] - result["recorded_ce"][0]], mark, color=color, ms=4)
    labels = ["\n".join((KINDS[base.partition("_")[0]][0], *name.split(", "))) for base, name in places]
    for axis in (share, effect):
        axis.set_xticks(range(len(places)), labels, fontsize=6)


def draw_reward(axis: Any, studies: Mapping[str, list[Mapping[str, Any]]]) -> None:
    """Draw pass@1 after training less that of GRPO, with its interval."""
    for x, results in enumerate(studies.values()):
        found = {r["arm"]: r["against_first"] for r in results if r["metric"] == "pass@1"}
        for arm, color in ARMS.items():
            if difference := found.get(arm):
                value, low, high = (difference[key] for key in ("value", "low", "high"))
                place = x + (0.1 if color == BLUE else -0.1)
                axis.errorbar([place], [value], [[value - low], [high - value]], fmt="o", color=color, capsize=3, ms=4)
    axis.set_xticks(range(len(studies)), list(studies), fontsize=7)
    axis.set_xlim(-0.5, len(studies) - 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--out", type=Path, default=Path("share.png"))
    args = parser.parse_args()
    norms, trained, old = (
        json.loads((args.results / f"{n}.json").read_text()) for n in ("norms", "trained", "old_base")
    )
    figure, axes = new_figure(2, 3, width=4.6, height=3.5)
    (by_size, by_normaliser, in_training), (ce_by_size, ce_by_normaliser, reward) = axes
    draw_sizes(by_size, ce_by_size, trained)
    draw_norms(by_normaliser, norms)
    draw_trained(in_training, ce_by_normaliser, trained)
    draw_reward(reward, {"fresh base: 0.1, share 0.2": old["results"], "both halves: share 0.2": [DEMO]})
    by_size.set_title("what it is: share of the gradient, by size")
    by_normaliser.set_title("by normaliser and targets, before training")
    in_training.set_title("in training, least and most of them")
    ce_by_size.set_title("what it does: recorded cross-entropy, nats a token")
    ce_by_normaliser.set_title("the same, least and most of the normalisers")
    reward.set_title("pass@1 after training, less GRPO's")
    for axis in axes[0]:
        axis.set_yscale("log")
        axis.set_ylim(0.003, 1)
        axis.axhline(0.2, color="#8c959f", linewidth=1, linestyle=":")
    for axis in axes[1]:
        axis.axhline(0, color="#8c959f", linewidth=1, linestyle=":")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(9)
    by_size.legend(fontsize=6, loc="lower left")
    by_normaliser.legend(fontsize=6, loc="lower right")
    figure.savefig(args.out, format="png", dpi=110)


if __name__ == "__main__":
    main()
