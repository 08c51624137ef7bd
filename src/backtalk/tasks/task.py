"""Define a task and the split that it belongs to."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from backtalk.sandboxes.base import SandboxFile


class Split(StrEnum):
    """Which tasks are trained on, and which are kept for evaluation."""

    TRAIN = "train"
    HELD_OUT = "held_out"


def split_of(task_id: str) -> Split:
    """Return a task's split by a hash of its id, with one in five held out, in every run alike."""
    return Split.HELD_OUT if hashlib.sha256(task_id.encode()).digest()[0] % 5 == 0 else Split.TRAIN


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """An instruction, the files to start from, and the tests that score a rollout."""

    id: str
    instruction: str
    files: Mapping[str, SandboxFile] = field(default_factory=dict)  # by absolute path in the sandbox
    setup: tuple[str, ...] = ()  # commands run once before the agent, offline
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = "/home/agent"
    tests: Mapping[str, SandboxFile] = field(default_factory=dict)  # under /tests, uploaded after the agent
    solution: Mapping[str, SandboxFile] = field(default_factory=dict)  # under /solution, for oracles only
    agent_timeout_s: float = math.inf  # for a rollout, its setup included
    verifier_timeout_s: float = 60.0
    fold: Split | None = None  # the split, where the dataset itself has one
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def split(self) -> Split:
        """Return the fold, or else the split by the id."""
        return self.fold or split_of(self.id)

    @property
    def world_model_only(self) -> bool:
        """Return whether the task is not scored: its rollouts train through the world-model term alone."""
        return self.metadata.get("world_model_only") is True
