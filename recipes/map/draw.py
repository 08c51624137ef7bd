"""Draw the map of cells: where the world-model term helps, does nothing, and hurts.

    python recipes/map/draw.py [NAME=]STUDY[:ARM]... --out map.png

STUDY is the folder of a study, its study.json, or a file of recipes/reproduce_cpu; ARM has the term, and is ``echo``
without it. One line a cell: pass@1 of the arm minus the study's first arm, and minus ``shuffled`` where the study has
it, each with its 95 % interval: of the mean over the run where the study was evaluated during it, else after it. No
cell is left out for its sign.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

METRIC = "pass@1"
COLORS = {1: "#1a7f37", 0: "#6e7781", -1: "#cf222e"}
VERDICTS = {1: "helps", 0: "nothing found", -1: "hurts"}


class Difference(NamedTuple):
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """Return 1 or -1 where the interval is above or below 0, and 0 where it holds it."""
        return (self.low > 0) - (self.high < 0)

    def __neg__(self) -> Difference:
        return Difference(0 - self.value, 0 - self.high, 0 - self.low)


class Cell(NamedTuple):
    """One study: what the arm with the term is in it, less the control, and less the placebo where it has one."""

    name: str
    seeds: int
    over_run: bool
    control: Difference
    placebo: Difference | None


def read_cell(source: str, placebo: str = "shuffled") -> Cell:
    """Return the cell of [NAME=]STUDY[:ARM].

    Raises:
        ValueError: the study has no arm of that name after its first one, or no interval of its difference.
    """
    name, _, place = source.rpartition("=")
    place, _, echo = place.partition(":")
    echo = echo or "echo"
    path = Path(place) / "study.json" if Path(place).is_dir() else Path(place)
    study = json.loads(path.read_text())
    study = study.get("numbers", study)
    rows = {row["arm"]: row for row in study["results"] if row["metric"] == METRIC}
    if echo not in list(rows)[1:]:
        raise ValueError(
            f"{path} has the arms {list(rows)}; name the one with the term, not the first one, as in {path}:ARM"
        )
    over_run = len({point["step"] for point in study.get("curves", ())}) > 2
    control = difference(rows[echo]["over_run_against_first" if over_run else "against_first"])
    if control is None:
        raise ValueError(f"{path} has no interval of {echo} minus {next(iter(rows))}: too few tasks")
    pairs = {(row["arm"], row["minus"]): row for row in study.get("pairs", ()) if row["metric"] == METRIC}
    column = "over_run" if over_run else "after"
    against = difference(pairs[echo, placebo][column]) if (echo, placebo) in pairs else None
    turned = difference(pairs[placebo, echo][column]) if (placebo, echo) in pairs else None
    return Cell(name or study["study"], len(study["seeds"]), over_run, control, -turned if turned else against)


def difference(interval: Any) -> Difference | None:
    """Return an interval of study.json; None where it has no bounds."""
    if interval is None or interval.get("low") is None:
        return None
    return Difference(interval["value"], interval["low"], interval["high"])


def draw(cells: Sequence[Cell], out: Path) -> None:
    """Write the picture of cells, in the order of their differences from the control."""
    from matplotlib.figure import Figure

    cells = sorted(cells, key=lambda cell: cell.control.value)
    figure = Figure(figsize=(8, 1.6 + 0.6 * len(cells)), layout="constrained")
    axis = figure.subplots()
    for y, cell in enumerate(cells):
        for shown, dy, marker in ((cell.control, 0.1, "o"), (cell.placebo, -0.18, "s")):
            if shown is not None:
                errors = [[shown.value - shown.low], [shown.high - shown.value]]
                filled = "white" if marker == "s" else None
                style = {"color": COLORS[shown.sign], "markerfacecolor": filled, "capsize": 3}
                axis.errorbar([shown.value], [y + dy], xerr=errors, fmt=marker, **style)
    axis.axvline(0, color="#8c959f", linewidth=1)
    labels = [
        f"{c.name}\n{c.seeds} seed{'s' * (c.seeds != 1)}, {'over the run' if c.over_run else 'after'}" for c in cells
    ]
    axis.set_yticks(range(len(cells)), labels)
    axis.set(xlabel=f"difference of {METRIC}, 95 % interval", ylim=(-0.6, len(cells) - 0.4))
    told = ", ".join(f"{color}: {VERDICTS[sign]}" for sign, color in ((1, "green"), (0, "grey"), (-1, "red")))
    axis.set_title(
        f"with the world-model term, less the control (round) and less shuffled (square)\n{told}", fontsize=9
    )
    figure.savefig(out, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the map, and print it as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", metavar="[NAME=]STUDY[:ARM]")
    parser.add_argument("--out", type=Path, default=Path("map.png"))
    parser.add_argument("--placebo", default="shuffled", help="name of its placebo")
    args = parser.parse_args(arguments)
    cells = [read_cell(source, args.placebo) for source in args.studies]
    draw(cells, args.out)
    for cell in cells:
        parts = [("control", cell.control), *([("shuffled", cell.placebo)] if cell.placebo else [])]
        shown = "; ".join(
            f"less {what} {d.value:+.3f} [{d.low:.3f}, {d.high:.3f}], {VERDICTS[d.sign]}" for what, d in parts
        )
        print(f"{cell.name}, {cell.seeds} seeds: {shown}")


if __name__ == "__main__":
    main()
