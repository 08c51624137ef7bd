"""Read the curves of runs: metrics by step, evaluations with intervals, warnings of the guard, settings."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from backtalk.errors import BacktalkError, DataError
from backtalk.run.config import config_from_dict
from backtalk.run.guard import Guard
from backtalk.run.log import RunLog
from backtalk.settings import flatten
from backtalk.viewer.live.sources import RunSource, Source

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
    try:
        config = source.log.read_config()
        done, planned = source.log.last_step() + 1, config.get("steps") or 0
        return row | {
            "done": done,
            "steps": planned,
            "state": "finished" if done >= planned else _state(source.log),
            "model": str(config["engine"].get("model")),
            "tasks": _task_names((config.get("tasks") or {}).get("source")),
        }
    except (DataError, AttributeError) as error:
        return row | {"problem": str(error), "done": 0, "steps": 0, "state": "unreadable"}


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
    config, rows = log.read_config(), log.read_metrics()
    names = dict.fromkeys(name for row in rows for name, value in row.items() if _is_number(value))
    return {
        "name": source.name,
        "steps": [row["step"] for row in rows],
        "seconds": list(accumulate(_total(row, SECONDS) for row in rows)),
        "tokens": list(accumulate(_total(row, TOKENS) for row in rows)),
        "metrics": {name: [_short(row.get(name)) for row in rows] for name in names if name != "step"},
        "evaluations": _evaluations(log),
        "arm_curves": _arm_curves(log),
        "warnings": read_warnings(config, rows),
        "settings": {key: value for key, value in flatten(config).items()},
    }


def read_warnings(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the guard's warnings by step, made again from the metrics, which determine them."""
    try:
        guard = Guard(config_from_dict(config).objective)
    except (BacktalkError, TypeError, AttributeError):  # settings of another version
        return []
    found = []
    for row in rows:
        numbers = {name: float(value) for name, value in row.items() if _is_number(value)}
        found += [{"step": row["step"], "text": line} for line in guard.read(row["step"], numbers)]
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


def _total(row: Mapping[str, Any], names: Sequence[str]) -> float:
    return sum(float(row[name]) for name in names if _is_number(row.get(name)))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> float | None:
    return float(f"{value:.7g}") if _is_number(value) else None
