"""Read trials and jobs of Harbor: ``result.json``, ``verifier/reward.txt`` and ``agent/trajectory.json`` of a folder.

Read against Harbor 0.25 and 0.26. A trial that broke before it was scored has no reward.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from backtalk.errors import DataError
from backtalk.exchange.plain import first_of, is_finite, mapping
from backtalk.exchange.read.turns import About
from backtalk.files import read_json, reading
from backtalk.trajectory import Failure, StopReason


def read_trials(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield each trial in a folder, itself one or a job, after its place; a DataError instead of one without record.

    Raises:
        DataError: there is none.
    """
    found = False
    for path in sorted(folder.rglob("result.json")):
        try:
            result = read_json(path)
        except DataError as error:
            found = True
            yield str(path.parent), error
            continue
        if not isinstance(result, Mapping) or "trial_name" not in result:
            continue  # a job's own result
        found = True
        yield from _trial(path.parent, result)
    if not found:
        raise DataError(
            f"{folder} holds no trial of Harbor, which is a folder with a result.json that has a trial_name; name the "
            "files of another format one by one"
        )


def _trial(folder: Path, result: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    documents = [path for path in (folder / "agent" / "trajectory.json",) if path.exists()]
    documents = documents or sorted(folder.glob("steps/*/agent/trajectory.json"))
    if not documents:
        broke = mapping(result.get("exception_info") or {}, "exception_info").get("exception_type")
        why = f"the trial ended with {broke}" if broke else "its agent records none"
        yield str(folder), DataError(f"there is no agent/trajectory.json: {why}")
    for document in documents:
        try:
            step = document.parts[-3] if len(documents) > 1 else None
            yield str(document), {**result, "trajectory": read_json(document), "step": step, "reward": _written(folder)}
        except DataError as error:
            yield str(document), error


def _written(folder: Path) -> Any:
    """Return the reward that the verifier wrote; None where it wrote none."""
    for name in ("reward.json", "reward.txt"):
        path = folder / "verifier" / name
        if path.exists():
            with reading(path):
                text = path.read_text(errors="replace").strip()
            try:
                return json.loads(text)
            except ValueError:
                raise DataError(f"{path} holds {text[:40]!r}, which is no reward") from None
    return None


def about_trial(result: Mapping[str, Any], about: About) -> About:
    """Return the facts of a trial: its task, reward and, where it broke, the exception.

    Raises:
        DataError: a reward that is not a finite number.
    """
    verified = mapping(result.get("verifier_result") or {}, "verifier_result")
    rewards = first_of(verified, "rewards", "reward")
    rewards = result.get("reward") if rewards is None else rewards
    rewards = rewards if isinstance(rewards, Mapping) else {} if rewards is None else {"reward": rewards}
    for name, reward in rewards.items():
        if not is_finite(reward):
            raise DataError(f"reward {name!r} of {result.get('trial_name')} is {reward!r}; a reward is a finite number")
    reward = rewards.get("reward", next(iter(rewards.values())) if len(rewards) == 1 else None)
    others = {f"reward_{name}": float(value) for name, value in rewards.items() if len(rewards) > 1}
    task = str(first_of(result, "task_name", "trial_name"))
    task = f"{task}/{result['step']}" if result.get("step") else task
    about = replace(about, task_id=task, reward=None if reward is None else float(reward), stats=others)
    raised = mapping(result.get("exception_info") or {}, "exception_info")
    if not raised:
        return about
    kind = str(raised.get("exception_type") or "Exception")
    if kind == "AgentTimeoutError":
        return replace(about, stop_reason=StopReason.DEADLINE)
    if about.reward is not None:  # the agent's own failure, which was scored
        return about
    phase = "score" if kind.startswith(("Verifier", "Reward")) else "step"
    return replace(about, failure=Failure(phase, kind, str(raised.get("exception_message") or "")))
