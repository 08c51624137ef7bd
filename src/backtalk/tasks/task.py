"""A task: an instruction, the files to start from, a verifier."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from backtalk.sandboxes.base import SandboxFile


class Split(StrEnum):
    TRAIN = "train"
    HELD_OUT = "held_out"


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """An instruction, the files to start from, a verifier."""

    id: str
    instruction: str
    files: Mapping[str, SandboxFile] = field(default_factory=dict)  # by absolute path inside
    setup: tuple[str, ...] = ()  # commands run once before the agent, offline
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = "/home/agent"
    tests: Mapping[str, SandboxFile] = field(default_factory=dict)  # under /tests, uploaded after the agent
    solution: Mapping[str, SandboxFile] = field(default_factory=dict)  # under /solution, for oracles only
    agent_timeout_s: float = math.inf  # of an attempt, its set-up included
    verifier_timeout_s: float = 60.0
    fold: Split | None = None  # what the dataset itself says of the split
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def split(self) -> Split:
        """The dataset's own fold; else by hash of the id, one in five held out, so that no run can move a task."""
        hashed = Split.HELD_OUT if hashlib.sha256(self.id.encode()).digest()[0] % 5 == 0 else Split.TRAIN
        return self.fold or hashed

    @property
    def world_model_only(self) -> bool:
        """Nobody scores this task: its rollouts teach through the world-model term alone."""
        return self.metadata.get("world_model_only") is True
