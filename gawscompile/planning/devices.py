"""What the cost model knows of a machine: bandwidth, rates, launch costs.

The numbers are per machine *kind*, from trials named beside them; they need only rank plans, not predict times.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Device:
    """Rates in bytes per second and floating-point operations per second, times in seconds.

    The dictionaries go by dtype name. `library_bandwidth` is what the vendor's matmul streams at one token, which is
    far less than the memory gives.
    """

    name: str
    bandwidth: float
    launch: float
    library_launch: float
    kernel_rate: dict[str, float]
    library_rate: dict[str, float]
    library_bandwidth: dict[str, float]

    def __hash__(self) -> int:
        return hash(self.name)


def cpu() -> Device:
    """This machine's CPU, for torch's present number of threads."""
    return _cpu(torch.get_num_threads(), _vendor(), torch.backends.cpu.get_cpu_capability(), _has("avx512_bf16"))


@functools.cache
def _cpu(threads: int, vendor: str, capability: str, bf16_dot: bool) -> Device:
    wide = 1.0 if "512" in capability else 0.5
    # Fitted to `python -m benchmarks.projections` on 2 threads of an AMD EPYC (family 26) with avx512_bf16, weights
    # from memory as in a model (warm, oneDNN looks better than it is), as bytes / bandwidth + flops / rate.
    # MKL runs fp32 below its rate on other vendors' CPUs; on Intel's own it is taken to reach the kernel's.
    mkl = 103e9 if vendor != "GenuineIntel" else 175e9
    return Device(
        name=f"cpu:{vendor}:{capability}:bf16={int(bf16_dot)}:threads={threads}",
        bandwidth=min(threads, 8) * 24e9,
        launch=2e-6,
        library_launch=50e-6 if bf16_dot else 5e-6,
        kernel_rate={
            "f32": threads * wide * 175e9,
            "bf16": threads * wide * (445e9 if bf16_dot else 120e9),
            "f16": threads * wide * 120e9,
        },
        library_rate={
            "f32": threads * wide * mkl,
            "bf16": threads * wide * (500e9 if bf16_dot else 120e9),
            "f16": threads * wide * 120e9,
        },
        library_bandwidth={
            "f32": min(threads, 8) * 14e9,
            "bf16": min(threads, 8) * 12.5e9,
            "f16": min(threads, 8) * 12.5e9,
        },
    )


def _cpuinfo(field: str) -> str:
    try:
        match = re.search(rf"^{field}\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return ""
    return match[1] if match else ""


@functools.cache
def _vendor() -> str:
    return _cpuinfo("vendor_id") or "unknown"


@functools.cache
def _has(flag: str) -> bool:
    return flag in _cpuinfo("flags").split()
