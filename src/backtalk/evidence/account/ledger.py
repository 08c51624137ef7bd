"""Count tokens by who made them, with their nats: over whole rollouts, turns and tools.

Only tokens that have one before them count, as nothing can be learned of a sequence's first: that is how RFC 010's
demo counts too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, get_args

from backtalk.trajectory import Segment, TokenRole, Trajectory

Kind = Literal["context", "template", "action", "env_output", "warning"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SPOKEN: tuple[Kind, ...] = ("action", "env_output", "warning")

_KIND_OF: Mapping[TokenRole, Kind] = dict(zip(TokenRole, KINDS, strict=True))
Key = TypeVar("Key", bound=Hashable)
Stretch = tuple[int, int, Segment]  # positions of some tokens, the last exclusive, and the segment that they are of


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """How many tokens of each kind, and with a model their summed negative log-likelihood in nats."""

    tokens: Mapping[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    unsampled: int = 0  # of the action tokens: those whose logprobs nobody knows
    nats: Mapping[Kind, float] | None = None

    def __add__(self, other: Tally) -> Tally:
        mine, theirs = self.nats, other.nats
        return Tally(
            tokens={kind: self.tokens[kind] + other.tokens[kind] for kind in KINDS},
            unsampled=self.unsampled + other.unsampled,
            nats=None if mine is None or theirs is None else {kind: mine[kind] + theirs[kind] for kind in KINDS},
        )

    @property
    def learnable(self) -> int:
        """Return the number of tokens that ECHO learns from: actions and environment output."""
        return self.tokens["action"] + self.tokens["env_output"]

    @property
    def discarded_share(self) -> float | None:
        """Return the share of the learnable tokens that ordinary RL masks out; None where there are none."""
        return self.tokens["env_output"] / self.learnable if self.learnable else None

    def cross_entropy(self, kind: Kind) -> float | None:
        """Return nats a token; None without a model or without such tokens."""
        return None if self.nats is None or not self.tokens[kind] else self.nats[kind] / self.tokens[kind]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        nats = {kind: self.cross_entropy(kind) for kind in SPOKEN}
        return {
            "tokens": dict(self.tokens),
            "unsampled_action_tokens": self.unsampled,
            "learnable": self.learnable,
            "discarded_by_rl": self.tokens["env_output"],
            "discarded_share": self.discarded_share,
            "cross_entropy": None if self.nats is None else nats,
        }


def stretches(trajectory: Trajectory) -> list[Stretch]:
    """Return the spans of a trajectory's tokens that have one before them in their branch, in order.

    The segment of an action has the tool that answered it.
    """
    answered: dict[int | None, str | None] = {}
    for segment in trajectory.segments:
        if segment.tool is not None:
            answered.setdefault(segment.turn, segment.tool)
    found: list[Stretch] = []
    branch = -1
    for start, end, segment in trajectory.spans():
        if segment.branch != branch and end > start:
            branch, start = segment.branch, start + 1
        tool = answered.get(segment.turn) if segment.role is TokenRole.ACTION else segment.tool
        if end > start:
            found.append((start, end, replace(segment, tool=tool)))
    return found


def tally(parts: Iterable[Stretch], logprobs: Sequence[float] | None = None) -> Tally:
    """Count some tokens. ``logprobs`` are a model's, one for each token of the trajectory, in nats."""
    tokens: dict[Kind, int] = dict.fromkeys(KINDS, 0)
    nats: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
    unsampled = 0
    for start, end, segment in parts:
        kind = _KIND_OF[segment.role]
        tokens[kind] += end - start
        unsampled += (end - start) * (kind == "action" and not segment.is_sampled)
        nats[kind] -= 0.0 if logprobs is None else sum(logprobs[start:end])
    return Tally(tokens=tokens, unsampled=unsampled, nats=None if logprobs is None else nats)


def tallies(
    parts: Iterable[Stretch], key: Callable[[Segment], Key], logprobs: Sequence[float] | None = None
) -> dict[Key, Tally]:
    """Return a tally for each value of ``key``, in order of first appearance."""
    groups: dict[Key, list[Stretch]] = {}
    for part in parts:
        groups.setdefault(key(part[2]), []).append(part)
    return {name: tally(group, logprobs) for name, group in groups.items()}


def merged(many: Iterable[Mapping[Key, Tally]]) -> dict[Key, Tally]:
    """Return the tallies of several rollouts, added where their keys agree."""
    found: dict[Key, Tally] = {}
    for tallied in many:
        for name, counts in tallied.items():
            found[name] = found[name] + counts if name in found else counts
    return found
