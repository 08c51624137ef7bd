"""Key-value caches of the batched sampler: kept from turn to turn, or computed anew for every wave.

A wave is one batch of histories that are continued together. Legend: N rows of the wave, M of them still decoding,
Q new tokens of a row, K columns that are read, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from backtalk.engines.torch.kv_layer import RowLayer, Window
from backtalk.errors import ConfigError

COLUMN_STEP = 128  # columns are added in steps of this, so that growing is rare


@dataclass(frozen=True, slots=True)
class History:
    """All tokens so far of one row of a wave; the cache knows the row by its ``owner``."""

    owner: Hashable
    token_ids: tuple[int, ...]


@dataclass(slots=True)
class KVStats:
    """Running counts of a cache, in tokens unless named otherwise."""

    prefilled_tokens: int = 0  # went through the model, padding not counted
    reused_tokens: int = 0  # were in the cache
    shared_tokens: int = 0  # copied from a row with the same history
    rewritten_histories: int = 0  # histories that did not begin with what the cache held


class KVCache(Protocol):
    """A key-value cache as the sampler uses it, one wave after the other."""

    stats: KVStats

    def begin(self, histories: Sequence[History]) -> tuple[list[int], Tensor]:
        """Run the new tokens of a wave, and drop the rows of other owners.

        Returns the index of the history in each row, and the logits after its last token, [N, V].
        """
        ...

    def step(self, ids_M: Tensor) -> Tensor:
        """Append one token to each decoding row and return the next logits, [M, V].

        Tokens appended to a row that has finished are forgotten at ``end``.
        """
        ...

    def keep(self, alive: Sequence[bool]) -> list[int]:
        """Stop decoding the rows that are not alive, and return the old index of each row that stays."""
        ...

    def end(self, histories: Sequence[History]) -> None:
        """Close the wave with the tokens that each owner's row now holds."""
        ...

    def clear(self) -> None:
        """Forget everything and free the memory."""
        ...


def open_kv_cache(
    model: nn.Module, pad_token_id: int, device: torch.device, persistent: bool
) -> tuple[KVCache, str | None]:
    """Return a cache for a model, and the reason where a persistent one was asked for and cannot be had.

    Raises:
        ConfigError: a model without any attention layer.
    """
    # transformers 5.24: a Mamba takes a cache, but is wrong after a left-padded history; hybrids are right.
    if _cache_argument(model) is None or {kind.__name__ for kind in _layer_kinds(model)} == {"LinearAttentionLayer"}:
        raise ConfigError(
            f"{type(model).__name__} has no attention layer, so its state cannot be carried from token to token "
            "here; use a model with attention layers"
        )
    reason = persistence_obstacle(model) if persistent else None
    if persistent and reason is None:
        return PersistentKVCache(model, pad_token_id, device), None
    return FreshKVCache(model, pad_token_id, device), reason


def persistence_obstacle(model: nn.Module) -> str | None:
    """Return why a model cannot use ``PersistentKVCache``, or None where every layer is full attention."""
    config: Any = model.config
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        return f"attention implementation {attention!r} takes no mask of our own (sdpa and eager do)"
    if "position_ids" not in _parameters(model):
        return "its forward takes no position_ids"
    kinds = _layer_kinds(model)
    if not kinds <= {DynamicLayer}:
        return f"it has layers that are not full attention ({', '.join(sorted(kind.__name__ for kind in kinds))})"
    return None


def _layer_kinds(model: Any) -> set[type]:
    """Return the classes of cache layers that transformers gives this model."""
    return {type(layer) for layer in DynamicCache(config=model.config).layers}


def _parameters(model: nn.Module) -> set[str]:
    """Return the argument names of the model's forward."""
    wrapper: Any = model
    inner = wrapper.get_base_model() if hasattr(model, "get_base_model") else model  # a PEFT wrapper hides them
    return set(inspect.signature(inner.forward).parameters)


def _cache_argument(model: nn.Module) -> str | None:
    """Return the name of the forward's cache argument, which is "cache" since transformers 5.24."""
    return next(iter({"cache", "past_key_values"} & _parameters(model)), None)


