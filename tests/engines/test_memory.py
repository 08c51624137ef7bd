"""Micro-batches that fit: PyTorch's own error at a limit of tokens, in the forward pass and amid the backward pass."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from backtalk.engines.torch.config import TorchConfig
from backtalk.engines.torch.engine import TorchEngine
from backtalk.engines.torch.memory import AUTO_ON_CPU, TokenBudget
from backtalk.errors import ConfigError
from backtalk.objective.coefficient import Share
from backtalk.objective.samples import build_samples
from engine_help import BOTH, MIXED, make_engine, make_group, weights

GPU = torch.device("cuda")  # its memory is that of `limit_memory`


def limit_memory(engine: TorchEngine, forward: int, backward: int) -> list[int]:
    """Let passes over more tokens end as they do on a GPU; return the sizes of all forward passes."""
    seen: list[int] = []

    def check(tokens: int, most: int) -> None:
        if tokens > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    def before(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        seen.append(inputs["input_ids"].numel())
        check(seen[-1], forward)

    def amid(module: Any, inputs: Any, outputs: tuple[torch.Tensor, ...]) -> None:
        check(outputs[0].shape[0] * outputs[0].shape[1], backward)

    decoder = engine.model.get_decoder()
    decoder.register_forward_pre_hook(before, with_kwargs=True)
    decoder.layers[0].register_full_backward_hook(amid)  # the last layer has its gradient by then
    return seen


@pytest.mark.parametrize("config", [BOTH, replace(BOTH, world_model_coeff=Share(0.3))], ids=["number", "share"])
def test_auto_halves_until_a_step_fits_and_remembers(
    model_dir: Path, config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    samples = build_samples(make_group(MIXED))
    width = max(map(len, samples))
    engine = make_engine(model_dir, measure_gradients_every=1)
    engine._budget = TokenBudget("auto", GPU)
    seen = limit_memory(engine, forward=4 * width, backward=3 * width)

    with caplog.at_level(logging.WARNING):
        metrics = asyncio.run(engine.train_step(samples, config))
    assert seen[:2] == [5 * width, 2 * width]  # 5 rows do not fit forwards; half of that are 2 rows
    assert f"a micro-batch of {5 * width} tokens does not fit into the memory of cuda; {5 * width // 2}" in caplog.text

    fixed = make_engine(model_dir, measure_gradients_every=1, max_tokens_per_microbatch=5 * width // 2)
    expected = asyncio.run(fixed.train_step(samples, config))
    assert {**metrics} == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    assert torch.equal(weights(engine), weights(fixed))
    del seen[:]
    asyncio.run(engine.train_step(samples, config))
    assert max(seen) <= 2 * width


def test_what_a_broken_backward_pass_left_is_forgotten(model_dir: Path) -> None:
    samples = build_samples(make_group(MIXED))
    width = max(map(len, samples))
    engine = make_engine(model_dir)
    engine._budget = TokenBudget("auto", GPU)
    limit_memory(engine, forward=9 * width, backward=2 * width)
    metrics = asyncio.run(engine.train_step(samples, BOTH))
    fixed = make_engine(model_dir, max_tokens_per_microbatch=5 * width // 2)
    assert asyncio.run(fixed.train_step(samples, BOTH)) == pytest.approx(metrics, rel=0, abs=0, nan_ok=True)
    assert torch.equal(weights(engine), weights(fixed))


def test_scores_fit_too(model_dir: Path) -> None:
    engine, group = make_engine(model_dir), make_group(MIXED)
    expected = asyncio.run(engine.score(list(group)))
    engine._budget = TokenBudget("auto", GPU)
    limit_memory(engine, forward=2 * max(map(len, group)), backward=0)
    for ours, theirs in zip(asyncio.run(engine.score(list(group))), expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_what_cannot_fit_says_what_to_set(model_dir: Path) -> None:
    samples = build_samples(make_group(MIXED))
    width = max(map(len, samples))
    engine = make_engine(model_dir)
    engine._budget = TokenBudget("auto", GPU)
    limit_memory(engine, forward=width - 1, backward=0)
    with pytest.raises(ConfigError, match=rf"a row of {width} tokens.*Tried to allocate 2.00 GiB.*lora_rank=16"):
        asyncio.run(engine.train_step(samples, BOTH))
    engine = make_engine(model_dir)
    limit_memory(engine, forward=width, backward=0)
    with pytest.raises(ConfigError, match=rf"5 rows of {width} tokens.*max_tokens_per_microbatch=auto"):
        asyncio.run(engine.train_step(samples, BOTH))
    assert TokenBudget("auto", torch.device("cpu")).max_tokens == AUTO_ON_CPU == TorchConfig().max_tokens_per_microbatch


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library returns memory by itself")
def test_memory_of_freed_tensors_is_returned() -> None:
    def resident_mib() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    kept = [torch.ones(8192) for _ in range(2000)]  # 32 KiB each, so not maps of their own; 62 MiB
    last, full = kept.pop(), resident_mib()  # the end of the heap stays in use
    kept.clear()
    TokenBudget("auto", torch.device("cpu")).fit(lambda: None, lambda: None)
    assert resident_mib() < full - 50
    assert last.sum() == 8192
