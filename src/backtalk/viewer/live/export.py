"""Write the page over runs, studies and files as one file, with the answers to all that can be asked of it.

Every run's curves and every rollout's facts are in it; conversations and tokens of as many rollouts as a budget of
tokens allows, the last and the first steps before others, each run in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import permutations, zip_longest
from pathlib import Path
from typing import Any

from backtalk.errors import BacktalkError
from backtalk.files import write_bytes
from backtalk.viewer.live.answers import Viewer
from backtalk.viewer.live.page import one_file, packed
from backtalk.viewer.live.rollout import Opened
from backtalk.viewer.live.sources import Library, RunSource
from backtalk.viewer.live.table import NUMBERS, TEXT

MAX_TOKENS = 1_000_000  # of the rollouts inside: about ten megabytes
MAX_PAIRS = 12  # of checkpoints that the page of the world model compares


def write_page(paths: Sequence[Path], out: Path, *, model: str | None = None, max_tokens: int = MAX_TOKENS) -> Path:
    """Write one self-contained page over everything in ``paths``; return ``out``.

    Raises:
        DataError: it cannot be written.
    """
    library = Library(paths, model)
    try:
        write_bytes(out, one_file(_frozen(Viewer(library), library, max_tokens)).encode())
    finally:
        library.close()
    return out


def _frozen(viewer: Viewer, library: Library, max_tokens: int) -> dict[str, Any]:
    rows, problems = _rows(viewer)
    runs = [name for name, source in library.sources().items() if isinstance(source, RunSource)]
    curves = {}
    for name in runs:
        try:
            curves[name] = viewer.curves({"run": name})
        except BacktalkError as error:
            problems.append(f"{name}: {error}")
    held = {}
    for row in _chosen(rows, max_tokens):
        try:
            held[f"{row['run']}\n{row['part']}\n{int(row['row'])}"] = packed(_rollout(viewer, row))
        except BacktalkError as error:
            problems.append(f"{row['run']}: {error}")
    index = {
        "written": f"{datetime.now().astimezone():%F %T %z}",
        "sources": viewer.sources({}),
        "curves": curves,
        "rows": rows,
        "problems": list(dict.fromkeys(problems)),
        "numbers": NUMBERS,
        "texts": TEXT,
        "world": _world(viewer),
        "knowledge": viewer.knowledge({}),
    }
    return {"index": packed(index), "rollouts": held}


def _rows(viewer: Viewer) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the facts of all rollouts, and what could not be read."""
    rows: list[dict[str, Any]] = []
    while True:
        found = viewer.rollouts({"limit": "500", "offset": str(len(rows))})
        if found["pending"]:  # a file that is read later changes the order
            rows = []
            continue
        rows += found["rows"]
        if len(rows) >= found["total"] or not found["rows"]:
            return rows, found["problems"]


def _chosen(rows: Sequence[Mapping[str, Any]], max_tokens: int) -> Iterator[Mapping[str, Any]]:
    """Yield rollouts within a budget of tokens: of each run in turn the last steps, then the first, then the others."""
    by_run: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        by_run.setdefault(row["run"], {}).setdefault(row["part"], []).append(row)
    left = max_tokens
    for parts in zip_longest(*(_by_interest(parts) for parts in by_run.values())):
        for row in (row for part in parts for row in part or ()):
            if row["tokens"] > left:
                continue
            left -= row["tokens"]
            yield row


def _by_interest(parts: Mapping[str, list[Mapping[str, Any]]]) -> list[list[Mapping[str, Any]]]:
    names = sorted(parts, key=lambda name: parts[name][0]["step"] or 0)
    kinds = [[name for name in names if name.startswith(kind)] for kind in ("train", "eval")]
    ends = [name for kind in kinds for name in kind[-1:]] + [name for kind in kinds for name in kind[:1]]
    return [parts[name] for name in dict.fromkeys([*ends, *reversed(names)])]


def _rollout(viewer: Viewer, row: Mapping[str, Any]) -> dict[str, Any]:
    opened = Opened.find(viewer.library.source(row["run"]), row["part"], int(row["row"]))
    messages = [dict(message) for message in opened.trajectory.messages]
    return {"rollout": viewer.describe(opened), "tokens": opened.tokens(), "messages": messages}


def _world(viewer: Viewer) -> dict[str, Any]:
    """Return the answers about world models, by the two checkpoints that are compared."""
    while (found := viewer.world({}))["pending"]:
        pass
    names = [checkpoint["name"] for checkpoint in found["checkpoints"]]
    pairs = [*permutations(names, 2)][:MAX_PAIRS]
    answers = {f"{a}\n{b}": viewer.world({"before": a, "after": b}) for a, b in pairs}
    return {"": found, **answers}