class _ModelCache:
    """The parts of both caches that know the model."""

    def __init__(self, model: nn.Module, pad_token_id: int, device: torch.device) -> None:
        self.stats = KVStats()
        self._model: Any = model
        self._pad_token_id, self._device = pad_token_id, device
        self._extra = {"logits_to_keep": 1} if "logits_to_keep" in _parameters(model) else {}  # of the last column
        self._cache_argument = _cache_argument(model) or ""


class PersistentKVCache(_ModelCache):
    """One row for each live session, kept between waves.

    The token at position p of a history is in column p of its row. Rows of uneven length then need no bookkeeping: a
    query at position p may read exactly the columns 0..p, padding goes to a column that nothing reads, and a history
    that was changed is cut by forgetting a length.

    A wave's rows are the first N of the buffer, those with most new tokens first, so that both prefilling a group of
    rows and decoding those that are still alive read plain slices.
    """

    def __init__(
        self,
        model: nn.Module,
        pad_token_id: int,
        device: torch.device,
        *,
        max_tokens: int | None = None,  # of one forward pass, padding included
        max_padding: int | None = None,  # tokens of padding accepted to save a pass
    ) -> None:
        super().__init__(model, pad_token_id, device)
        self._max_tokens = max_tokens or (2048 if device.type == "cpu" else 16_384)
        self._max_padding = max_padding or (64 if device.type == "cpu" else 4096)
        self._additive_mask = self._model.config._attn_implementation == "eager"
        self._dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.clear()

    def clear(self) -> None:
        self._layers = [RowLayer() for _ in DynamicCache(config=self._model.config).layers]
        self._cache = Cache(layers=[*self._layers])
        self._columns = 0
        self._owners: list[Hashable] = []  # of each row of the buffer
        self._held: dict[Hashable, tuple[int, ...]] = {}  # ids in each owner's row
        self._next_M = torch.zeros(0, dtype=torch.long, device=self._device)  # column of the next token
        self._ends: list[int] = []  # the same, known without asking the device
        self._top = 0  # largest of them

    def begin(self, histories: Sequence[History]) -> tuple[list[int], Tensor]:
        starts = [self._reusable(history) for history in histories]
        first: dict[tuple[int, ...], int] = {}  # rows with the same prompt: run it once
        twin = [
            first.setdefault(h.token_ids, i) if start == 0 else i
            for i, (h, start) in enumerate(zip(histories, starts, strict=True))
        ]
        new = [len(h.token_ids) - start for h, start in zip(histories, starts, strict=True)]
        order = sorted(range(len(histories)), key=lambda i: (twin[i] != i, -new[i], i))
        self._arrange([histories[i].owner for i in order])
        self._top = max(len(h.token_ids) for h in histories)
        self._grow(self._top + 1)  # the last column takes the padding; no token of this wave is there yet
        unique = sum(twin[i] == i for i in order)
        logits_NV = self._prefill([histories[i].token_ids for i in order[:unique]], [starts[i] for i in order[:unique]])
        if unique < len(order):
            place = {i: row for row, i in enumerate(order)}
            source = torch.tensor([place[twin[i]] for i in order], device=self._device)
            for buffer in self._buffers():
                buffer[unique : len(order)] = buffer[source[unique:]]
            logits_NV = logits_NV[source]
        self._ends = [len(histories[i].token_ids) for i in order]
        self._next_M = torch.tensor(self._ends, device=self._device)
        self.stats.prefilled_tokens += sum(new[i] for i in order[:unique])
        self.stats.shared_tokens += sum(new[i] for i in order[unique:])
        self.stats.reused_tokens += sum(starts)
        return order, logits_NV

    def step(self, ids_M: Tensor) -> Tensor:
        self._grow(self._top + 1)
        logits_MV = self._forward(slice(0, len(ids_M)), ids_M[:, None], self._next_M[:, None], self._top + 1)
        self._next_M = self._next_M + 1
        self._ends = [end + 1 for end in self._ends]
        self._top += 1
        return logits_MV

    def keep(self, alive: Sequence[bool]) -> list[int]:
        order = list(range(len(alive)))
        count = sum(alive)
        holes = [i for i in range(count) if not alive[i]]
        movers = [i for i in range(count, len(alive)) if alive[i]]
        for hole, mover in zip(holes, movers, strict=True):
            order[hole], order[mover] = mover, hole
        self._swap(holes, movers, self._top)
        order = order[:count]
        self._next_M = self._next_M[torch.tensor(order, dtype=torch.long, device=self._device)]
        self._ends = [self._ends[row] for row in order]
        self._top = max(self._ends, default=0)
        return order

    def end(self, histories: Sequence[History]) -> None:
        self._held |= {history.owner: history.token_ids for history in histories}

    def _reusable(self, history: History) -> int:
        """Count the leading tokens of a history that its row holds already; at least one token is always run."""
        held, ids = self._held.get(history.owner, ()), history.token_ids
        length = len(held)
        if ids[:length] != held:
            self.stats.rewritten_histories += 1
            length = next(i for i, (a, b) in enumerate(zip((*ids, -1), held, strict=False)) if a != b)
        return min(length, len(ids) - 1)

    def _arrange(self, owners: list[Hashable]) -> None:
        """Put the rows of ``owners`` in this order, and drop all other rows."""
        if owners == self._owners:
            return
        place = {owner: row for row, owner in enumerate(self._owners)}
        moves = [(row, place[owner]) for row, owner in enumerate(owners) if owner in place]
        self._rebuild(len(owners), self._columns, moves)
        self._owners = owners
        self._held = {owner: self._held[owner] for owner in owners if owner in self._held}

    def _grow(self, columns: int) -> None:
        """Make room for at least ``columns`` columns."""
        if columns > self._columns:
            rounded = -(-columns // COLUMN_STEP) * COLUMN_STEP
            self._rebuild(len(self._owners), rounded, [(row, row) for row in range(len(self._owners))])

    def _rebuild(self, rows: int, columns: int, moves: list[tuple[int, int]]) -> None:
        """Change the shape of the buffers; for each (new, old) pair of ``moves``, row old becomes row new."""
        new_rows, old_rows = torch.tensor(moves, dtype=torch.long, device=self._device).view(-1, 2).unbind(1)
        for layer in self._layers:
            layer.rebuild(rows, columns, new_rows, old_rows)
        self._columns = columns

    def _swap(self, rows: Sequence[int], others: Sequence[int], columns: int) -> None:
        """Exchange rows with as many others; no row is named twice, and none holds more than ``columns`` columns."""
        if not rows:
            return
        for row, other in zip(rows, others, strict=True):
            self._owners[row], self._owners[other] = self._owners[other], self._owners[row]
        a, b = torch.tensor(rows, device=self._device), torch.tensor(others, device=self._device)
        for buffer in self._buffers():
            used = buffer[:, :, :columns]
            used[a], used[b] = used[b], used[a]

    def _buffers(self) -> list[Tensor]:
        """Return the keys and values of all layers, [R, H, C, D] each."""
        return [buffer for layer in self._layers for buffer in layer.buffers()]

    def _prefill(self, ids: list[tuple[int, ...]], starts: list[int], first_row: int = 0) -> Tensor:
        """Run the new tokens of rows from ``first_row`` on, sorted by their number, largest first; logits [rows, V]."""
        logits: list[Tensor] = []
        new = [len(row) - start for row, start in zip(ids, starts, strict=True)]
        for rows in _row_groups(new, self._max_tokens, self._max_padding):
            places = slice(first_row + rows.start, first_row + rows.stop)
            logits.append(self._prefill_group(places, ids[rows], starts[rows], new[rows]))
        return torch.cat(logits)

    def _prefill_group(self, rows: slice, ids: list[tuple[int, ...]], starts: list[int], new: list[int]) -> Tensor:
        """Run one group of rows, padded on the left so that every last token is in the last column; [rows, V]."""
        width = new[0]
        padded = [
            [self._pad_token_id] * (width - n) + list(row[start:])
            for row, start, n in zip(ids, starts, new, strict=True)
        ]
        ids_NQ = torch.tensor(padded, device=self._device)
        ends = torch.tensor([len(row) for row in ids], device=self._device)
        positions_NQ = ends[:, None] - width + torch.arange(width, device=self._device)
        is_pad_NQ = positions_NQ < torch.tensor(starts, device=self._device)[:, None]
        logits = torch.empty(0)
        for at in range(0, width, self._max_tokens):  # more than one only for a single long row
            part = slice(at, at + self._max_tokens)
            reach = max(len(row) for row in ids) if part.stop >= width else starts[0] + part.stop
            logits = self._forward(rows, ids_NQ[:, part], positions_NQ[:, part], reach, is_pad_NQ[:, part])
        return logits

    def _forward(
        self, rows: slice, ids: Tensor, positions: Tensor, columns: int, is_pad: Tensor | None = None
    ) -> Tensor:
        """Run [n, Q] tokens at these positions against the first ``columns`` columns; logits of the last, [n, V]."""
        targets = positions if is_pad is None else positions.masked_fill(is_pad, self._columns - 1)
        positions = positions.clamp(min=0)
        window = Window(rows, columns, targets)
        for layer in self._layers:
            layer.window = window
        mask = (torch.arange(columns, device=self._device) <= positions[:, :, None])[:, None]  # [n, 1, Q, K]
        if self._additive_mask:
            lowest = torch.finfo(self._dtype).min
            mask = torch.zeros_like(mask, dtype=self._dtype).masked_fill_(~mask, lowest)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions} | self._extra
        return self._model(**{self._cache_argument: self._cache}, use_cache=True, **inputs).logits[:, -1]


