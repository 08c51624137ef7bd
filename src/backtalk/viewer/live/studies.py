"""Read the comparisons of finished studies that runs are of."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from backtalk.viewer.live.sources import RunSource, Source


def read_studies(sources: Iterable[Source]) -> list[dict[str, Any]]:
    """Return the content of each study's study.json without its curves, which the charts draw."""
    folders = dict.fromkeys(source.log.folder.resolve().parent for source in sources if isinstance(source, RunSource))
    found = []
    for folder in folders:
        try:
            study = json.loads((folder / "study.json").read_bytes())
            found.append({name: study[name] for name in study if name != "curves"} | {"results": study["results"]})
        except (OSError, ValueError, TypeError, KeyError):  # no study, or not whole yet
            continue
    return found
