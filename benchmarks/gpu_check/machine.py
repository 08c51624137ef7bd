"""The device: its name, its ceilings by the data sheet and as measured, and how to time work on it."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

GIB = 2**30

# Dense bf16 in TFLOP/s and memory in GB/s by the vendors' data sheets, by a part of the name that PyTorch gives.
DATA_SHEETS = {
    "H200": (989, 4800),
    "H100 80GB HBM3": (989, 3350),
    "H100 PCIe": (756, 2000),
    "A100-SXM4-80GB": (312, 2039),
    "A100-SXM4-40GB": (312, 1555),
    "L40S": (362, 864),
    "RTX 4090": (165, 1008),
}


@dataclass(frozen=True, slots=True)
class Device:
    """The device that is measured, with the type of numbers that training uses there."""

    device: torch.device

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Return the type in which `dtype: auto` keeps weights."""
        return torch.bfloat16 if self.is_gpu else torch.float32

    @property
    def name(self) -> str:
        if self.is_gpu:
            return torch.cuda.get_device_name(self.device)
        return f"{os.cpu_count()}-core {platform.machine()} CPU, {torch.get_num_threads()} threads"

    @property
    def memory(self) -> int:
        """Return the bytes of memory of the device."""
        if self.is_gpu:
            return torch.cuda.get_device_properties(self.device).total_memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def about(self) -> dict[str, Any]:
        """Return what every number depends on."""
        versions = {name: version(name) for name in ("torch", "transformers", "peft", "liger-kernel", "trl")}
        driver = {"CUDA": torch.version.cuda} if self.is_gpu else {}
        facts = {"device": self.name, "memory GiB": round(self.memory / GIB), "Python": platform.python_version()}
        return facts | {name: found for name, found in versions.items() if found} | driver

    def synchronize(self) -> None:
        """Wait until the device has done all work."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], Any]) -> float:
        """Return the seconds that one call takes until the device is done."""
        self.synchronize()
        started = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - started

    def median_seconds(self, work: Callable[[], Any], repeats: int = 10) -> float:
        """Return the median seconds of a call, after three that warm up."""
        for _ in range(3):
            work()
        return statistics.median(self.seconds(work) for _ in range(repeats))

    def reset_peak(self) -> None:
        """Begin to look for the largest memory anew."""
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float:
        """Return the most memory that tensors took since ``reset_peak``, in GiB; NaN on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / GIB if self.is_gpu else float("nan")


def version(package: str) -> str | None:
    """Return the version of an installed package; None without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def roofline(device: Device) -> dict[str, Any]:
    """Measure a large matrix product and a large copy, on random data, beside the data sheet."""
    size, count = (8192, 2**30) if device.is_gpu else (1024, 2**26)
    a, b = (torch.randn(size, size, device=device.device, dtype=device.dtype) for _ in range(2))
    product_s = device.median_seconds(lambda: a @ b)
    source = torch.randn(count, device=device.device, dtype=device.dtype)
    target = torch.empty_like(source)
    copy_s = device.median_seconds(lambda: target.copy_(source))
    sheet = next((numbers for name, numbers in DATA_SHEETS.items() if name in device.name), (float("nan"),) * 2)
    return {
        f"matrix product, {str(device.dtype).removeprefix('torch.')} TFLOP/s": 2 * size**3 / product_s / 1e12,
        "data sheet TFLOP/s": sheet[0],
        "copy, read and written GB/s": 2 * source.nbytes / copy_s / 1e9,
        "data sheet GB/s": sheet[1],
    }
