"""Sum up what scored rollouts tell of a checkpoint's world model: by tool and kind of output, how sure, and examples.

All of it is over the observation tokens that `backtalk score` scored: output of the environment, apart from what
repeats the command, and what the harness wrote.
"""

from __future__ import annotations

import heapq
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any

from backtalk.errors import DataError
from backtalk.parquet import read_first_rows
from backtalk.run.calibration import Calibration
from backtalk.run.log import trajectory_from_row
from backtalk.run.log.scores import read_scored, scores_from_row
from backtalk.trajectory import TokenRole, TokenScores, Trajectory, copied_tokens
from backtalk.viewer.data import text_of
from backtalk.viewer.live.sources import Part, Source, Stamp, parts_of

BUDGET_S = 0.4  # of one request; the files left are read by the next ones
MOST_ROLLOUTS = 400  # of one file, the first ones
EXAMPLES = 24
TOKENS_BEFORE = 10
KINDS = ("new", "repeats the command", "harness")


@dataclass
class Summary:
    """Sums over the observation tokens of one file at one checkpoint."""

    nats: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))  # by tool and kind
    tokens: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    calibration: Calibration = field(default_factory=Calibration)
    names_expected: bool = False

    def add(self, trajectory: Trajectory, scores: TokenScores, places: Sequence[tuple[int, str, str]]) -> None:
        """Add a rollout's observation tokens: positions with their tools and kinds."""
        self.names_expected = self.names_expected or bool(scores.expected)
        for i, tool, kind in places:
            self.nats[tool, kind] -= scores.logprobs[i]
            self.tokens[tool, kind] += 1
            self.calibration.add(scores, i)

    def merge(self, other: Summary) -> None:
        """Add another file's sums."""
        self.names_expected = self.names_expected or other.names_expected
        for key, count in other.tokens.items():
            self.tokens[key] += count
            self.nats[key] += other.nats[key]
        self.calibration.merge(other.calibration)

    def to_dict(self) -> dict[str, Any]:
        """Return cross-entropies by tool and kind, and the calibration, as plain data."""
        rows = [
            {"tool": tool, "kind": kind, "tokens": count, "ce": self.nats[tool, kind] / count}
            for (tool, kind), count in sorted(self.tokens.items(), key=lambda item: -item[1])
        ]
        total = sum(self.tokens.values())
        bins = [{"tokens": n, "sure": sure, "right": right} for n, sure, right in self.calibration.means() if n]
        return {
            "tokens": total,
            "ce": sum(self.nats.values()) / total if total else None,
            "rows": rows,
            "bins": bins if self.names_expected else [],
            "calibration_error": self.calibration.error if self.names_expected else None,
        }


@dataclass
class _Read:
    """What was read of one file: sums by checkpoint, and the tokens that differ most between two of them."""

    stamp: Stamp
    summaries: dict[str, Summary]
    examples: dict[tuple[str, str], list[dict[str, Any]]]
    rollouts: int


