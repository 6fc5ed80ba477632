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
from typing import Any, TypeVar

import torch

from gawscompile import cache
from gawscompile.ir.types import DTYPES

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
    vendor library's peak), `vector_rate` is fp32's. `tensor_share` is what matmuls by tiles, the library's and ours,
    reach of the bandwidth at a few tokens; `tile_share` and `library_share` are what ours and the library's reach of
    the matrix rate where it is the bound. The rates are the makers' published peaks; latencies and launch costs are
    rounded from published micro-benchmarks. `gawscompile calibrate` fits all but the matrix rates to a card.
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
    tensor_share: float = 0.8
    tile_share: float = 0.5
    library_share: float = 0.75

    def __hash__(self) -> int:
        return hash(self.name)


def _rates(half: float, single: float) -> dict[str, float]:
    return {"bf16": half, "f16": half, "f32": single}


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", "cuda:80", 108, 2.0e12, 4.0e12, 19.5e12, _rates(312e12, 19.5e12)),
        Gpu("H200", "cuda:90", 132, 4.8e12, 5.5e12, 67e12, _rates(989e12, 67e12)),
        Gpu("H100", "cuda:90", 132, 3.35e12, 5.5e12, 67e12, _rates(989e12, 67e12)),
        Gpu("B200", "cuda:100", 148, 8.0e12, 12e12, 75e12, _rates(2250e12, 75e12)),
        Gpu("MI300X", "hip:gfx942", 304, 5.3e12, 10e12, 163e12, _rates(1307e12, 163e12), launch=3e-6),
    )
}
_planned_for: contextvars.ContextVar[Device | Gpu | None] = contextvars.ContextVar("planned_for", default=None)


@contextlib.contextmanager
def planning_for(device: Device | Gpu | None) -> Iterator[None]:
    """Within, every group is planned for `device`, whatever device its tensors are on: for compilation ahead of time,
    and where several ranks plan alike. None: as without."""
    token = _planned_for.set(device or _planned_for.get())
    try:
        yield
    finally:
        _planned_for.reset(token)


def of(kind: str) -> Device | Gpu:
    """The device that groups with tensors on a `kind` of device ("cpu", "cuda") are planned for."""
    return _planned_for.get() or (cpu() if kind == "cpu" else _gpu(torch.cuda.current_device()))


def on_cpu(node: torch.fx.Node) -> bool:
    """Whether what computes `node` is planned for a CPU."""
    kind: str = node.meta["val"].device.type
    return kind in ("cpu", "cuda") and isinstance(of(kind), Device)


@functools.cache
def _gpu(index: int) -> Gpu:
    """GPU number `index` of this machine, as calibrated, or else by its kind."""
    default = default_gpu(index)
    try:
        return _stored(cache.root() / GPU_CALIBRATIONS).get(default.name, default)
    except cache.CacheError:  # whoever needs the folder says so
        return default


def default_gpu(index: int) -> Gpu:
    """What is known of GPU number `index`, under its own name and with its own count of multiprocessors (a slice of a
    card has fewer): the kind that is in its name, or else the one that its compute capability is nearest to."""
    properties = torch.cuda.get_device_properties(index)
    name = str(torch.cuda.get_device_name(index))
    known = next((gpu for gpu in GPUS.values() if gpu.name in name), None)
    if known is None and torch.version.hip:
        known = GPUS["MI300X"]
    if known is None:
        major, _ = torch.cuda.get_device_capability(index)
        known = GPUS["B200" if major >= 10 else "H100" if major == 9 else "A100"]
    return dataclasses.replace(known, name=name, multiprocessors=int(properties.multi_processor_count))


def cpu() -> Device:
    """This machine's CPU, for torch's present number of threads: as calibrated, or else by its kind."""
    default = default_cpu()
    try:
        return _stored(cache.root() / CALIBRATIONS).get(default.name, default)
    except cache.CacheError:  # whoever needs the folder says so
        return default


def default_cpu() -> Device:
    """What is known of this kind of CPU."""
    capability = torch.backends.cpu.get_cpu_capability()
    return _cpu(torch.get_num_threads(), _cpuinfo("vendor_id"), _cpuinfo("cpu family"), capability, _bf16())


Kind = TypeVar("Kind", Device, Gpu)
CALIBRATIONS, GPU_CALIBRATIONS = "calibrations.json", "gpu_calibrations.json"
"""In the cache folder: device name → the constants that `gawscompile calibrate` has fitted."""


def store(device: Kind) -> Kind:
    """Keeps `device` for this and later processes, and returns it as they will see it. Raises `CacheError`."""
    path = cache.root() / (GPU_CALIBRATIONS if isinstance(device, Gpu) else CALIBRATIONS)
    with cache.locked(cache.digest(path.name)):
        kept = _read(path) | {device.name: dataclasses.asdict(device)}
        cache.write_atomic(path, json.dumps(kept, indent=1, sort_keys=True))
    _stored.cache_clear()
    _gpu.cache_clear()
    found: Kind = _stored(path)[device.name]
    return found


