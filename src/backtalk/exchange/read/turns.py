"""Join the prompts and completions of a rollout's model calls to one trajectory: pure functions of token ids.

An action is the completion of turn t. The observation is what the prompt of turn t + 1 has after the prompt and
completion of turn t, which it must begin with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from backtalk.errors import DataError
from backtalk.exchange.plain import booleans, first_of, mapping, numbers, required, runs, token_ids
from backtalk.exchange.read.observations import Observations
from backtalk.messages import Message
from backtalk.trajectory import Failure, Segment, StopReason, TokenRole, Trajectory


@dataclass(frozen=True, slots=True)
class Turn:
    """One call of a model: the whole prompt, what was sampled, and the sampler's logprobs in nats.

    With ``logprobs`` None the completion is an unsampled action, which the policy term leaves alone.
    ``sampled`` says which tokens of the completion the policy term may train; None is all. ``observation`` is what
    followed and ``commands`` what the agent had typed, where the record has them as text too.

    Raises:
        DataError: lengths that differ.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    sampled: tuple[bool, ...] | None = None
    observation: tuple[Message, ...] = ()
    commands: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("logprobs", "sampled"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.completion_ids):
                raise DataError(
                    f"a completion of {len(self.completion_ids)} tokens has {len(column)} {name}; "
                    "one entry a token is needed"
                )

    @property
    def history(self) -> tuple[int, ...]:
        """Return the prompt and the completion."""
        return self.prompt_ids + self.completion_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """Facts of a trajectory beside its tokens."""

    task_id: str
    sample_index: int = 0
    reward: float | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    stop_reason: StopReason = StopReason.SUBMITTED
    failure: Failure | None = None  # with one there is no reward: what broke is no score of 0
    stats: Mapping[str, float] = field(default_factory=dict)

    def trajectory(self, segments: Sequence[Segment], **stats: float) -> Trajectory:
        """Return the trajectory of some segments; raise DataError where no turn is among them."""
        turns = {segment.turn for segment in segments if segment.role is TokenRole.ACTION}
        if not turns:
            raise DataError(f"{self.task_id} holds no turn of an agent, so there is nothing to learn from it")
        return Trajectory(
            task_id=self.task_id,
            sample_index=self.sample_index,
            segments=tuple(segment for segment in segments if len(segment) or segment.role is TokenRole.ACTION),
            messages=self.messages,
            reward=None if self.failure else self.reward,
            stop_reason=StopReason.FAILED if self.failure else self.stop_reason,
            failure=self.failure,
            stats={**self.stats, "num_turns": float(len(turns)), **{name: float(x) for name, x in stats.items() if x}},
        )


def trajectory_from_turns(turns: Sequence[Turn], about: About, observations: Observations) -> Trajectory:
    """Return one trajectory: the first prompt is CONTEXT, every completion an ACTION, unchanged.

    In a branch that a rewritten prompt begins, all of the prompt is CONTEXT, but the observation just made keeps its
    roles where its text is known.

    Raises:
        DataError: no turn, or a prompt that does not begin with what came before and ``on_drift`` is "stop", or an
            observation whose template tokens cannot be told.
    """
    segments: list[Segment] = []
    branch = 0
    for t, turn in enumerate(turns):
        before = turns[t - 1] if t else None
        if before is None:
            segments.append(Segment(TokenRole.CONTEXT, turn.prompt_ids))
        elif turn.prompt_ids[: len(before.history)] == before.history:
            segments += observations.segments(
                turn.prompt_ids[len(before.history) :],
                turn=t - 1,
                closed=_closed(before, observations),
                tools=[message.tool for message in before.observation],
                commands=before.commands,
                earlier=[command for past in turns[: t - 1] for command in past.commands],
                branch=branch,
            )
        elif observations.on_drift == "fork":
            branch += 1
            segments += _taken_over(turn, before, t - 1, observations, branch)
        else:
            raise DataError(_drift(before.history, turn.prompt_ids, t, observations))
        segments += completion_segments(turn.completion_ids, turn.logprobs, turn.sampled, turn=t, branch=branch)
    if turns and turns[-1].observation:  # the last observation is learned from too
        closed = _closed(turns[-1], observations)
        segments += observations.render(turns[-1].observation, turn=len(turns) - 1, closed=closed, branch=branch) or ()
    return about.trajectory(segments, drifts=branch)


