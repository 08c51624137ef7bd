"""Read the curves of runs: metrics by step, evaluations with intervals, warnings of the guard, settings."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from backtalk.errors import BacktalkError, DataError
from backtalk.run.config import config_from_dict
from backtalk.run.guard import Guard
from backtalk.run.log import RunLog
from backtalk.settings import flatten
from backtalk.viewer.live.sources import RunSource, Source, Stamp, stamp_of

REMEMBERED = 128  # runs whose curves are kept until a file of theirs changes
RUNNING_S = 180.0  # since the last change of the metrics of an unfinished run
TOKENS = ("action_tokens", "env_output_tokens", "warning_tokens")
SECONDS = ("rollout_seconds", "train_seconds")
EVALUATED = ("pass_at_1", "pass_at_k", "reward", "env_ce_recorded", "env_ce_own")
STUDIED = {  # metric of a study: its name in an evaluation
    "pass@1": "pass_at_1",
    "reward": "reward",
    "env CE, recorded": "env_ce_recorded",
    "env CE, own": "env_ce_own",
}


def describe(source: Source) -> dict[str, Any]:
    """Return a source's entry in the list of runs and files; a problem in place of facts that cannot be read."""
    row: dict[str, Any] = {"name": source.name, "refused": len(source.refusals)}
    if not isinstance(source, RunSource):
        return row | {"kind": "file", "tokens_of": source.tokens_of}
    arm = re.fullmatch(r"(.+)_seed(\d+)", source.name)  # as a study names its runs
    row |= {"kind": "run", "arm": arm[1] if arm else None, "seed": int(arm[2]) if arm else None}
    log = source.log
    try:
        progress = _progress(log.folder, stamp_of(log.metrics_path, log.config_path))
        return row | progress | {"state": "finished" if progress["done"] >= progress["steps"] else _state(log)}
    except (DataError, AttributeError) as error:
        return row | {"problem": str(error), "done": 0, "steps": 0, "state": "unreadable"}


@lru_cache(maxsize=REMEMBERED)
def _progress(folder: Path, stamp: Stamp) -> dict[str, Any]:
    log = RunLog(folder)
    config = log.read_config()
    return {
        "done": log.last_step() + 1,
        "steps": config.get("steps") or 0,
        "model": str(config["engine"].get("model")),
        "tasks": _task_names((config.get("tasks") or {}).get("source")),
    }


def _task_names(source: Any) -> str:
    """Return the names of one source of tasks or of several; their options stand among the settings."""
    sources = source if isinstance(source, list) else [source]
    return ", ".join(str(each.get("name") if isinstance(each, dict) else each) for each in sources)


def _state(log: RunLog) -> str:
    paths = (log.metrics_path, log.config_path)
    changed = max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)
    return "running" if time.time() - changed < RUNNING_S else "stopped"


def read_curves(source: RunSource) -> dict[str, Any]:
    """Return the metrics of a run as columns over its steps, with all that is drawn beside them.

    ``seconds`` and ``tokens`` (of actions and observations) are those spent up to and with each step.

    Raises:
        DataError: the metrics or the settings cannot be read.
    """
    log = source.log
    evaluations = [log.evaluation_path(step) for step in log.evaluation_steps()]
    stamp = stamp_of(log.metrics_path, log.config_path, log.folder.parent / "study.json", *evaluations)
    return {"name": source.name, **_curves(log.folder, stamp)}


@lru_cache(maxsize=REMEMBERED)
def _curves(folder: Path, stamp: Stamp) -> dict[str, Any]:
    """Return all but the name, which two folders may share. It is read again only when one of its files changes."""
    log = RunLog(folder)
    config, rows = log.read_config(), log.read_metrics()
    numbers = [{name: float(value) for name, value in row.items() if _is_number(value)} for row in rows]
    names = dict.fromkeys(name for row in numbers for name in row if name != "step")
    return {
        "steps": [row["step"] for row in rows],
        "seconds": list(accumulate(_total(row, SECONDS) for row in numbers)),
        "tokens": list(accumulate(_total(row, TOKENS) for row in numbers)),
        "metrics": {name: [_short(row.get(name)) for row in numbers] for name in names},
        "evaluations": _evaluations(log),
        "arm_curves": _arm_curves(log),
        "warnings": read_warnings(config, numbers),
        "settings": {key: value for key, value in flatten(config).items()},
    }


def read_warnings(config: Mapping[str, Any], numbers: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Return the guard's warnings by step, made again from the finite metrics of each step, which determine them."""
    try:
        guard = Guard(config_from_dict(config).objective)
    except (BacktalkError, TypeError, AttributeError):  # settings of another version
        return []
    found = []
    for row in numbers:
        step = int(row["step"])
        found += [{"step": step, "text": line} for line in guard.read(step, row)]
    return found


def _evaluations(log: RunLog) -> list[dict[str, Any]]:
    found = []
    for step in log.evaluation_steps():
        try:
            evaluation = log.read_evaluation(step)
        except DataError:  # being replaced
            continue
        estimates = {name: evaluation[name] for name in EVALUATED if isinstance(evaluation.get(name), Mapping)}
        found.append({"step": step, "samples_per_task": evaluation.get("samples_per_task"), **estimates})
    return found


def _arm_curves(log: RunLog) -> dict[str, Any]:
    """Return the study's own estimates for the arm of a run, by metric; nothing before the study has finished."""
    arm = re.fullmatch(r"(.+)_seed\d+", log.folder.name)
    try:
        study = json.loads((log.folder.parent / "study.json").read_bytes()) if arm else {}
        curves: dict[str, Any] = {}
        for point in study.get("curves", []):
            if arm and point["arm"] == arm[1] and point["metric"] in STUDIED:
                curves.setdefault(STUDIED[point["metric"]], []).append({"step": point["step"], **point["interval"]})
        return {"over": study["interval"], "curves": curves} if curves else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # not there, or not whole yet
        return {}


def _total(row: Mapping[str, float], names: Sequence[str]) -> float:
    return sum(row.get(name, 0.0) for name in names)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.7g}")
