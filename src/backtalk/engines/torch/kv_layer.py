"""One layer of the persistent key-value cache: buffers in which a token's position is its column.

R rows of the buffer, N rows that a forward pass writes, Q new tokens of a row, C columns, K columns that are read,
H key-value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True, slots=True)
class Window:
    """The part of the buffers that one forward pass writes and reads; all layers share it."""

    rows: slice
    columns: int  # K
    targets_NQ: Tensor  # the column of each new token
    _indices: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def indices(self, heads: int, columns: int) -> Tensor:
        """Return the places of [N, H, Q] new vectors in a buffer flattened to [R * H * C]; kept for layers alike."""
        if (heads, columns) not in self._indices:
            rows_N = torch.arange(self.rows.start, self.rows.stop, device=self.targets_NQ.device)
            lines_NH = rows_N[:, None] * heads + torch.arange(heads, device=self.targets_NQ.device)
            indices_NHQ = lines_NH[:, :, None] * columns + self.targets_NQ[:, None, :]
            self._indices[heads, columns] = indices_NHQ.flatten()
        return self._indices[heads, columns]


class RowLayer(DynamicLayer):
    """Keys and values of one layer, [R, H, C, D] each: on a CPU this order reads twice as fast as [R, C, H, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = self.columns = 0
        self.window = Window(slice(0), 0, torch.empty(0))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values, [N, H, Q, D], and return those of the window, [N, H, K, D]."""
        if not self.is_initialized:
            # Zeros, not empty: a masked column has weight 0, and 0 * NaN would reach the result.
            self.keys, self.values = (
                new.new_zeros((self.rows, new.shape[1], self.columns, new.shape[3]))
                for new in (key_states, value_states)
            )
            self.is_initialized = True
        keys, values = self.buffers()
        return self._write(keys, key_states), self._write(values, value_states)

    def _write(self, buffer: Tensor, new: Tensor) -> Tensor:
        indices = self.window.indices(new.shape[1], self.columns)
        buffer.view(-1, new.shape[3]).index_copy_(0, indices, new.reshape(-1, new.shape[3]))
        return buffer[self.window.rows, :, : self.window.columns]

    def buffers(self) -> list[Tensor]:
        """Return keys and values, [R, H, C, D]; empty before the first forward pass."""
        return [buffer for buffer in (self.keys, self.values) if buffer is not None]

    def rebuild(self, rows: int, columns: int, new_rows: Tensor, old_rows: Tensor) -> None:
        """Change the shape of the buffers; the rows ``old_rows`` become the rows ``new_rows``."""
        used, old = min(columns, self.columns), self.buffers()
        self.rows, self.columns = rows, columns
        if self.is_initialized:
            self.keys, self.values = (
                buffer.new_zeros((rows, buffer.shape[1], columns, buffer.shape[3])) for buffer in old
            )
            for new_buffer, old_buffer in zip(self.buffers(), old, strict=True):
                new_buffer[new_rows, :, :used] = old_buffer[old_rows, :, :used]
