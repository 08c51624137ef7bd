"""Answer the question of a cell by the rule that README.md states: does the term help, and by knowledge?

    python recipes/prediction_pays/analyse.py runs/B runs/A

The last two numbers of a cell are against its placebos: the term on shuffled observations, and the term in the world
that lies, whose gain is taken off.
"""

from __future__ import annotations

import sys
from pathlib import Path

from backtalk.evidence.compare import task_parts, trapezoid_weights
from backtalk.run.estimates import Parts, Resampled, combined, holm
from backtalk.run.log import RunLog

COMPARISONS = {
    "echo - grpo": {"echo": 1.0, "grpo": -1.0},
    "echo - shuffled": {"echo": 1.0, "shuffled": -1.0},
    "(echo - grpo) - (lying - grpo_lying)": {"echo": 1.0, "grpo": -1.0, "lying": -1.0, "grpo_lying": 1.0},
}


def pass_at_1(folder: Path) -> dict[int, Parts]:
    """Return the share of solved rollouts of each held-out task, with a weight of 1, by step."""
    log = RunLog(folder)
    return {step: task_parts(log.read_evaluation(step), "pass_at_1") for step in log.evaluation_steps()}


def over_run(study: Path, weights: dict[str, float], seeds: list[int]) -> Resampled:
    """Estimate a sum of arms' means over the run, in pairs of seed and task, with an interval over both."""
    parts, factors = [], []
    for arm, weight in weights.items():
        runs = [pass_at_1(study / f"{arm}_seed{seed}") for seed in seeds]
        steps = sorted(runs[0])
        parts += [[run[step] for run in runs] for step in steps]
        factors += [weight * share for share in trapezoid_weights(steps)]
    found = combined(parts, factors)
    assert found is not None
    return found


def verdict(gain: Resampled, shuffled: Resampled, lying: Resampled) -> str:
    """Return what the rule calls a cell with these three estimates."""
    if gain.interval.high < 0:
        return "hurts"
    if gain.interval.low <= 0:
        return "nothing found"
    return "helps by knowledge" if shuffled.interval.low > 0 and lying.interval.low > 0 else "helps by exposure"


def main() -> None:
    """Print the verdict and the estimates of each study that is named."""
    cells = [Path(name) for name in sys.argv[1:]]
    found = []
    for cell in cells:
        seeds = sorted({int(path.name.rpartition("seed")[2]) for path in cell.glob("echo_seed*")})
        if not seeds:
            sys.exit(f"{cell} holds no runs of echo; name the folders that backtalk study was given as --out")
        found.append([over_run(cell, weights, seeds) for weights in COMPARISONS.values()])
    corrected = holm([gain.p_value for gain, *_ in found])
    for cell, estimates, p in zip(cells, found, corrected, strict=True):
        print(f"{cell.name}: {verdict(*estimates)}; p of echo - grpo, Holm over the cells: {p:.3f}")
        for name, estimate in zip(COMPARISONS, estimates, strict=True):
            i = estimate.interval
            print(f"  {name}: {i.value:+.3f} [{i.low:.3f}, {i.high:.3f}]")


if __name__ == "__main__":
    main()
