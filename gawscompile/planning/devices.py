"""What the cost model knows of a machine: bandwidth, rates, launch costs.

The numbers are per machine *kind*, from trials named beside them; they need only rank plans, not predict times.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gawscompile.codegen import cache

log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Gpu:
    """What the cost model knows of a GPU: bytes and floating-point operations per second, seconds.

    `launch` is what one more kernel costs in a CUDA graph, `publish` what waiting for other programs of the same
    launch costs, `latency` that of a load from memory. `matrix_rate` goes by dtype name (dense, `tl.dot`'s and the
    vendor library's peak), `vector_rate` is fp32's. The rates are the makers' published peaks; latencies and launch
    costs are rounded from published micro-benchmarks and were not measured by us.
    """

    name: str
    target: str
    multiprocessors: int
    bandwidth: float
    cache_bandwidth: float
    vector_rate: float
    matrix_rate: dict[str, float]
    launch: float = 2e-6
    publish: float = 1e-6
    latency: float = 0.8e-6

    def __hash__(self) -> int:
        return hash(self.name)


def _rates(half: float, single: float) -> dict[str, float]:
    return {"bf16": half, "f16": half, "f32": single}


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", "cuda:80", 108, 2.0e12, 4.0e12, 19.5e12, _rates(312e12, 19.5e12)),
        Gpu("H100", "cuda:90", 132, 3.35e12, 5.5e12, 67e12, _rates(989e12, 67e12)),
        Gpu("B200", "cuda:100", 148, 8.0e12, 12e12, 75e12, _rates(2250e12, 75e12)),
        Gpu("MI300X", "hip:gfx942", 304, 5.3e12, 10e12, 163e12, _rates(1307e12, 163e12), launch=3e-6),
    )
}
_planned_for: contextvars.ContextVar[Gpu | None] = contextvars.ContextVar("planned_for", default=None)


@contextlib.contextmanager
def planning_for(gpu: Gpu) -> Iterator[None]:
    """Within, every group is planned for `gpu`, whatever device its tensors are on: for compilation ahead of time."""
    token = _planned_for.set(gpu)
    try:
        yield
    finally:
        _planned_for.reset(token)


def of(kind: str) -> Device | Gpu:
    """The device that groups with tensors on a `kind` of device ("cpu", "cuda") are planned for."""
    return _planned_for.get() or (cpu() if kind == "cpu" else _gpu(torch.cuda.current_device()))


@functools.cache
def _gpu(index: int) -> Gpu:
    """GPU number `index` of this machine, by its name, or else the one that its compute capability is nearest to."""
    name = torch.cuda.get_device_name(index)
    for known in GPUS.values():
        if known.name in name:
            return known
    if torch.version.hip:
        return GPUS["MI300X"]
    major, _ = torch.cuda.get_device_capability(index)
    return GPUS["B200" if major >= 10 else "H100" if major == 9 else "A100"]


def cpu() -> Device:
    """This machine's CPU, for torch's present number of threads: as calibrated, or else by its kind."""
    default = default_cpu()
    try:
        return _stored(cache.root() / CALIBRATIONS).get(default.name, default)
    except cache.CacheError:  # whoever needs the folder says so
        return default


def default_cpu() -> Device:
    """What is known of this kind of CPU."""
    return _cpu(torch.get_num_threads(), _vendor(), torch.backends.cpu.get_cpu_capability(), _bf16())


CALIBRATIONS = "calibrations.json"
"""In the cache folder: device name → the constants that `gawscompile.calibrate` has fitted."""


def store(device: Device) -> Device:
    """Keeps `device` for this and later processes, and returns it as they will see it. Raises `CacheError`."""
    path = cache.root() / CALIBRATIONS
    with cache.locked(cache.digest(CALIBRATIONS)):
        kept = _read(path) | {device.name: dataclasses.asdict(device)}
        cache.write_atomic(path, json.dumps(kept, indent=1, sort_keys=True))
    _stored.cache_clear()
    return _stored(path)[device.name]


@functools.cache
def _stored(path: Path) -> dict[str, Device]:
    """The calibrated devices by the names of their kinds; their own tell the constants apart, as keys must."""
    found = {}
    for name, constants in _read(path).items():
        device = Device(**constants)
        told = cache.digest(json.dumps(constants, sort_keys=True))[:8]
        found[name] = dataclasses.replace(device, name=f"{name}:calibrated={told}")
    return found


def _read(path: Path) -> dict[str, Any]:
    """What lies there; nothing, and a warning, where it is no calibration."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        for constants in kept.values():
            rates = (*constants["kernel_rate"].values(), *constants["library_rate"].values())
            numbers = (constants["bandwidth"], *rates, *constants["library_bandwidth"].values())
            if not all(isinstance(number, float) and 0 < number < float("inf") for number in numbers):
                raise ValueError("a constant that is no positive number")
            Device(**constants)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("gaws: %s is no calibration (%s): run `gawscompile calibrate` again", path, error)
        return {}
    return kept


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
