"""Packing of several samples into one row of the model's input, so that less of it is padding.

A row holds its samples one after the other, and positions begin at 0 in each. From positions alone transformers builds
an attention mask that is causal within a sample and empty between samples. Models that read position ids otherwise, or
carry a state along the row, leak; ``packing_isolates_samples`` finds them by trying.

The objective is not affected: a ``Batch`` has one row for each sample, and a ``Layout`` maps it to the model's input.

B samples of T tokens each at most, R rows of L tokens each at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backtalk.objective.samples import Sample

MicroBatch = list[list[Sample]]  # the rows of one micro-batch, each with the samples that it holds


def plan_micro_batches(samples: Sequence[Sample], max_tokens: int, *, packing: bool) -> list[MicroBatch]:
    """Split a step into micro-batches of at most ``max_tokens`` tokens, padding included; longest samples first.

    Without packing a row holds one sample. With it, rows are filled by first fit decreasing (Johnson 1973), micro-batch
    by micro-batch; a row is never longer than the longest sample of its micro-batch, so attention never spans more than
    it would with padding. A sample longer than ``max_tokens`` gets a micro-batch of its own. Samples without any token
    are left out: nothing is computed for them, and ``TokenCounts`` counts their rows.
    """
    left = sorted((s for s in samples if len(s)), key=len, reverse=True)
    parts: list[MicroBatch] = []
    while left:
        width = len(left[0])
        rows: MicroBatch = [[] for _ in range(max(max_tokens // width, 1))]
        room = [width] * len(rows)
        later = []
        for sample in left:
            row = next((i for i, free in enumerate(room) if free >= len(sample)), None)
            if row is None:
                later.append(sample)
            else:
                rows[row].append(sample)
                room[row] -= len(sample) if packing else width
        parts.append([row for row in rows if row])
        left = later
    return parts


@dataclass(frozen=True, slots=True)
class Layout:
    """The model's input for a batch, and the row and column at which each sample begins."""

    token_ids_RL: Tensor
    position_ids_RL: Tensor | None  # None: one sample a row, plain causal attention, which is fastest
    rows_B: Tensor
    starts_B: Tensor

    @classmethod
    def of(cls, token_ids_BT: Tensor, lengths_B: Tensor, row_sizes: Sequence[int]) -> Layout:
        """Lay out a batch in rows of ``row_sizes`` samples each, in the order of the batch.

        The rest of a row after its last sample is padding, which no earlier token attends to.
        """
        device = token_ids_BT.device
        if len(row_sizes) == len(token_ids_BT):
            rows_B = torch.arange(len(token_ids_BT), device=device)
            return cls(token_ids_BT, None, rows_B, torch.zeros_like(rows_B))
        lengths = lengths_B.tolist()
        rows = [r for r, size in enumerate(row_sizes) for _ in range(size)]
        starts: list[int] = []
        for b, row in enumerate(rows):
            starts.append(starts[-1] + lengths[b - 1] if b and rows[b - 1] == row else 0)
        width = max(start + length for start, length in zip(starts, lengths, strict=True))
        token_ids_RL = token_ids_BT.new_zeros(len(row_sizes), width)
        position_ids_RL = torch.arange(width, device=device).repeat(len(row_sizes), 1)
        for b, (row, start, length) in enumerate(zip(rows, starts, lengths, strict=True)):
            token_ids_RL[row, start : start + length] = token_ids_BT[b, :length]
            position_ids_RL[row, start:] -= position_ids_RL[row, start].clone()
        return cls(
            token_ids_RL, position_ids_RL, torch.tensor(rows, device=device), torch.tensor(starts, device=device)
        )

    def model_input(self) -> dict[str, Any]:
        """Return the keyword arguments of a model of transformers, which builds the attention mask from positions."""
        packed = {} if self.position_ids_RL is None else {"position_ids": self.position_ids_RL}
        return {"input_ids": self.token_ids_RL, "use_cache": False, **packed}


@torch.no_grad()
def packing_isolates_samples(model: Any) -> bool:
    """Return whether samples in one row do not affect each other, tried on a few tokens.

    Changing the first sample of a row must not change a bit of the others, and each sample must give the same logits as
    alone, up to rounding. Where the model's own arithmetic is not repeatable to the bit, the answer is no.
    """
    weight = model.get_input_embeddings().weight
    first, lengths = 19, (19, 7, 12)
    ids_BT = (torch.arange(3 * 19, device=weight.device).reshape(3, 19) * 7 + 3) % len(weight)
    others_BT = ids_BT.clone()
    others_BT[0] = (ids_BT[0] * 3 + 1) % len(weight)
    lengths_B = torch.tensor(lengths, device=weight.device)

    def logits(ids_BT: Tensor) -> Tensor:
        return model(**Layout.of(ids_BT, lengths_B, [3]).model_input()).logits[0]

    try:
        together_LV = logits(ids_BT)
        if not torch.equal(together_LV[first:], logits(others_BT)[first:]):
            return False
        alone = [model(input_ids=ids_BT[b : b + 1, :n], use_cache=False).logits[0] for b, n in enumerate(lengths)]
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    alone_LV = torch.cat(alone)
    rounding = max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)  # float64 models use float32 inside
    return bool((together_LV - alone_LV).abs().amax() <= 16 * rounding * alone_LV.abs().amax())
