"""Controls of the world-model term: observations are learned after an action that did not cause them, or after none.

What the term then teaches is how observations read, and not what an action does. If it helps as much, knowledge of the
environment was not what helped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from backtalk.objective.roles import WorldLossTarget
from backtalk.objective.samples import Sample, rows_of, with_other_branches
from backtalk.trajectory import TokenRole


class Stretch(NamedTuple):
    """Tokens ``start`` to ``end`` (exclusive) of a sample."""

    sample: Sample
    start: int
    end: int


def shuffle_observations(samples: Sequence[Sample], target: WorldLossTarget, *, key: str) -> list[Sample]:
    """Return a step's samples with the world-model term moved to copies whose observations are exchanged.

    ``samples`` is the whole step, the branches of a row one after the other. They stay as they are for the policy term,
    and lose their targets. Each row gets a copy without sampled actions, in which every observation stands after
    another action: one of another task where no task has more than half of the observations, and never its own. What
    the chat template wrote around an observation stays where it is. A copy is a further branch of its row, so a step
    has as many rows as before, and as many target tokens, each with its ``world_scale``; a row's mean is over the
    observations that it got. A copy may be longer than its rollout was, and all copies together cost one more forward
    and backward pass. The exchange depends on ``key`` and the samples alone. A single observation is not learned.

    Raises:
        ValueError: the number of target tokens changed.
    """
    samples = _with_scales(samples)
    others = _others([place for sample in samples for place in _observations(sample)], key)

    def exchanged(sample: Sample) -> list[Stretch]:
        stretches, end = [], 0
        for place in _observations(sample):
            stretches += [Stretch(sample, end, place.start), others[place]]
            end = place.end
        return [*stretches, Stretch(sample, end, len(sample))]

    if not others:
        return [replace(sample, world_scale=torch.zeros(len(sample))) for sample in samples]
    return _in_copies(samples, target, exchanged)


def mask_actions(samples: Sequence[Sample], target: WorldLossTarget, *, kept: Collection[int]) -> list[Sample]:
    """Return a step's samples with the world-model term moved to copies in which every action is empty.

    Of an action only the tokens in ``kept`` are left, those that end a turn, so that the copy reads as a conversation
    in which the policy said nothing; it is that much shorter. Everything else is as in ``shuffle_observations``.

    Raises:
        ValueError: the number of target tokens changed.
    """
    kept = frozenset(kept)

    def without_actions(sample: Sample) -> list[Stretch]:
        ids, roles = sample.token_ids.tolist(), sample.roles.tolist()
        stays = [role != TokenRole.ACTION or token in kept for token, role in zip(ids, roles, strict=True)]
        runs = [[n for n, _ in run] for stay, run in groupby(enumerate(stays), key=lambda pair: pair[1]) if stay]
        return [Stretch(sample, run[0], run[-1] + 1) for run in runs]

    return _in_copies(_with_scales(samples), target, without_actions)


def _with_scales(samples: Sequence[Sample]) -> list[Sample]:
    return [s if s.world_scale is not None else replace(s, world_scale=torch.ones(len(s))) for s in samples]


def _in_copies(
    samples: Sequence[Sample], target: WorldLossTarget, stretches: Callable[[Sample], list[Stretch]]
) -> list[Sample]:
    """Return the samples without targets, and after each row its copies, put together from ``stretches``."""
    made: list[Sample] = []
    for row in rows_of(samples):
        made += [replace(sample, world_scale=torch.zeros(len(sample))) for sample in row]
        copies = [replace(_copy(sample, stretches(sample)), branch=len(row) + sample.branch) for sample in row]
        if any(bool(copy.target_mask(target).any()) for copy in copies):
            made += with_other_branches(copies, target)
    before, after = (sum(sample.counts(target).targets for sample in step) for step in (samples, made))
    if before != after:
        raise ValueError(f"the copies have {after} target tokens, and the step has {before}")
    return made


def _observations(sample: Sample) -> Iterator[Stretch]:
    """Yield each observation, from the first to the last token of its body, and what is between its messages."""
    bodies = (TokenRole.ENV_OUTPUT, TokenRole.WARNING)
    for _, spans in groupby(sample.spans, key=lambda s: (s.turn, s.role in (TokenRole.ACTION, TokenRole.CONTEXT))):
        body = [span for span in spans if span.role in bodies and span.end > span.start]
        if body:
            yield Stretch(sample, body[0].start, body[-1].end)


def _others(places: Sequence[Stretch], key: str) -> dict[Stretch, Stretch]:
    """Return the observation that each place gets; none where there is only one.

    Sorted by task and moved on by the size of the largest, no observation stays in its task, unless the largest has
    more than half. Within a single task the same is done with its rollouts.
    """
    if len(places) < 2:
        return {}
    order, several = list(places), len({place.sample.task_id for place in places}) > 1
    Random(key).shuffle(order)
    owners = [place.sample.task_id if several else str(place.sample.sample_index) for place in order]
    sizes = Counter(owners)  # in random order
    rank = {owner: number for number, owner in enumerate(sizes)}
    order = [place for _, place in sorted(zip(owners, order, strict=True), key=lambda pair: rank[pair[0]])]
    largest = max(sizes.values())
    shift = largest if largest < len(order) else 1
    return dict(zip(order, order[shift:] + order[:shift], strict=True))


def _copy(sample: Sample, stretches: Sequence[Stretch]) -> Sample:
    """Return a sample for the world-model term alone, put together from ``stretches``."""

    def column(name: str) -> Tensor:
        return torch.cat([getattr(source, name)[start:end] for source, start, end in stretches])

    ids = column("token_ids")
    return replace(
        sample,
        token_ids=ids,
        roles=column("roles"),
        turns=column("turns"),
        world_scale=column("world_scale"),
        sampled=torch.zeros(len(ids), dtype=torch.bool),
        sampling_logprobs=torch.zeros(len(ids)),
        advantage=0.0,
        has_reward=False,
        spans=(),
        is_control=True,
    )
