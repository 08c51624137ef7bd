"""Audit the masks of one rollout: what each role was trained with, and tokens whose role and text do not agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate
from typing import Any

from backtalk.trajectory import TokenRole, TokenWeights, Trajectory

MAX_POSITIONS = 200  # named of one finding
TEXT_FINDINGS = {
    "in_no_message": "tokens of a message's role that no message on record holds",
    "over_an_edge": "tokens that hold the end of a message and template text too",
    "differs": "tokens whose text is not that of the message on record",
}
WEIGHT_FINDINGS = {
    "template_trained": "template tokens with a weight (world_loss_target=full_observation gives them one)",
    "context_trained": "tokens of given text with a weight",
    "world_on_action": "action tokens with a weight in the world-model term",
    "policy_on_unsampled": "tokens that no policy sampled, with a weight in the policy term",
}


def count_roles(trajectory: Trajectory, weights: TokenWeights | None) -> list[dict[str, Any]]:
    """Return for each role its tokens, how many were trained by each term, and the sums of their weights."""
    roles = trajectory.roles
    rows = []
    for role in TokenRole:
        positions = [i for i, other in enumerate(roles) if other is role]
        row: dict[str, Any] = {"role": role.name, "tokens": len(positions)}
        for term, column in _columns(weights):
            found = [column[i] for i in positions if column[i]]
            row |= {f"{term}_tokens": len(found), f"{term}_sum": sum(found)}
        rows.append(row)
    return rows


def find_faults(
    trajectory: Trajectory, weights: TokenWeights | None, texts: Sequence[str] | None
) -> list[dict[str, Any]]:
    """Return findings: a kind, what it means, how many tokens, and the positions of the first of them.

    ``texts`` are those of the tokens; None where they cannot be compared with the messages on record.
    """
    found: dict[str, list[int]] = {kind: [] for kind in (*TEXT_FINDINGS, *WEIGHT_FINDINGS)}
    if weights is not None:
        for kind, position in _misplaced_weights(trajectory, weights):
            found[kind].append(position)
    if texts is not None and trajectory.messages and len(trajectory.branches) == 1:
        for kind, position in _misplaced_text(trajectory, texts):
            found[kind].append(position)
    meanings = TEXT_FINDINGS | WEIGHT_FINDINGS
    return [
        {"kind": kind, "meaning": meanings[kind], "tokens": len(positions), "positions": positions[:MAX_POSITIONS]}
        for kind, positions in found.items()
        if positions
    ]


def _columns(weights: TokenWeights | None) -> list[tuple[str, Sequence[float]]]:
    return [] if weights is None else [("policy", weights.policy), ("world", weights.world)]


def _misplaced_weights(trajectory: Trajectory, weights: TokenWeights) -> Iterator[tuple[str, int]]:
    for start, end, segment in trajectory.spans():
        for i in range(start, end):
            policy, world = weights.policy[i], weights.world[i]
            if segment.role is TokenRole.TEMPLATE and (policy or world):
                yield "template_trained", i
            elif segment.role is TokenRole.CONTEXT and (policy or world):
                yield "context_trained", i
            elif segment.role is TokenRole.ACTION and world:
                yield "world_on_action", i
            if policy and not segment.is_sampled:
                yield "policy_on_unsampled", i


def _misplaced_text(trajectory: Trajectory, texts: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Compare each run of tokens between template tokens with the message that it should be, in order."""
    contents = [str(message.get("content") or "") for message in trajectory.messages]
    contents = [content for content in contents if content]
    following = 0
    for start, end, is_action in _bodies(trajectory):
        said = "".join(texts[start:end])
        match = next((k for k in range(following, len(contents)) if contents[k] in said), None)
        if match is None:
            whole = any(said in content for content in contents[following:])  # cut to a limit: a part of it
            yield from () if whole else (("differs", i) for i in range(start, end))
            continue
        following = match + 1
        first = said.index(contents[match])
        last = first + len(contents[match])
        ends = list(accumulate(len(text) for text in texts[start:end]))
        for i, (text, to) in enumerate(zip(texts[start:end], ends, strict=True), start=start):
            begin = to - len(text)
            is_stop = is_action and i == end - 1 and begin >= last  # which the policy sampled
            if not text or is_stop or first <= begin <= to <= last:
                continue
            yield ("in_no_message" if to <= first or begin >= last else "over_an_edge"), i


def _bodies(trajectory: Trajectory) -> Iterator[tuple[int, int, bool]]:
    """Yield the first position, the one past the last, and whether it is an action, of runs without template tokens."""
    begin: int | None = None
    kind = False
    for start, _, segment in trajectory.spans():
        is_action = segment.role is TokenRole.ACTION
        if begin is not None and (segment.role is TokenRole.TEMPLATE or is_action != kind):
            yield begin, start, kind
            begin = None
        if begin is None and segment.role is not TokenRole.TEMPLATE:
            begin, kind = start, is_action
    if begin is not None:
        yield begin, len(trajectory), kind


def facts_of_failure(trajectory: Trajectory) -> Mapping[str, str] | None:
    """Return phase, error, message and traceback of a failure; None where there was none."""
    return trajectory.failure and asdict(trajectory.failure)
