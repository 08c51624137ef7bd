"""Read what a GRPOTrainer of TRL trains on: prompt_ids, completion_ids, tool_mask or env_mask, logprobs.

Read against trl 1.16.0. A mask is 1 where the model wrote and 0 on what tools said, template included. AsyncGRPO's
TurnRecords are turns, see backtalk.exchange.read.turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from backtalk.errors import DataError
from backtalk.exchange.plain import booleans, first_of, mapping, numbers, required, runs, same_length, token_ids
from backtalk.exchange.read.observations import Observations
from backtalk.exchange.read.turns import About, completion_segments
from backtalk.trajectory import Segment, TokenRole, Trajectory

_COLUMNS = (
    *("prompt_ids", "completion_ids", "tool_mask", "env_mask", "logprobs"),
    *("prompt_mask", "completion_mask", "attention_mask"),
)


def rows_of(record: Any) -> list[Mapping[str, Any]]:
    """Return a row for each completion, of a row or of a batch whose columns are lists of rows.

    Raises:
        DataError: columns of different lengths.
    """
    record = mapping(record, "a TRL record")
    prompts = required(record, "a TRL record", "prompt_ids")
    if not len(prompts) or not hasattr(prompts[0], "__len__"):
        return [record]
    columns = {
        name: x for name, x in record.items() if isinstance(x, (list, tuple)) or (name in _COLUMNS and x is not None)
    }
    same_length(**columns)
    return [{name: column[i] for name, column in columns.items()} for i in range(len(prompts))]


def trajectory_from_trl(record: Any, about: About, observations: Observations) -> Trajectory:
    """Return the trajectory of one completion.

    A run of 1 in the mask is a turn's action, the run of 0 after it its observation.

    Padding is what prompt_mask, completion_mask or an attention_mask over both have 0 for, on either side.

    Raises:
        DataError: columns of different lengths, or a mask that is 0 between ones.
    """
    record = mapping(record, "a TRL record")
    prompt = token_ids(required(record, "a TRL record", "prompt_ids"), "prompt_ids")
    ids = token_ids(required(record, "a TRL record", "completion_ids"), "completion_ids")
    masks = _masks(record, len(prompt), len(ids))
    prompt = prompt[_unpadded(masks["prompt_mask"])]
    mask = first_of(record, "tool_mask", "env_mask")
    model = [True] * len(ids) if mask is None else booleans(mask, "tool_mask")
    logprobs = first_of(record, "logprobs", "sampling_per_token_logps", "old_per_token_logps")
    known = None if logprobs is None else numbers(logprobs, "logprobs")
    same_length(completion_ids=ids, tool_mask=model, logprobs=known)
    kept = _unpadded(masks["completion_mask"])
    if ids and not ids[kept]:
        raise DataError("completion_mask is 0 everywhere, as mask_truncated_completions leaves it; nothing is known")
    ids, model, known = ids[kept], model[kept], None if known is None else known[kept]
    renderer = observations.renderer
    segments, turn = [Segment(TokenRole.CONTEXT, prompt)], -1
    for is_action, start, upto in runs(model):
        part = ids[start:upto]
        if is_action:
            turn += 1
            segments += completion_segments(part, None if known is None else known[start:upto], turn=turn)
        elif turn < 0:  # before the first action it is prompt
            segments.append(Segment(TokenRole.CONTEXT, part))
        else:
            closed = renderer is None or ids[start - 1] == renderer.end_of_turn_id
            segments += observations.segments(part, turn=turn, closed=closed)
    return about.trajectory(segments)


def _masks(record: Mapping[str, Any], prompt: int, completion: int) -> dict[str, Sequence[bool]]:
    """Return which tokens of prompt and completion are no padding.

    Raises:
        DataError: a mask of another length.
    """
    both = first_of(record, "attention_mask")
    both = [True] * (prompt + completion) if both is None else booleans(both, "attention_mask")
    if len(both) != prompt + completion:
        raise DataError(f"attention_mask has {len(both)} entries for {prompt} prompt and {completion} completion ids")
    found: dict[str, Sequence[bool]] = {}
    for name, part, size in (
        ("prompt_mask", both[:prompt], prompt),
        ("completion_mask", both[prompt:], completion),
    ):
        given = first_of(record, name)
        found[name] = part if given is None else booleans(given, name)
        same_length(**{name.replace("mask", "ids"): range(size), name: found[name]})
        if not all(found[name][_unpadded(found[name])]):
            start = list(found[name]).index(True)
            raise DataError(f"{name} is 0 at position {list(found[name]).index(False, start)} and 1 after it; only "
                            "padding may be 0")  # fmt: skip
    return found


def _unpadded(mask: Sequence[bool]) -> slice:
    """Return the place of what is no padding: from the first one to the last."""
    if not any(mask):
        return slice(0, 0)
    return slice(list(mask).index(True), len(mask) - list(reversed(mask)).index(True))
