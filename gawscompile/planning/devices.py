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
    return _cpu(torch.get_num_threads(), _vendor(), torch.backends.cpu.get_cpu_capability(), _bf16())


@functools.cache
def _cpu(threads: int, vendor: str, capability: str, bf16: str) -> Device:
    # Fitted to `python -m benchmarks.projections` on 2 threads, weights from memory as in a model (warm, oneDNN looks
    # better than it is), as bytes / bandwidth + flops / rate: an AMD EPYC (family 26) with avx512_bf16, and an Intel
    # Xeon with AMX, whose tiles leave dot products of vectors behind from some six tokens on. Others are taken to be
    # like the former, without its dot products.
    wide = 1.0 if "512" in capability else 0.5
    intel = vendor == "GenuineIntel"
    kernel = {"f32": 145e9 if intel else 175e9, "bf16": {"amx": 107e9, "dot": 445e9, "": 120e9}[bf16], "f16": 120e9}
    library = {"f32": 167e9 if intel else 103e9, "bf16": {"amx": 1450e9, "dot": 500e9, "": 120e9}[bf16], "f16": 120e9}
    streamed = {"f32": 14e9, "bf16": 5e9 if bf16 == "amx" else 12.5e9, "f16": 12.5e9}
    return Device(
        name=f"cpu:{vendor}:{capability}:bf16={bf16 or 'none'}:threads={threads}",
        bandwidth=min(threads, 8) * (11.2e9 if intel else 24e9),
        launch=2e-6,
        library_launch=50e-6 if bf16 == "dot" else 5e-6,
        kernel_rate={name: threads * wide * rate for name, rate in kernel.items()},
        library_rate={name: threads * wide * rate for name, rate in library.items()},
        library_bandwidth={
            name: min(threads, 8) * min(rate, 7.75e9 if intel else rate) for name, rate in streamed.items()
        },
    )


def _bf16() -> str:
    """What the CPU has for bf16: tiles, dot products, or nothing."""
    return "amx" if _has("amx_bf16") else "dot" if _has("avx512_bf16") else ""


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
