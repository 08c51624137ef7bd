"""Drawing tokens: random numbers of a call, and the inverse of a distribution.

Legend: M rows of the batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def uniform_numbers(seed: int, key: str, call: int, count: int) -> np.ndarray:
    """Return ``count`` random numbers in [0, 1), which depend on seed, session key and call alone; float64."""
    digest = hashlib.sha256(f"{seed}/{call}/{key}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(count)


def sample_tokens(logits_MV: Tensor, uniforms_M: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sample ids by inverse CDF, and return them with their log-probabilities in nats at this temperature, [M] each.

    Temperature 0 takes the largest logit; its log-probability is that at temperature 1, since at temperature 0 every
    log-probability would be 0.
    """
    logprobs_MV = torch.log_softmax(logits_MV.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        ids_M = logprobs_MV.argmax(-1)
    else:
        # In float64, so that rare tokens of a large vocabulary keep their share.
        cdf_MV = logprobs_MV.exp().cumsum(-1, dtype=cdf_dtype(logits_MV.device))
        threshold_M1 = (uniforms_M * cdf_MV[:, -1])[:, None]
        ids_M = torch.searchsorted(cdf_MV, threshold_M1, right=True)[:, 0].clamp(max=logits_MV.shape[-1] - 1)
    return ids_M, logprobs_MV.gather(-1, ids_M[:, None])[:, 0]


def cdf_dtype(device: torch.device) -> torch.dtype:
    """Return the widest float type of a device."""
    return torch.float32 if device.type == "mps" else torch.float64  # Metal has no float64


def start_reading(*rows_M: Tensor) -> Callable[[], list[list]]:
    """Start to copy tensors of one row each from their device, and return a function that waits for them alone."""
    if rows_M[0].device.type != "cuda":
        return lambda: [row_M.tolist() for row_M in rows_M]
    on_host = [torch.empty(row_M.shape, dtype=row_M.dtype, pin_memory=True) for row_M in rows_M]
    for host_M, row_M in zip(on_host, rows_M, strict=True):
        host_M.copy_(row_M, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[list]:
        copied.synchronize()
        return [host_M.tolist() for host_M in on_host]

    return read
