"""Find rollouts in which a text was said: in their messages, or in their tokens where no messages are on record."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

from backtalk.errors import DataError
from backtalk.parquet import read_columns
from backtalk.viewer.live.sources import Part, Source, Stamp
from backtalk.viewer.live.table import compute

BUDGET_S = 0.6  # of one request
REMEMBERED = 2000  # files and words
_NAMES = {"role", "tool", "name", "tool_call_id", "id", "type"}  # fields of a message that nobody said
SNIPPET_CHARS = 60  # on each side of what was found


class Search:
    """Full-text search that reads one column of one file at a time and remembers which rows it found."""

    def __init__(self) -> None:
        self._found: OrderedDict[tuple[str, str, str], tuple[Stamp, dict[int, str]]] = OrderedDict()
        self._lock = Lock()

    def find(
        self, sources: Sequence[Source], words: Sequence[str], parts: set[tuple[str, str]], budget_s: float = BUDGET_S
    ) -> tuple[dict[tuple[str, str, int], str], int]:
        """Return an excerpt around the words by run, file and row, and the number of files not searched yet.

        Only files in ``parts`` are searched, for ``budget_s`` seconds, the newest first and one at least. Case does not
        count.
        """
        deadline, pending, searched = time.monotonic() + budget_s, 0, False
        found: dict[tuple[str, str, int], str] = {}
        with self._lock:
            for source in sources:
                for part in source.parts() if any(source.name == name for name, _ in parts) else ():
                    if (source.name, part.key) not in parts:
                        continue
                    if searched and time.monotonic() > deadline and not self._is_known(source, part, words):
                        pending += 1
                        continue
                    searched = True
                    rows = [self._rows(source, part, word) for word in words]
                    everywhere = set.intersection(*map(set, rows))
                    found |= {(source.name, part.key, row): rows[0][row] for row in everywhere}
        return found, pending

    def _is_known(self, source: Source, part: Part, words: Sequence[str]) -> bool:
        stamp = part.stamp
        known = (self._found.get((source.name, part.key, word.lower())) for word in words)
        return all(each is not None and each[0] == stamp for each in known)

    def _rows(self, source: Source, part: Part, word: str) -> Mapping[int, str]:
        """Return an excerpt around a word for each row of a file that holds it."""
        key, stamp = (source.name, part.key, word.lower()), part.stamp
        known = self._found.get(key)
        if known is None or known[0] != stamp:
            try:
                known = stamp, _matches(source, part, word)
            except DataError:  # removed by a resume while we looked
                known = stamp, {}
            self._found[key] = known
            while len(self._found) > REMEMBERED:
                self._found.popitem(last=False)
        return known[1]


def _matches(source: Source, part: Part, word: str) -> dict[int, str]:
    """Return a snippet of each row of a file in which a text was said."""
    pc = compute()
    column = read_columns(part.path, ["messages"])["messages"].combine_chunks()
    written = json.dumps(word)[1:-1]  # as it stands in the column, which is JSON
    mask = pc.match_substring(column, written, ignore_case=True)
    rows = pc.indices_nonzero(mask).to_pylist()
    found = {row: _snippet(json.loads(column[row].as_py()), word) for row in rows}
    found = {row: text for row, text in found.items() if text is not None}
    return found | _in_tokens(source, part, word, pc.indices_nonzero(pc.equal(column, "[]")).to_pylist())


def _snippet(messages: Sequence[Mapping[str, Any]], word: str) -> str | None:
    for message in messages:
        if text := around(_text(message), word):
            return text
    return None


def _text(value: Any) -> str:
    """Return all text in a message, whatever its shape."""
    if isinstance(value, Mapping):
        return "\n".join(filter(None, (_text(inner) for key, inner in value.items() if key not in _NAMES)))
    if isinstance(value, (list, tuple)):
        return "\n".join(filter(None, map(_text, value)))
    return value if isinstance(value, str) else ""


def around(text: str, word: str) -> str | None:
    """Return the text around a word, on one line; None if the word is not in it."""
    position = text.lower().find(word.lower())
    if position < 0:
        return None
    start, end = max(0, position - SNIPPET_CHARS), position + len(word) + SNIPPET_CHARS
    before, after = "…" if start else "", "…" if end < len(text) else ""
    return " ".join(f"{before}{text[start:end]}{after}".split())


def _in_tokens(source: Source, part: Part, word: str, rows: Sequence[int]) -> dict[int, str]:
    if not rows or source.tokenizer is None:
        return {}
    column = read_columns(part.path, ["token_ids"])["token_ids"]
    texts = ((row, source.tokenizer.decode(column[row].as_py(), skip_special_tokens=False)) for row in rows)
    return {row: found for row, text in texts if (found := around(text, word))}