class WorldModel:
    """Sums of all scored files, kept by file until it changes."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], _Read] = {}
        self._lock = Lock()

    def describe(
        self, sources: Sequence[Source], before: str, after: str, budget_s: float = BUDGET_S
    ) -> dict[str, Any]:
        """Return sums by checkpoint, and what ``after`` predicts better and worse than ``before``.

        Files are read for ``budget_s`` seconds, one at least; ``pending`` are those left. Without names the first
        checkpoint is compared with the last.
        """
        deadline, pending, has_read, problems = time.monotonic() + budget_s, 0, False, []
        found: list[_Read] = []
        with self._lock:
            for source, part in _scored_parts(sources, problems):
                key, stamp = (source.name, part.key), part.stamp
                known = self._known.get(key)
                if known is None or known.stamp != stamp:
                    if has_read and time.monotonic() > deadline:
                        pending += 1
                        continue
                    has_read = True
                    try:
                        known = self._known[key] = _read(source, part, stamp)
                    except DataError as error:  # scored before the rollouts changed
                        problems.append(str(error))
                        continue
                found.append(known)
        names = list(dict.fromkeys(name for read in found for name in read.summaries))
        before, after = before if before in names else next(iter(names), ""), after if after in names else ""
        after = after or next((name for name in reversed(names) if name != before), "")
        examples = [example for read in found for example in read.examples.get((before, after), ())]
        return {
            "checkpoints": [{"name": name, **_merged(found, name).to_dict()} for name in names],
            "rollouts": sum(read.rollouts for read in found),
            "before": before,
            "after": after,
            "better": heapq.nlargest(EXAMPLES, examples, key=lambda example: example["gain"]),
            "worse": heapq.nsmallest(EXAMPLES, examples, key=lambda example: example["gain"]),
            "pending": pending,
            "problems": problems,
        }


def _merged(found: Sequence[_Read], name: str) -> Summary:
    total = Summary()
    for read in found:
        if name in read.summaries:
            total.merge(read.summaries[name])
    return total


def _scored_parts(sources: Sequence[Source], problems: list[str]) -> Iterator[tuple[Source, Part]]:
    return (pair for pair in parts_of(sources, problems) if pair[1].scores is not None and pair[1].scores.is_file())


def _read(source: Source, part: Part, stamp: Stamp) -> _Read:
    assert part.scores is not None
    names, known = read_scored(part.scores)
    rollouts = [trajectory_from_row(row) for row in read_first_rows(part.path, MOST_ROLLOUTS)]
    summaries = {name: Summary() for name in names}
    rows = [
        [scores_from_row(row) for row in read_first_rows(part.scores, len(rollouts), start=number * len(known))]
        for number in range(len(names))
    ]
    examples: dict[tuple[str, str], list[dict[str, Any]]] = {(a, b): [] for a in names for b in names if a != b}
    for number, (trajectory, *scores) in enumerate(zip(rollouts, *rows, strict=False)):
        if any(len(row.logprobs) != len(trajectory) for row in scores):
            raise DataError(f"{part.scores} is of other rollouts than {part.path}; score them again")
        places = list(_observed(trajectory))
        by_name = dict(zip(names, scores, strict=True))
        for name, row in by_name.items():
            summaries[name].add(trajectory, row, places)
        where = {"run": source.name, "part": part.key, "row": number, "task": trajectory.task_id}
        for (before, after), kept in examples.items():
            kept += _examples(source, trajectory, by_name, before, after, places, where)
    for pair, kept in examples.items():
        by_gain = sorted(kept, key=lambda example: example["gain"])
        examples[pair] = by_gain if len(by_gain) <= 2 * EXAMPLES else by_gain[:EXAMPLES] + by_gain[-EXAMPLES:]
    return _Read(stamp, summaries, examples, len(rollouts))


def _observed(trajectory: Trajectory) -> Iterator[tuple[int, str, str]]:
    """Yield position, tool and kind of each observation token."""
    spans = ((start, end, segment.role, segment.turn) for start, end, segment in trajectory.spans())
    copied = copied_tokens(trajectory.token_ids, spans)
    for start, end, segment in trajectory.spans():
        if segment.role in (TokenRole.ENV_OUTPUT, TokenRole.WARNING):
            for i in range(start, end):
                is_harness = segment.role is TokenRole.WARNING
                yield i, segment.tool or "", KINDS[2] if is_harness else KINDS[copied[i]]


def _examples(
    source: Source,
    trajectory: Trajectory,
    scores: Mapping[str, TokenScores],
    before: str,
    after: str,
    places: Sequence[tuple[int, str, str]],
    where: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Yield the token that got better most and the one that got worse most, each with what was expected there."""
    old, new = scores[before], scores[after]
    gains = [(new.logprobs[i] - old.logprobs[i], i) for i, _, kind in places if kind == KINDS[0]]
    ids, text = trajectory.token_ids, partial(text_of, source.tokenizer)
    for gain, i in {max(gains), min(gains)} if gains else ():
        yield {
            **where,
            "at": i,
            "gain": gain,
            "text_before": text(ids[max(0, i - TOKENS_BEFORE) : i]),
            "text": text(ids[i : i + 1]),
            "nats": [-old.logprobs[i], -new.logprobs[i]],
            "expected": [[text([token]) for token, _ in row.expected.get(i, ())[:1]] for row in (old, new)],
        }
