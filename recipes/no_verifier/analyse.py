"""Print what README.md asks of pass@1: after the run, and as the mean over it, less that before, for both arms.

python recipes/no_verifier/analyse.py runs/no_verifier
"""

from __future__ import annotations

import sys
from pathlib import Path

from backtalk.evidence.compare import task_parts, trapezoid_weights
from backtalk.run.estimates import combined
from backtalk.run.log import RunLog


def main() -> None:
    """Print two estimates an arm, with intervals over seeds and tasks."""
    study = Path(sys.argv[1])
    for arm in ("env_only", "shuffled"):
        runs = [RunLog(folder) for folder in sorted(study.glob(f"{arm}_seed*"))]
        steps = sorted(runs[0].evaluation_steps())
        parts = [[task_parts(run.read_evaluation(step), "pass_at_1") for run in runs] for step in steps]
        last = [0.0] * (len(steps) - 1) + [1.0]
        for name, weights in {"after": last, "over the run": trapezoid_weights(steps)}.items():
            found = combined([*parts, parts[0]], [*weights, -1.0])
            assert found is not None
            i = found.interval
            print(f"{arm}, {name} less before: {i.value:+.3f} [{i.low:.3f}, {i.high:.3f}]")


if __name__ == "__main__":
    main()
