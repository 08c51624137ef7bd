"""Read what runs measured of their policies' knowledge of the environment: both probes, examples, and dreams."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from backtalk.errors import DataError
from backtalk.files import read_json
from backtalk.run.log import RunLog
from backtalk.viewer.live.sources import RunSource, Source, Stamp, stamp_of

MOST_DREAMS = 24  # of one run, the last ones


def read_knowledge(sources: Iterable[Source]) -> list[dict[str, Any]]:
    """Return for each run that has any what was measured first and last, with examples, and its dreams.

    ``measured`` is a row for each set of rollouts, ``examples`` are the probes of recorded rollouts, the same in all
    runs of a study, by the policy before training (``first``) and after it (``last``).
    """
    runs = (_of_run(source.name, source.log) for source in sources if isinstance(source, RunSource))
    return [run for run in runs if run["measured"] or run["dreams"]]


def _of_run(name: str, log: RunLog) -> dict[str, Any]:
    steps = log.world_model_steps()
    paths = {"first": log.world_model_path(steps[0]), "last": log.world_model_path(steps[-1])} if steps else {}
    found = {end: _measured(path, stamp_of(path)) for end, path in paths.items()}
    measured = []
    for each in dict.fromkeys(each for sets in found.values() for each in sets):
        estimates = {end: sets.get(each, {}).get("estimates") for end, sets in found.items()}
        measured.append({"set": each, "steps": [steps[0], steps[-1]], **estimates})
    examples = {end: sets.get("recorded", {}).get("examples", []) for end, sets in found.items()}
    try:
        dreams = log.read_dreams()[-MOST_DREAMS:]
    except DataError:  # a line is being written
        dreams = []
    return {"run": name, "measured": measured, "examples": examples, "dreams": dreams}


@lru_cache(maxsize=256)
def _measured(path: Path, stamp: Stamp) -> dict[str, Any]:
    """Return the sets of rollouts of one file that were measured; ``stamp`` changes when the file does."""
    try:
        sets = read_json(path)["sets"]
        return {name: found for name, found in sets.items() if found}
    except (DataError, KeyError, AttributeError, TypeError):  # not whole yet, or of another version
        return {}
