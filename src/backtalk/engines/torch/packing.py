"""Several samples in one row of the model's input, so that less of it is padding.

A row holds its samples one after the other, and positions begin again at 0 with each. From that alone
transformers builds an attention mask that is causal within every sample and empty between them. Models that
read position ids otherwise, or carry a state along the row, leak; ``packing_isolates_samples`` finds them by trying.

The objective never sees any of this: a batch has one row for each sample, and a ``Layout`` says where in the
model's input its tokens stand.

B samples of T tokens each at most, R rows of L tokens each at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backtalk.objective.batch import micro_batches
from backtalk.objective.samples import Sample

MicroBatch = list[list[Sample]]  # the rows of one micro-batch, each with the samples that it holds


def plan_micro_batches(samples: Sequence[Sample], max_tokens: int, *, packing: bool) -> list[MicroBatch]:
    """Split a step into micro-batches of at most ``max_tokens`` tokens, padding included.

    First fit decreasing (Johnson 1973), micro-batch by micro-batch. A row is never longer than the longest sample of
    its micro-batch, so attention never spans more than it would with padding. A sample longer than ``max_tokens`` gets
    a micro-batch of its own. Samples without any token are left out: they have nothing to compute.
    """
    if not packing:
        return [[[sample] for sample in part] for part in micro_batches(samples, max_tokens)]
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
                room[row] -= len(sample)
        parts.append([row for row in rows if row])
        left = later
    return parts


@dataclass(frozen=True, slots=True)
class Layout:
    """The model's input for a batch, and where in it each sample begins."""

    token_ids_RL: Tensor
    position_ids_RL: Tensor | None  # None: one sample a row, the plain causal case, which models run fastest
    rows_B: Tensor
    starts_B: Tensor

    @classmethod
    def of(cls, token_ids_BT: Tensor, lengths_B: Tensor, row_sizes: Sequence[int]) -> Layout:
        """``row_sizes`` is the number of samples in each row; samples follow each other in the order of the batch.

        What is left of a row after its last sample is padding, which no token before it can see.
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
        """Keyword arguments of a model of transformers. No attention mask: it is what positions stand in for."""
        packed = {} if self.position_ids_RL is None else {"position_ids": self.position_ids_RL}
        return {"input_ids": self.token_ids_RL, "use_cache": False, **packed}


def packing_is_faster(model: Any) -> bool:
    """Whether the model's attention knows where samples of a row begin, as flash attention does.

    Others take a mask of the whole row and work out the pairs that it hides. On a CPU a step of the embedded model
    was 12 % slower so than with padding (benchmarks/objective.py packing).
    """
    return str(getattr(model.config, "_attn_implementation", "")).startswith("flash")


@torch.no_grad()
def packing_isolates_samples(model: Any) -> bool:
    """Whether samples in one row know nothing of each other, tried on a few tokens.

    Other tokens in the first sample of a row must not change a bit of the others, and each sample must come out as
    it does alone, up to rounding. Where the model's own arithmetic is not repeatable to the bit, the answer is no.
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
