"""The op that planned groups lower to, ``gaws::project``, and the building of its kernels.

    gaws::project(Tensor x, Tensor[] operands, str program) -> Tensor[]

`x` is ``[..., k]``; `operands` follow ``KernelSpec.operands()``, or ``Program.operands`` makes those of them where some
are hoisted; `program` is a printed ``Program``. The outputs are
``[..., n]``, one per projection (one in all under ``KernelSpec.swiglu``), contiguous. The op is defined here at import,
with its fake; its CPU kernel is `dispatch.cpp`, built and loaded by `ensure_loaded`, its CUDA kernel is in `gpu`. A
program met for the first time in a process (a warm start runs no pass) is parsed, emitted, built and registered then.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from gawscompile.codegen import build
from gawscompile.codegen.cpp_sums import CHECKSUM, unit_rows
from gawscompile.ir.recipe import hoisted
from gawscompile.ir.types import ANY, DTYPES, OPERAND_DTYPES, SpecError
from gawscompile.planning.table import Program
from gawscompile.planning.targets import CPP
from gawscompile.runtime import forks, gpu

LIBRARY = torch.library.Library("gaws", "DEF")
LIBRARY.define(
    "project(Tensor x, Tensor[] operands, str program) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def _fake(x: torch.Tensor, operands: list[torch.Tensor], program: str) -> list[torch.Tensor]:
    outputs = Program.parse(program).spec.outputs
    return [x.new_empty((*x.shape[:-1], n), dtype=DTYPES[dtype]) for n, dtype in outputs]


torch.library.register_fake("gaws::project", _fake, lib=LIBRARY)
LIBRARY.define("derive(Tensor[] sources, str recipe) -> Tensor")
# `Executor`'s. Its kernel is in the library that `ensure_loaded` loads, and torch wants no kernel without an op.
LIBRARY.define("execute(Tensor[] inputs, int[] integers, int executor) -> Tensor[]")
LIBRARY.define("lend(Tensor[] inputs, int executor) -> Tensor[]")
LIBRARY.define("resume(Tensor[] rest, int watch) -> Tensor[]")


def _derive(sources: list[torch.Tensor], recipe: str) -> torch.Tensor:
    """Called by the dispatcher for an operand that is hoisted, whose sources have changed: new memory."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        found = hoisted(recipe, [source.detach() for source in sources])
        kept = {source.untyped_storage().data_ptr() for source in sources}
        return found.clone() if found.untyped_storage().data_ptr() in kept else found


LIBRARY.impl("derive", _derive, "CPU")
LIBRARY.impl("project", gpu.project, "CUDA")

OPS = (torch.ops.gaws.project.default, torch.ops.gaws.project_traced.default)

SCALAR_TYPES = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bool: 11,
    torch.bfloat16: 15,
}
"""The numbers of c10::ScalarType."""


def scalar_type(name: str) -> int:
    """That of a dtype by the name that specs have for it (``bf16``)."""
    return SCALAR_TYPES[OPERAND_DTYPES[name]]



_FREE = {"m": -1, ANY: -2}
"""Sizes that the dispatcher learns in a call."""

_FLAT = -3
"""Stands before how many numbers there are, in any shape."""

REGISTERS: dict[str, Callable[[str], None]] = {}
"""What builds kernels of other ops than this one, by how their names begin."""

_Resolver = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)
_lock = threading.RLock()
forks.held_across(_lock)
_kept: list[object] = []  # what C++ points to: the callback, error messages


def start_loading() -> None:
    """Have the op's CPU kernel built in the background where that was not yet done on this machine, so that it is ready
    once Dynamo has traced its first graph. What goes wrong, `ensure_loaded` meets and says.

    Flags are asked for in this thread: two at once made Inductor's tests of the machine's vectors come out otherwise.
    """
    with contextlib.suppress(Exception):
        build.start(_op_source())


def _op_source() -> str:
    here = Path(__file__).parent
    parts = ("memory", "hoisted", "dispatch", "executor", "attention", "banks", "unchanged", "layout", "replay")
    return "\n\n".join([CHECKSUM, *((here / f"{name}.cpp").read_text() for name in parts)])


@functools.cache
def ensure_loaded() -> ctypes.CDLL:
    """Build (first time on this machine) and load the op's CPU kernel.

    Raises `build.CompilerMissing`, `build.BuildError` or `cache.CacheError`.
    """
    with _lock:
        library = build.load(_op_source())
        resolver = _Resolver(_resolve)
        _kept.append(resolver)
        library.gaws_set_resolver(resolver)
        library.gaws_retract.argtypes = (ctypes.c_int64,)
        library.gaws_switch.argtypes = (ctypes.c_int64, ctypes.c_int64)
        return library


