"""Key-value cache of the continuous sampler: rows join and leave the batch one by one, between two tokens."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import count

import torch
from torch import Tensor

from backtalk.engines.torch.kv import History, PersistentKVCache

ROW_STEP = 8  # rows are added in steps of this, so that growing is rare


class SlotKVCache(PersistentKVCache):
    """One row for each open session: first the M that decode, then those that wait for a command, and free ones.

    As in the cache of waves, a token's position is its column, so rows of any length decode side by side, and a row
    that joins or leaves changes places with one other.
    """

    def join(self, histories: Sequence[History]) -> tuple[list[int], Tensor]:
        """Run the new tokens of rows that begin to decode, and put them behind those that do.

        Returns the index of the history in each new row, and the logits after its last token, [n, V].
        """
        first: dict[tuple[int, ...], int] = {}
        is_first = [first.setdefault(h.token_ids, i) == i for i, h in enumerate(histories)]
        order, logits = [], []
        for part in (True, False):  # the same prompt again finds its tokens in the row of the first
            indices = [i for i, value in enumerate(is_first) if value is part]
            if indices:
                order_of_part, logits_NV = self._join([histories[i] for i in indices])
                order += [indices[i] for i in order_of_part]
                logits.append(logits_NV)
        return order, torch.cat(logits)

    def free(self, owner: Hashable) -> None:
        """Give back the row of a session that has closed, and does not decode."""
        self._held.pop(owner, None)
        self._owners = [None if other == owner else other for other in self._owners]
        if self._owners.count(None) == len(self._owners):
            self.clear()

    def _join(self, histories: Sequence[History]) -> tuple[list[int], Tensor]:
        self._make_room(histories)
        starts = [self._start(history) for history in histories]
        new = [len(h.token_ids) - start for h, start in zip(histories, starts, strict=True)]
        order = sorted(range(len(histories)), key=lambda i: (-new[i], i))
        begin = len(self._ends)
        for row, i in enumerate(order, begin):
            other = self._owners.index(histories[i].owner)
            if other != row:
                self._swap([row], [other], self._columns)
        logits_NV = self._prefill([histories[i].token_ids for i in order], [starts[i] for i in order], begin)
        self._ends += [len(histories[i].token_ids) for i in order]
        self._next_M = torch.tensor(self._ends, device=self._device)
        self._top = max(self._ends)
        self._held |= {history.owner: history.token_ids for history in histories}
        self.stats.prefilled_tokens += sum(new)
        return order, logits_NV

    def _make_room(self, histories: Sequence[History]) -> None:
        """Give every history a row, and enough columns; the last column takes the padding."""
        owners = set(self._owners)
        homeless = [history.owner for history in histories if history.owner not in owners]
        lacking = len(homeless) - self._owners.count(None)
        if lacking > 0:
            kept = [(row, row) for row in range(len(self._owners))]
            self._owners += [None] * (-(-lacking // ROW_STEP) * ROW_STEP)
            self._rebuild(len(self._owners), self._columns, kept)
        free = (row for row in count() if self._owners[row] is None)
        for owner in homeless:
            self._owners[next(free)] = owner
        self._grow(max(len(history.token_ids) for history in histories) + 1)

    def _start(self, history: History) -> int:
        """Return the number of leading tokens that need not run: the row holds them, or they are copied from another.

        They are copied where another row begins with all tokens but the last, as those of a group do.
        """
        if history.owner in self._held:
            start = self._reusable(history)
            self.stats.reused_tokens += start
            return start
        known = history.token_ids[:-1]
        for owner, held in self._held.items():
            if known and held[: len(known)] == known:
                row, other = self._owners.index(history.owner), self._owners.index(owner)
                for buffer in self._buffers():
                    buffer[row, :, : len(known)] = buffer[other, :, : len(known)]
                self.stats.shared_tokens += len(known)
                return len(known)
        return 0
