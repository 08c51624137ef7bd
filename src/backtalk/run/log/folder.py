"""Read and write one run folder, and forget what a resume makes again."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from backtalk.errors import DataError
from backtalk.files import append_json_line, read_json, read_json_lines, reading, write_bytes
from backtalk.run.log.trajectories import group_trajectories, read_trajectories, write_trajectories
from backtalk.run.log.weights import read_weights, write_weights
from backtalk.trajectory import TokenWeights, TrajectoryGroup


class RunLog:
    """Reader and writer of one run folder; ``RunLog(folder)`` itself touches nothing."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config_path = self.folder / "config.yaml"
        self.metrics_path = self.folder / "metrics.jsonl"
        self.dreams_path = self.folder / "dreams.jsonl"
        self.checkpoint_path = self.folder / "checkpoint"
        self.tokenizer_path = self.folder / "tokenizer"

    @classmethod
    def of_groups(cls, path: Path) -> tuple[RunLog, int] | None:
        """Return the run and the step whose trajectories a file holds; None if it is another file."""
        folder, match = path.resolve().parent, re.fullmatch(r"step_(\d+)\.parquet", path.name)
        log = cls(folder.parent)
        return (log, int(match[1])) if match and folder.name == "groups" and log.config_path.is_file() else None

    def groups_path(self, step: int) -> Path:
        """Return the path of a step's trajectories."""
        return self.folder / "groups" / f"step_{step:05d}.parquet"

    def weights_path(self, step: int) -> Path:
        """Return the path of a step's token weights."""
        return self.folder / "weights" / f"step_{step:05d}.parquet"

    def scores_path(self, step: int, *, evaluation: bool = False) -> Path:
        """Return the path of what `backtalk score` wrote of a step's trajectories, or of the evaluation before it."""
        return self.folder / "scores" / f"{'evaluation_' if evaluation else ''}step_{step:05d}.parquet"

    def evaluation_path(self, step: int) -> Path:
        """Return the path of the evaluation before a step; its trajectories lie beside it as .parquet."""
        return self.folder / f"evaluation_step_{step:05d}.json"

    def world_model_path(self, step: int) -> Path:
        """Return the path of what was measured of the policy's knowledge of its environment before a step."""
        return self.folder / f"world_model_step_{step:05d}.json"

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write the resolved settings."""
        import yaml

        write_bytes(self.config_path, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).encode())

    def write_groups(self, step: int, groups: Iterable[TrajectoryGroup]) -> None:
        """Write the trajectories that a step trains on."""
        write_trajectories(self.groups_path(step), [trajectory for group in groups for trajectory in group])

    def write_weights(self, step: int, groups: Sequence[TrajectoryGroup], weights: Sequence[TokenWeights]) -> None:
        """Write the weights of every token of ``groups`` in the loss of the step that trained on them."""
        write_weights(self.weights_path(step), groups, weights)

    def write_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of a step; those that are not finite (a mean over nothing) are null."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        append_json_line(self.metrics_path, {"step": step, **finite})

    def write_evaluation(
        self, step: int, evaluation: Mapping[str, Any], groups: Iterable[TrajectoryGroup] = ()
    ) -> None:
        """Write an evaluation after its trajectories, so that one that can be read is complete."""
        path = self.evaluation_path(step)
        write_trajectories(path.with_suffix(".parquet"), [trajectory for group in groups for trajectory in group])
        write_bytes(path, (json.dumps(evaluation, indent=1) + "\n").encode())

    def write_world_model(self, step: int, measured: Mapping[str, Any]) -> None:
        """Write what the policy before a step knows of its environment."""
        write_bytes(self.world_model_path(step), (json.dumps(measured, indent=1) + "\n").encode())

    def write_dream(self, dreamed: Mapping[str, Any]) -> None:
        """Append what a policy of this run expected a command to be answered with, beside what came."""
        append_json_line(self.dreams_path, dreamed)

    def truncate_after(self, step: int) -> None:
        """Forget what lies beyond ``step``, for a resume from the checkpoint made after it (-1: everything).

        Kept are metrics, groups and weights up to ``step``, and evaluations up to the one of the policy after it.
        """
        if self.metrics_path.exists():
            kept = [row for row in self.read_metrics() if row["step"] <= step]
            write_bytes(self.metrics_path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        patterns = {f"{kind}/step_*.parquet": step for kind in ("groups", "weights", "scores")}
        patterns |= {"evaluation_step_*.*": step + 1, "scores/evaluation_step_*.parquet": step + 1}
        patterns |= {"world_model_step_*.json": step + 1}
        for pattern, last in patterns.items():
            for number, path in self._numbered(pattern):
                if number > last:
                    path.unlink()

    def read_config(self) -> dict[str, Any]:
        """Read the settings.

        Raises:
            DataError: the folder is no run, or its config.yaml is not what a training wrote.
        """
        import yaml

        if not self.config_path.is_file():
            raise DataError(
                f"{self.folder} is not a run folder: it has no config.yaml; pass the folder that a training wrote"
            )
        with reading(self.config_path):
            content = self.config_path.read_bytes()
        try:
            tree = yaml.safe_load(content)
        except (yaml.YAMLError, ValueError) as error:
            raise DataError(f"{self.config_path} is not YAML ({error}); put back what the training wrote") from error
        if not isinstance(tree, dict) or "engine" not in tree:
            raise DataError(f"{self.config_path} does not hold the settings of a run; put back what the training wrote")
        return tree

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read the metrics of every step.

        Raises:
            DataError: a line is not the metrics of a step.
        """
        rows = read_json_lines(self.metrics_path) if self.metrics_path.exists() else []
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise DataError(f"{self.metrics_path}, line {number} is not the metrics of a step; remove that line")
        return rows

    def last_step(self) -> int:
        """Return the last step with metrics; -1 if there is none."""
        rows = self.read_metrics()
        return rows[-1]["step"] if rows else -1

    def group_steps(self) -> list[int]:
        """Return the steps with trajectories, ascending."""
        return [number for number, _ in self._numbered("groups/step_*.parquet")]

    def read_groups(self, step: int) -> list[TrajectoryGroup]:
        """Read the trajectories of a step.

        Raises:
            DataError: there are none, or they cannot be read.
        """
        path = self.groups_path(step)
        if not path.exists():
            steps = self.group_steps()
            present = f"steps {steps[0]} to {steps[-1]} are there" if steps else "the run has not finished a step yet"
            raise DataError(f"{self.folder} has no trajectories of step {step}; {present}")
        return group_trajectories(read_trajectories(path))

    def read_weights(self, step: int, groups: Sequence[TrajectoryGroup]) -> list[list[TokenWeights]] | None:
        """Read the weights of a step's trajectories; None if the step has changed no model (yet).

        Raises:
            DataError: the file cannot be read, or belongs to other trajectories.
        """
        path = self.weights_path(step)
        return read_weights(path, groups) if path.exists() else None

    def evaluation_steps(self) -> list[int]:
        """Return the steps with an evaluation, ascending."""
        return [number for number, _ in self._numbered("evaluation_step_*.json")]

    def read_evaluation(self, step: int) -> dict[str, Any]:
        """Read the evaluation before a step.

        Raises:
            DataError: there is none, or it is not JSON.
        """
        return read_json(self.evaluation_path(step), "; remove it and evaluate again")

    def read_world_model(self, step: int) -> dict[str, Any] | None:
        """Read what was measured of the policy's knowledge before a step; None if nothing was."""
        path = self.world_model_path(step)
        return read_json(path, "; remove it and measure again") if path.exists() else None

    def world_model_steps(self) -> list[int]:
        """Return the steps at which the policy's knowledge of its environment was measured, ascending."""
        return [number for number, _ in self._numbered("world_model_step_*.json")]

    def read_dreams(self) -> list[dict[str, Any]]:
        """Read what `backtalk dream` was asked, the oldest first."""
        return read_json_lines(self.dreams_path) if self.dreams_path.exists() else []

    def read_evaluation_groups(self, step: int) -> list[TrajectoryGroup]:
        """Read the trajectories of the evaluation before a step."""
        return group_trajectories(read_trajectories(self.evaluation_path(step).with_suffix(".parquet")))

    def _numbered(self, pattern: str) -> list[tuple[int, Path]]:
        found = [(re.search(r"step_(\d+)\.", path.name), path) for path in self.folder.glob(pattern)]
        return sorted((int(match.group(1)), path) for match, path in found if match)
