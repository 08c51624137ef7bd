"""Tasks, and what answers the agent."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol

from backtalk.sandboxes.base import SandboxFile
from backtalk.trajectory import TokenRole


class Split(StrEnum):
    TRAIN = "train"
    HELD_OUT = "held_out"


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """An instruction, the files to start from, a verifier."""

    id: str
    instruction: str
    world: str = "terminal"  # what answers the agent: a kind of world, or "kind:which one"
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


def clean_text(text: str) -> str:
    """The same text with lone surrogates, which no encoding can hold, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a message's text with who said it."""

    text: str
    role: TokenRole


def shortened(text: str, max_chars: int, role: TokenRole, keep: Literal["both", "head", "tail"] = "both") -> list[Part]:
    """Return a text as parts of a role: one, or none where it is empty; of a longer one ``max_chars`` characters.

    ``keep`` says which: half of them from either end, or all from the head or the tail. A WARNING says how many are
    left out.
    """
    if len(text) <= max_chars:
        return [Part(text, role)] if text else []
    first = {"both": max_chars // 2, "head": max_chars, "tail": 0}[keep]
    head, tail = text[:first], text[len(text) - (max_chars - first) :]
    where = {"both": "", "head": " at the end", "tail": " at the beginning"}[keep]
    own_line = "\n" if head and not head.endswith("\n") else ""
    notice = Part(f"{own_line}[{len(text) - max_chars} characters left out{where}]\n", TokenRole.WARNING)
    return [part for part in (Part(head, role), notice, Part(tail, role)) if part.text]


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message. ``role`` is the chat role; who said each stretch is in the parts."""

    role: str  # "system" | "user" | "tool"
    parts: tuple[Part, ...]
    tool: str | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool as the policy is told about it; ``parameters`` is a JSON schema of an object."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    def __hash__(self) -> int:
        return hash((self.name, self.description))


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call; the arguments are JSON values."""

    tool: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ParsedAction:
    """What a sampled action means: the calls to carry out, in order, or what was wrong with it.

    ``error`` is set exactly when ``calls`` is empty, and is then the observation, a WARNING. ``warnings`` are faults
    of form that left the calls readable. ``notice`` is what the policy is told of them in front of the observation,
    also a WARNING: always of calls that are not run, of the others where the settings say so.
    """

    text: str
    calls: tuple[ToolCall, ...]
    error: str | None = None
    warnings: tuple[str, ...] = ()
    notice: str = ""

    def __post_init__(self) -> None:
        if (self.error is None) != bool(self.calls):
            raise ValueError(f"an action has calls or an error, got {len(self.calls)} calls and error={self.error!r}")


@dataclass(frozen=True, slots=True)
class Step:
    """What the world answered. ``timed_out`` and ``truncated`` are counted in the trajectory's stats."""

    messages: tuple[Message, ...]
    done: bool = False
    submitted: bool = False
    timed_out: bool = False
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class WorldReport:
    """What a world is, in a line for people, and what they should know of it."""

    name: str
    warnings: tuple[str, ...] = ()


class Env(Protocol):
    """One episode of one task.

    Raises:
        InfrastructureError: from any method, when the world broke. A failed command is a Step.
    """

    @property
    def tools(self) -> tuple[ToolSpec, ...]: ...

    async def reset(self) -> tuple[Message, ...]:
        """Build the world and say what is to be done."""
        ...

    async def step(self, call: ToolCall) -> Step:
        """Carry out one call."""
        ...

    async def score(self) -> float | None:
        """The reward, once, after the end; None where nobody scores this task. VerifierError when invalid."""
        ...


class World(Protocol):
    """Where the tasks of one kind are played. Made once for a run, and closed with it."""

    @property
    def report(self) -> WorldReport: ...

    def open(self, task: Task) -> AbstractAsyncContextManager[Env]:
        """A fresh episode of the task, over when the context is left.

        Raises:
            InfrastructureError: on entry, when the world cannot be had. It costs this rollout.
        """
        ...

    async def close(self) -> None:
        """Give back what the world holds: a server that it started, connections, sandboxes kept ready."""
        ...
