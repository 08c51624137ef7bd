"""Draw the replays of one run on top of each other, and print how far apart they are.

python recipes/replay/picture.py OUT PICTURE

Differences are from the replay in float64.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_file

REFERENCE = "float64"
ENGINES = {"torch": "torch", "trl": "TRL", "tinker": "Tinker (SkyRL-JAX)"}
SERIES = {"policy_loss": "policy loss", "target_ce": "cross-entropy, nats a token", "grad_norm": "gradient norm"}


def read(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Return each replay's numbers by step."""
    found = {}
    for name in (REFERENCE, *ENGINES):
        if (file := folder / f"{name}.jsonl").is_file():
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = {key: [row[key] for row in rows] for key in rows[0]}
    return found


def draw(replays: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw the numbers on the left, and their distances from float64 on the right."""
    figure, axes = plt.subplots(len(SERIES), 2, figsize=(10, 8), sharex=True, layout="constrained")
    for (key, title), (values, differences) in zip(SERIES.items(), axes, strict=True):
        exact = replays[REFERENCE][key]
        for i, (name, label) in enumerate(ENGINES.items()):
            if name not in replays:
                continue
            numbers = replays[name][key]
            apart = [abs(a - b) for a, b in zip(numbers, exact, strict=True)]
            # Narrower from line to line, so that those below are seen.
            values.plot(numbers, color=f"C{i}", linewidth=9 - 2.5 * i, alpha=0.7, label=label)
            differences.semilogy(apart, color=f"C{i}", marker=".", label=label)
        values.set_title(title)
        differences.set_title(f"{title}: distance from float64")
    axes[0, 0].legend()
    for axis in axes[-1]:
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=110)


def table(folder: Path, replays: dict[str, dict[str, list[float]]]) -> str:
    """Return a Markdown table of the distances: in the first step, the largest, and of the adapters at the end."""
    keys = ("policy_loss", "world_model_loss", "total_loss", "target_ce", "grad_norm")
    lines = [f"| | {' | '.join(keys)} | adapters |", f"|---|{'---|' * (len(keys) + 1)}"]
    start, exact = (load_file(folder / f"{name}.safetensors") for name in ("start", REFERENCE))
    moved = _norm(exact, start)
    for name, label in ENGINES.items():
        if name not in replays:
            continue
        cells = []
        for key in keys:
            pairs = list(zip(replays[name][key], replays[REFERENCE][key], strict=True))
            apart = [abs(a - b) for a, b in pairs]
            cells.append(f"{apart[0]:.1e}, {max(apart):.1e}")
        cells.append(f"{_norm(load_file(folder / f'{name}.safetensors'), exact) / moved:.1e}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _norm(ones: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    return sum(float((ones[name].double() - others[name].double()).square().sum()) for name in others) ** 0.5


if __name__ == "__main__":
    out, picture = map(Path, sys.argv[1:])
    replays = read(out)
    draw(replays, picture)
    print(table(out, replays))
