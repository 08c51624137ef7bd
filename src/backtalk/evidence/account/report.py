"""Report on one rollout, or on several together: tokens by who made them with their nats, turns, tools and losses.

Only tokens that have one before them count, as nothing can be learned of a sequence's first: that is how RFC 010's demo
counts too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any, Literal, TypeVar, get_args

from backtalk.evidence.account.losses import Loss, three_losses
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


Place = tuple[int, str]  # turn and tool


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Counts of one rollout's tokens. With a model's log-probabilities also nats and losses.

    ``turns`` are keyed by turn and tool, and ``tools`` by tool; the prompt is in neither. ``gap`` is the mean absolute
    difference between the recorded logprobs and the model's, in nats, None where either is missing.
    """

    name: str
    reward: float | None
    num_turns: int
    whole: Tally
    turns: dict[Place, Tally]
    tools: dict[str, Tally]
    advantage: float | None = None
    losses: tuple[Loss, ...] = ()
    gap: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {
            "name": self.name,
            "reward": self.reward,
            "num_turns": self.num_turns,
            **self.whole.to_dict(),
            "turns": [{"turn": turn, "tool": tool, **found.to_dict()} for (turn, tool), found in self.turns.items()],
            "tools": {tool: found.to_dict() for tool, found in self.tools.items()},
            "advantage": self.advantage,
            "losses": {loss.name: asdict(loss) for loss in self.losses},
            "logprob_gap": self.gap,
        }


def account_of(
    trajectory: Trajectory,
    logprobs: Sequence[float] | None = None,
    *,
    advantage: float | None = None,
    world_model_coeff: float = 0.05,
) -> Account:
    """Account for one rollout.

    ``logprobs`` are a model's at temperature 1, one for each token, in nats; without them there are no losses.
    """
    parts = stretches(trajectory)
    played = [part for part in parts if part[2].turn is not None]
    losses: list[Loss] = []
    if logprobs is not None:
        losses = three_losses([trajectory], [logprobs], [advantage], world_model_coeff=world_model_coeff)
    return Account(
        name=f"{trajectory.task_id}#{trajectory.sample_index}",
        reward=trajectory.reward,
        num_turns=trajectory.num_turns,
        whole=tally(parts, logprobs),
        turns=tallies(played, _place, logprobs),
        tools=tallies(played, lambda segment: segment.tool or "-", logprobs),
        advantage=advantage,
        losses=tuple(losses),
        gap=None if logprobs is None else _gap(trajectory, parts, logprobs),
    )


def total_of(accounts: Sequence[Account], losses: Sequence[Loss] = ()) -> Account:
    """Account for all rollouts as one. ``losses`` are those of the whole step, which are not sums: ``three_losses``."""
    return Account(
        name="all",
        reward=None,
        num_turns=sum(account.num_turns for account in accounts),
        whole=reduce(add, (account.whole for account in accounts)),
        turns=merged(account.turns for account in accounts),
        tools=merged(account.tools for account in accounts),
        losses=tuple(losses),
    )


def _place(segment: Segment) -> Place:
    return (-1 if segment.turn is None else segment.turn, segment.tool or "-")


def _gap(trajectory: Trajectory, parts: Sequence[Stretch], logprobs: Sequence[float]) -> float | None:
    recorded = trajectory.logprobs
    positions = [t for start, end, _ in parts for t in range(start, end)]
    gaps = [abs(known - logprobs[t]) for t in positions if (known := recorded[t]) is not None]
    return sum(gaps) / len(gaps) if gaps else None