@functools.cache
def _stored(path: Path) -> dict[str, Any]:
    """The calibrated devices by the names of their kinds; their own tell the constants apart, as keys must."""
    found = {}
    for name, constants in _read(path).items():
        device = _kind(path)(**constants)
        told = cache.digest(json.dumps(constants, sort_keys=True))[:8]
        found[name] = dataclasses.replace(device, name=f"{name}:calibrated={told}")
    return found


def _kind(path: Path) -> Any:
    return Gpu if path.name == GPU_CALIBRATIONS else Device


def _read(path: Path) -> dict[str, Any]:
    """What lies there; nothing, and a warning, where it is no calibration."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        for constants in kept.values():
            device = dataclasses.asdict(_kind(path)(**constants))
            found = [value for name, value in device.items() if name not in ("name", "target")]
            rates = [value for value in found if isinstance(value, dict)]
            numbers = [value for value in found if value not in rates] + [v for rate in rates for v in rate.values()]
            if not all(0 < number < float("inf") for number in numbers) or any(set(r) != set(DTYPES) for r in rates):
                raise ValueError("a constant that is no positive number, or a dtype without its rate")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("gaws: %s is no calibration (%s): run `gawscompile calibrate` again", path, error)
        return {}
    return kept


@dataclass(frozen=True)
class _Core:
    """A thread of a kind of CPU with vectors of 512 bits; the dictionaries as in `Device`."""

    bandwidth: float
    library_launch: float
    kernel: dict[str, float]
    library: dict[str, float]
    streamed: dict[str, float]


def _each(f32: float, bf16: float, f16: float) -> dict[str, float]:
    return {"f32": f32, "bf16": bf16, "f16": f16}


# From `python -m benchmarks.projections` and `gawscompile calibrate` on 2 threads, weights from memory as in a model
# (warm, oneDNN looks better than it is). AMX's tiles leave dot products of vectors behind from a dozen tokens on.
_ZEN5 = _Core(24e9, 50e-6, _each(175e9, 445e9, 120e9), _each(103e9, 500e9, 120e9), _each(14e9, 12.5e9, 12.5e9))
_ZEN4 = _Core(17e9, 27e-6, _each(86e9, 230e9, 80e9), _each(100e9, 226e9, 80e9), _each(6.7e9, 12.3e9, 12e9))
_AMX = _Core(11.2e9, 5e-6, _each(145e9, 107e9, 120e9), _each(167e9, 1450e9, 120e9), _each(7.75e9, 5e9, 7.75e9))
_CONVERTED = 120e9  # operations per second in bf16 where the CPU has nothing for it
_LOOP = 20e9  # of the library in 16 bits on two threads without AVX-512, where torch multiplies in a loop
_WIDENED = 0.85  # our rate in bf16 there, over that in fp32; fp16 is taken for bf16
_MEMORY_THREADS = 8  # that memory feeds as well as it feeds one


@functools.cache
def _cpu(threads: int, vendor: str, family: str, capability: str, bf16: str) -> Device:
    core = _AMX if vendor == "GenuineIntel" else _ZEN4 if (vendor, family) == ("AuthenticAMD", "25") else _ZEN5
    kernel, library = dict(core.kernel), dict(core.library)
    if bf16 != "amx" and core is _AMX:
        kernel["bf16"], library["bf16"] = _ZEN5.kernel["bf16"], _ZEN5.library["bf16"]
    if not bf16:
        kernel["bf16"] = library["bf16"] = _CONVERTED
    if capability == "AVX2" and not bf16:  # oneDNN multiplies 16 bits with AVX-512 alone
        for half in ("bf16", "f16"):
            kernel[half], library[half] = _WIDENED * kernel["f32"], _LOOP
    vectors = threads * (1.0 if "512" in capability else 0.5)
    streams = min(threads, _MEMORY_THREADS)
    return Device(
        name=f"cpu:{vendor}:{family}:{capability}:bf16={bf16 or 'none'}:threads={threads}",
        bandwidth=streams * core.bandwidth,
        launch=2e-6,
        library_launch=core.library_launch,
        kernel_rate={name: vectors * rate for name, rate in kernel.items()},
        library_rate={name: vectors * rate for name, rate in library.items()},
        library_bandwidth={name: streams * rate for name, rate in core.streamed.items()},
    )


def multiplies_in_fp32(dtype: str) -> bool:
    """Whether this CPU has vectors that C++ kernels are written for, and the library nothing better for `dtype`."""
    wide = "AVX" in torch.backends.cpu.get_cpu_capability()
    better = {"f32": False, "bf16": bool(_bf16()), "f16": _has("avx512_fp16")}
    return wide and not better.get(dtype, True)


def _bf16() -> str:
    """What the CPU has for bf16: tiles, dot products, or nothing."""
    return "amx" if _has("amx_bf16") else "dot" if _has("avx512_bf16") else ""


@functools.cache
def _cpuinfo(field: str) -> str:
    """The first CPU's, or "unknown"."""
    try:
        match = re.search(rf"^{field}\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return "unknown"
    return match[1] if match else "unknown"


def _has(flag: str) -> bool:
    return flag in _cpuinfo("flags").split()
