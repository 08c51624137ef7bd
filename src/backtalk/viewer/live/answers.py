"""Answer the page's questions as plain data, for the server and for a page that holds its own answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from backtalk.errors import DataError
from backtalk.trajectory import TokenRole
from backtalk.viewer.data import LOOKS
from backtalk.viewer.live.curves import describe, read_curves
from backtalk.viewer.live.knowledge import read_knowledge
from backtalk.viewer.live.query import parse_query, select, sorted_rows
from backtalk.viewer.live.rollout import Opened
from backtalk.viewer.live.search import Search
from backtalk.viewer.live.sources import Library, RunSource, Source
from backtalk.viewer.live.studies import read_studies
from backtalk.viewer.live.table import NUMBERS, RolloutTable, compute
from backtalk.viewer.live.world import WorldModel

MAX_ROWS = 500  # of the table, in one answer


class Viewer:
    """What the page asks for, as plain data."""

    def __init__(self, library: Library) -> None:
        self.library, self.table, self.search, self.model = library, RolloutTable(), Search(), WorldModel()

    def sources(self, params: Mapping[str, str]) -> Any:
        """Return all runs and files, with the roles that tokens can have."""
        roles = [{"role": role.name, "meaning": LOOKS[role][3]} for role in TokenRole]
        return {"sources": [describe(source) for source in self.library.sources().values()], "roles": roles}

    def curves(self, params: Mapping[str, str]) -> Any:
        """Return the curves of one run."""
        source = self.library.source(params.get("run", ""))
        if not isinstance(source, RunSource):
            raise DataError(f"{source.name} is a file of trajectories, which has no curves; open its rollouts")
        return read_curves(source)

    def rollouts(self, params: Mapping[str, str]) -> Any:
        """Return rows of the table that fit a query, ``offset`` to ``offset + limit`` of them, and counts."""
        sources = self._chosen(params)
        query = parse_query(params.get("q", ""))
        table, unread, problems = self.table.read(sources)
        table, snippets, unsearched = self._said(table.filter(select(table, query.conditions)), sources, query.words)
        table = sorted_rows(table, params.get("sort", "step"), params.get("order", "desc") != "asc")
        offset, limit = _number(params, "offset", 0), min(_number(params, "limit", 100), MAX_ROWS)
        rows = table.slice(offset, limit).to_pylist()
        for row in rows:
            row |= {"snippet": snippets.get((row["run"], row["part"], int(row["row"])))}
            row["failure"] = row["failure"] and json.loads(row["failure"])
        refusals = [f"{refusal.where}: {refusal.reason}" for source in sources for refusal in source.refusals]
        return {
            "total": table.num_rows,
            "rows": rows,
            "pending": unread + unsearched,
            "problems": problems + refusals,
            "means": _means(table),
            "stops": _counts(table, "stop"),
        }

    def world(self, params: Mapping[str, str]) -> Any:
        """Return each checkpoint's cross-entropies and calibration on scored rollouts, and where two differ most."""
        found = self.model.describe(self._chosen(params), params.get("before", ""), params.get("after", ""))
        return found | {"studies": read_studies(self._chosen(params))}

    def knowledge(self, params: Mapping[str, str]) -> Any:
        """Return the probes of each run's knowledge of its environment, and its dreams."""
        return read_knowledge(self._chosen(params))

    def studies(self, params: Mapping[str, str]) -> Any:
        """Return the comparisons of the studies that runs are of."""
        return read_studies(self._chosen(params))

    def rollout(self, params: Mapping[str, str]) -> Any:
        """Return one rollout as a conversation, with its siblings."""
        return self.describe(self._opened(params))

    def describe(self, opened: Opened) -> dict[str, Any]:
        """Return an opened rollout as a conversation, with its siblings."""
        rows = self.table.of_part(opened.source, opened.part).to_pylist()
        group = next((row["group"] for row in rows if row["row"] == opened.row), None)
        return {**opened.conversation(), "group": group, "siblings": [row for row in rows if row["group"] == group]}

    def tokens(self, params: Mapping[str, str]) -> Any:
        """Return every token of one rollout."""
        return self._opened(params).tokens()

    def record(self, params: Mapping[str, str]) -> Any:
        """Return one rollout as it is on record."""
        return self._opened(params).record()

    def _opened(self, params: Mapping[str, str]) -> Opened:
        return Opened.find(self.library.source(params.get("run", "")), params.get("part", ""), _number(params, "row"))

    def _chosen(self, params: Mapping[str, str]) -> list[Source]:
        names = [name for name in params.get("runs", "").split("\n") if name]
        return [self.library.source(name) for name in names] or list(self.library.sources().values())

    def _said(self, table: Any, sources: list[Source], words: tuple[str, ...]) -> tuple[Any, dict[Any, str], int]:
        """Return the rows in which all words were said, the text around them, and the number of files left."""
        import pyarrow as pa

        if not words:
            return table, {}, 0
        keys = list(zip(table["run"].to_pylist(), table["part"].to_pylist(), strict=True))
        found, pending = self.search.find(sources, words, set(keys))
        rows = table["row"].to_pylist()
        mask = [(*key, int(row)) in found for key, row in zip(keys, rows, strict=True)]
        return table.filter(pa.array(mask, pa.bool_())), found, pending


def _number(params: Mapping[str, str], name: str, default: int | None = None) -> int:
    try:
        return int(params[name]) if default is None or name in params else default
    except (KeyError, ValueError):
        raise DataError(f"{name} has to be a whole number, got {params.get(name)!r}") from None


def _means(table: Any) -> dict[str, float | None]:
    pc = compute()
    return {name: pc.mean(table[name]).as_py() for name in NUMBERS if name not in ("row", "group", "sample", "version")}


def _counts(table: Any, column: str) -> dict[str, int]:
    pc = compute()
    return {str(pair["values"]): pair["counts"] for pair in pc.value_counts(table[column]).to_pylist()}