def _row_groups(new: Sequence[int], max_tokens: int, max_padding: int) -> list[slice]:
    """Cut rows, sorted by their number of new tokens, into groups within both limits; every group has a row."""
    groups: list[slice] = []
    start = padding = 0
    for row in range(1, len(new) + 1):
        if row < len(new):
            padding += new[start] - new[row]
            if new[start] * (row + 1 - start) <= max_tokens and padding <= max_padding:
                continue
        groups.append(slice(start, row))
        start, padding = row, 0
    return groups


class FreshKVCache(_ModelCache):
    """A cache for one wave at a time: every wave runs whole histories again, padded on the left.

    Slower, but right for any causal model, also one with sliding-window, linear or other layers whose state cannot be
    cut at a position.
    """

    def __init__(self, model: nn.Module, pad_token_id: int, device: torch.device) -> None:
        super().__init__(model, pad_token_id, device)
        self._takes_positions = "position_ids" in _parameters(model)
        self.clear()

    def clear(self) -> None:
        self._cache = DynamicCache(config=self._model.config)
        self._mask_MK = torch.zeros((0, 0), dtype=torch.long, device=self._device)

    def begin(self, histories: Sequence[History]) -> tuple[list[int], Tensor]:
        self.clear()
        width = max(len(history.token_ids) for history in histories)
        pads = [width - len(history.token_ids) for history in histories]
        padded = [[self._pad_token_id] * pad + list(h.token_ids) for pad, h in zip(pads, histories, strict=True)]
        columns = torch.arange(width, device=self._device)
        self._mask_MK = (columns >= torch.tensor(pads, device=self._device)[:, None]).long()
        self.stats.prefilled_tokens += sum(len(history.token_ids) for history in histories)
        return list(range(len(histories))), self._forward(torch.tensor(padded, device=self._device))

    def step(self, ids_M: Tensor) -> Tensor:
        self._mask_MK = torch.nn.functional.pad(self._mask_MK, (0, 1), value=1)
        return self._forward(ids_M[:, None])

    def keep(self, alive: Sequence[bool]) -> list[int]:
        order = [i for i, is_alive in enumerate(alive) if is_alive]
        index: Any = torch.tensor(order, device=self._device)
        self._cache.reorder_cache(index)  # the one method that every kind of layer has; it may also drop rows
        self._mask_MK = self._mask_MK[index]
        return order

    def end(self, histories: Sequence[History]) -> None:
        self.clear()

    def _forward(self, ids: Tensor) -> Tensor:
        """Run new columns of tokens, [M, Q], and return the logits of the last, [M, V]."""
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": self._mask_MK} | self._extra
        if self._takes_positions:
            inputs["position_ids"] = (self._mask_MK.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self._model(**{self._cache_argument: self._cache}, use_cache=True, **inputs).logits[:, -1]
