"""Report on one rollout, or on several together: tokens, turns, tools and losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from typing import Any

from backtalk.evidence.account.ledger import Stretch, Tally, merged, stretches, tallies, tally
from backtalk.evidence.account.losses import Loss, three_losses
from backtalk.trajectory import Segment, Trajectory

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
