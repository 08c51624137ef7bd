"""What of a trajectory the agent wrote, whether or not anybody knows with which probability."""

from __future__ import annotations

from collections.abc import Sequence

from backtalk.trajectory import Segment, TokenRole


def agent_segments(segments: Sequence[Segment]) -> frozenset[int]:
    """Positions of the segments that the agent wrote: every ACTION, and the CONTEXT that a turn begins with.

    The second is an action without logprobs: of a script, a person, a server that gave no ids, or an imported text.
    The policy term leaves it alone, and the agent wrote it all the same.
    """
    found: set[int] = set()
    begun: set[int] = set()
    for position, segment in enumerate(segments):
        opens = segment.turn is not None and segment.turn not in begun
        if segment.role is TokenRole.ACTION or (opens and segment.role is TokenRole.CONTEXT):
            found.add(position)
        if segment.turn is not None:
            begun.add(segment.turn)
    return frozenset(found)