def completion_segments(
    ids: Sequence[int],
    logprobs: Sequence[float] | None,
    sampled: Sequence[bool] | None = None,
    *,
    turn: int,
    branch: int = 0,
) -> Iterator[Segment]:
    """Yield the agent's action, with logprobs where the policy sampled and they are known."""
    for is_sampled, start, end in runs([True] * len(ids) if sampled is None else sampled):
        known = tuple(logprobs[start:end]) if is_sampled and logprobs is not None else None
        yield Segment(TokenRole.ACTION, tuple(ids[start:end]), known, turn=turn, branch=branch)


def turns_of(record: Any) -> list[Turn]:
    """Return the turns of a record, whose columns have the names of Harbor, TRL, verifiers or OpenEnv.

    It is a list of turns, or ``{"turns": [...]}``, or Harbor's RolloutDetail, which holds a list for each column.

    Raises:
        DataError: a column is missing, not a list of numbers, or of another length.
    """
    if not isinstance(record, (list, tuple)):
        record = mapping(record, "a record of turns")
        rows = first_of(record, "turns", "trajectory")
        record = _rows(record) if rows is None else rows
    if not isinstance(record, (list, tuple)) or not record:
        raise DataError("a record of turns is a list with at least one turn, got none")
    return [_turn(mapping(row, f"turn {t}"), t) for t, row in enumerate(record)]


def _rows(detail: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return Harbor's RolloutDetail as one row a turn."""
    if "prompt_token_ids" not in detail:
        raise DataError(f"a record of turns has 'turns' or 'prompt_token_ids', this one only {sorted(detail)[:12]}")
    columns = {
        name: detail[name] for name in ("prompt_token_ids", "completion_token_ids", "logprobs") if name in detail
    }
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1 or "completion_token_ids" not in columns:
        raise DataError(
            f"a RolloutDetail needs prompt_token_ids and completion_token_ids for the same turns, got {lengths}; "
            "some calls gave no ids back, and which ones is not said"
        )
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _turn(row: Mapping[str, Any], t: int) -> Turn:
    tokens = row.get("tokens")  # verifiers 0.1 keeps them one level down
    row = mapping(tokens, f"tokens of turn {t}") if isinstance(tokens, Mapping) else row
    what = f"turn {t}"
    prompt = token_ids(required(row, what, "prompt_token_ids", "prompt_ids"), f"{what} prompt ids")
    completion = token_ids(
        required(row, what, "completion_token_ids", "completion_ids", "response_ids", "output_ids"),
        f"{what} completion ids",
    )
    logprobs = first_of(row, "per_token_logps", "completion_logprobs", "output_log_probs", "logprobs")
    if logprobs is not None and len(logprobs) == 0 < len(completion):
        logprobs = None  # what these libraries write where the server gave none
    mask = first_of(row, "loss_mask", "output_mask")
    sampled = None if mask is None else booleans(mask, f"{what} mask")
    if sampled is not None and len(sampled) == len(prompt) + len(completion):
        sampled = sampled[len(prompt) :]  # OpenEnv's mask covers the prompt too
    return Turn(prompt, completion, None if logprobs is None else numbers(logprobs, f"{what} logprobs"), sampled)


def _closed(turn: Turn, observations: Observations) -> bool:
    renderer = observations.renderer
    return renderer is None or turn.completion_ids[-1:] == (renderer.end_of_turn_id,)


def _taken_over(turn: Turn, before: Turn, number: int, observations: Observations, branch: int) -> tuple[Segment, ...]:
    """Return a rewritten prompt as CONTEXT, but for the observation at its end where the record has its text."""
    for closed in (True, False) if before.observation else ():
        said = observations.render(before.observation, turn=number, closed=closed, branch=branch) or ()
        ids = tuple(token for segment in said for token in segment.token_ids)
        if ids and turn.prompt_ids[-len(ids) :] == ids:
            return (Segment(TokenRole.CONTEXT, turn.prompt_ids[: -len(ids)], branch=branch), *said)
    return (Segment(TokenRole.CONTEXT, turn.prompt_ids, branch=branch),)


def _drift(expected: Sequence[int], got: Sequence[int], t: int, observations: Observations) -> str:
    """Return the error text for a prompt that does not begin with what came before."""
    pairs = zip(expected, got, strict=False)
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(got)))
    around = slice(max(0, position - 3), position + 5)

    def shown(ids: Sequence[int]) -> str:
        part, renderer = list(ids[around]), observations.renderer
        return str(part) if renderer is None else f"{part} {renderer.encoder.decode(part)!r}"

    return (
        f"the prompt of turn {t} does not begin with the {len(expected)} tokens of turn {t - 1}: at position "
        f"{position} expected {shown(expected)}, got {shown(got)}. The harness rewrote or re-tokenised its history "
        "(a summary, thinking that was dropped), so this is no longer one sequence; --on-drift fork begins a new branch"
    )
