"""Results of a check: written after every measurement, so that a second call goes on where the first stopped."""

from __future__ import annotations

import gc
import json
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
FAILED = "failed"  # column of a row that has an error's text in place of numbers
NO_MEMORY = "out of memory"


class Results:
    """Rows of numbers by part and name, in ``gpu_check.json``, and as tables in ``gpu_check.md``."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder, self.path = folder, folder / "gpu_check.json"
        folder.mkdir(parents=True, exist_ok=True)
        saved = json.loads(self.path.read_text()) if self.path.exists() else {}
        if saved.get("about", about) != about:
            raise SystemExit(
                f"{self.path} is of another machine or other versions: {saved['about']}, here {dict(about)}; "
                "choose another --out"
            )
        self.about = about
        self.parts: dict[str, dict[str, Row]] = saved.get("parts", {})

    def has(self, part: str, name: str) -> bool:
        """Return whether a row is there already; rows that failed are measured again."""
        row = self.parts.get(part, {}).get(name)
        return row is not None and (FAILED not in row or row[FAILED].startswith(NO_MEMORY))

    def write(self, part: str, name: str, row: Row) -> None:
        """Add a row and write both files."""
        self.parts.setdefault(part, {})[name] = row
        self.path.write_text(json.dumps({"about": dict(self.about), "parts": self.parts}, indent=1) + "\n")
        (self.folder / "gpu_check.md").write_text(self.markdown())

    def markdown(self) -> str:
        """Return one table a part."""
        facts = ", ".join(f"{name} {value}" for name, value in self.about.items())
        tables = [f"## {part}\n\n{table(rows)}" for part, rows in self.parts.items()]
        return f"# {self.about['device']}\n\n{facts}\n\n" + "\n\n".join(tables) + "\n"

    @property
    def failures(self) -> list[str]:
        """Return the rows that failed, except for want of memory."""
        return [
            f"{part}, {name}: {row[FAILED]}"
            for part, rows in self.parts.items()
            for name, row in rows.items()
            if FAILED in row and not row[FAILED].startswith(NO_MEMORY)
        ]


class Part:
    """The measurements of one part within a limit of seconds."""

    def __init__(self, results: Results, name: str, seconds: float) -> None:
        self.results, self.name = results, name
        self.ends = time.monotonic() + seconds
        self.not_reached: list[str] = []

    @property
    def seconds_left(self) -> float:
        """Return the seconds left for this part."""
        return self.ends - time.monotonic()

    def measure(self, name: str, work: Callable[[], Row], *, expected_s: float) -> Row | None:
        """Measure one row, unless it is there already or ``expected_s`` would go beyond the limit; return it.

        An error becomes the row, and the next measurement goes on.
        """
        if self.results.has(self.name, name):
            return self.results.parts[self.name][name]
        if expected_s > self.seconds_left:
            self.not_reached.append(name)
            return None
        started = time.monotonic()
        try:
            row = work()
        except (torch.OutOfMemoryError, MemoryError) as error:
            row = {FAILED: f"{NO_MEMORY}: {str(error).splitlines()[0][:120] if str(error) else ''}"}
        except Exception as error:
            traceback.print_exc()
            row = {FAILED: f"{type(error).__name__}: {error}"[:300]}
        gc.collect()  # what the measurement held on the device
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        row["took_s"] = round(time.monotonic() - started, 2)
        self.results.write(self.name, name, row)
        print(f"{self.name}: {name}: {', '.join(f'{k} {show(v)}' for k, v in row.items())}", flush=True)
        return row


def table(rows: Mapping[str, Row]) -> str:
    """Return rows as a table in Markdown, with a column for each name that any row has."""
    columns: list[str] = list(dict.fromkeys(key for row in rows.values() for key in row if key != "took_s"))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(show(row.get(key, "")) for key in columns) + " |")
    return "\n".join(lines)


def show(value: Any) -> str:
    """Return a value for people: numbers with three digits, a list as a value with its interval."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 3:
        middle, low, high = value
        return f"{show(middle)} [{show(low)}, {show(high)}]"
    if not isinstance(value, float):
        return str(value).replace("|", "/").replace("\n", " ")
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