@functools.cache
def with_gil() -> ctypes.PyDLL:
    """The same library, whose functions are called with the GIL held. Raises what `ensure_loaded` raises."""
    library = ctypes.PyDLL(ensure_loaded()._name)
    library.gaws_watch.restype = ctypes.c_void_p
    return library


def prepare(program: str) -> None:
    """Start building the kernels of `program` in the background, so that they are ready when first called."""
    Program.parse(program).start()


def build_all(programs: Iterable[str]) -> None:
    """Wait until the kernels of all `programs` are built; Triton's are printed and imported, and compile when called.

    Raises what building raises: `build.BuildError`, `build.CompilerMissing`, `cache.CacheError`, `OSError` (a full
    disk, say), `ImportError` (no Triton).
    """
    parsed = [Program.parse(program) for program in dict.fromkeys(programs)]
    for program in parsed:
        program.start()
    for program in parsed:
        program.finish()


def _resolve(text: bytes) -> int | None:
    """Called by the dispatcher for a program that it does not know. Returns an error message's address, or None."""
    name = text.decode()
    try:
        next((known for start, known in REGISTERS.items() if name.startswith(start)), register)(name)
    except BaseException as error:  # Ctrl-C too: what is raised into C++ is no answer that it can read
        message = ctypes.create_string_buffer(f"{type(error).__name__}: {error}".encode())
        _kept.append(message)  # C++ reads it after we return
        return ctypes.addressof(message)
    return None


def register(program: str) -> None:
    """Build the kernels of `program` and hand them to the dispatcher."""
    planned = Program.parse(program)
    if planned.target is not CPP:
        raise SpecError(f"tensors on the CPU meet a program for a GPU: {program}")
    spec = planned.spec
    (source,) = planned.sources().values()
    kernels = build.load(source)
    operands = list(spec.operands())
    weights = {o.projection: i for i, o in enumerate(operands) if o.role == "weight"}
    shapes = [[*[_FLAT] * o.flat, *(_FREE.get(size, size) for size in o.shape)] for o in operands]
    flat = [size for shape in shapes for size in shape]
    bounds = [bound for _, bound in planned.table.rows]
    entries = [list(CPP.kinds).index(plan) for plan in planned.plans]
    gemv, gemm, accumulate, unpack = (
        ctypes.cast(getattr(kernels, name), ctypes.c_void_p) if hasattr(kernels, name) else None
        for name in ("gemv", "gemm", "accumulate", "unpack")
    )
    if "gemm_cpp" in planned.plans and gemm is None:
        raise SpecError(f"gemm_cpp cannot run {spec}")
    derived = planned.derived
    sources = [source for d in derived for source in d.sources]
    summed = [argument for argument, _ in planned.summed]
    units = [unit_rows(spec, operand) for _, operand in planned.summed]
    ensure_loaded().gaws_register(
        program.encode(),
        gemv,
        gemm,
        accumulate,
        unpack,
        ctypes.c_int64(len(entries)),
        (ctypes.c_int64 * len(entries))(*entries),
        (ctypes.c_int64 * len(entries))(*[2**62 if bound is None else bound for bound in bounds]),
        ctypes.c_int64(spec.k),
        ctypes.c_int32(scalar_type(spec.x)),
        ctypes.c_int64(len(operands)),
        (ctypes.c_int32 * len(operands))(*[scalar_type(o.dtype) for o in operands]),
        (ctypes.c_int64 * len(operands))(*map(len, shapes)),
        (ctypes.c_int64 * len(flat))(*flat),
        (ctypes.c_char_p * len(operands))(*[o.name.encode() for o in operands]),
        ctypes.c_int64(len(spec.projections)),
        (ctypes.c_int64 * len(spec.projections))(*[p.n for p in spec.projections]),
        (ctypes.c_int32 * len(spec.projections))(*[scalar_type(p.out) for p in spec.projections]),
        (ctypes.c_int64 * len(spec.projections))(*[weights.get(i, -1) for i in range(len(spec.projections))]),
        (ctypes.c_bool * len(spec.projections))(*[p.transposed for p in spec.projections]),
        (ctypes.c_bool * len(spec.projections))(*[p.packed is not None for p in spec.projections]),
        ctypes.c_bool(spec.swiglu),
        ctypes.c_int64(len(derived)),
        (ctypes.c_int64 * len(derived))(*[d.operand for d in derived]),
        (ctypes.c_char_p * len(derived))(*[d.recipe.encode() for d in derived]),
        (ctypes.c_int64 * len(derived))(*[len(d.sources) for d in derived]),
        (ctypes.c_int64 * len(sources))(*sources),
        ctypes.c_int64(len(summed)),
        (ctypes.c_int64 * len(summed))(*summed),
        (ctypes.c_int64 * len(units))(*units),
    )
