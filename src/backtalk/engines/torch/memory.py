"""Memory of a step: the tokens of a micro-batch, as set or as many as fit, and what is kept between phases."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch

from backtalk.engines.torch.packing import MicroBatch, plan_micro_batches
from backtalk.errors import ConfigError
from backtalk.objective.samples import Sample

AUTO_ON_CPU = 8192  # where too much memory ends the process, and no error comes first

T = TypeVar("T")
log = logging.getLogger(__name__)

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; other C libraries return memory by themselves


def release_memory() -> None:
    """Return the memory of freed tensors, which glibc keeps for later ones, to the machine.

    Call it between phases of a step, whose tensors differ in size: what one left does not fit the next. It costs some
    hundredths of a second, and as much again when the memory is taken anew.
    """
    if _trim is not None:
        _trim(0)


class TokenBudget:
    """Plans micro-batches. On a GPU ``auto`` begins with a whole step in one, and halves it whenever it does not fit.

    What fits is remembered and never raised again, so a step is at most a few times begun in vain.
    """

    def __init__(self, setting: int | Literal["auto"], device: torch.device) -> None:
        self._is_found = setting == "auto" and device.type != "cpu"
        self.max_tokens: int | None = AUTO_ON_CPU if setting == "auto" else setting
        if self._is_found:
            self.max_tokens = None  # a whole step
        self._device = device
        self._largest: tuple[int, int] = (0, 0)  # rows and tokens of a row of the last plan's first micro-batch

    def plan(self, samples: Sequence[Sample], *, packing: bool) -> list[MicroBatch]:
        """Split samples into micro-batches within the budget; see ``plan_micro_batches``."""
        whole = len(samples) * max(map(len, samples), default=0)
        parts = plan_micro_batches(samples, max(self.max_tokens or whole, 1), packing=packing)
        if parts:  # the first has the longest samples
            self._largest = len(parts[0]), max(sum(map(len, row)) for row in parts[0])
        return parts

    def fit(self, work: Callable[[], T], undo: Callable[[], None]) -> T:
        """Run ``work`` with the current plan and return its result; out of memory, ``undo`` it and try a smaller plan.

        On a CPU, memory that earlier work has freed is given back to the system first.

        Raises:
            ConfigError: the budget is set and does not fit, or not even one row fits.
        """
        if self._device.type == "cpu":
            release_memory()
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                reason = str(error).partition("\n")[0]
            undo()  # after the error is gone, with the tensors that its traceback held
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            self._halve(reason)

    def _halve(self, reason: str) -> None:
        rows, width = self._largest
        if rows <= 1:
            raise ConfigError(
                f"a row of {width} tokens does not fit into the memory of {self._device} ({reason}); set "
                "engine.gradient_checkpointing=true, train adapters (engine.lora_rank=16), or lower rollout.max_tokens"
            )
        if not self._is_found:
            raise ConfigError(
                f"a micro-batch of {rows} rows of {width} tokens does not fit into the memory of {self._device} "
                f"({reason}); set engine.max_tokens_per_microbatch=auto, or below {rows * width}"
            )
        self.max_tokens = rows * width // 2
        log.warning(
            "a micro-batch of %d tokens does not fit into the memory of %s; %d at most from now on",
            rows * width,
            self._device,
            self.max_tokens,
        )
