"""One call of a spec's kernels, judged: by an entry point of its C++, by the op, or by Triton's interpreter."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gawscompile.codegen import build, cpp, triton
from gawscompile.ir.recipe import write
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import DTYPES
from gawscompile.planning.table import Derived, PlanTable, Program
from gawscompile.runtime import ops
from tests.fuzz.kernel_answers import Answer, answers, naive, weight

TOKENS = 70
GUARD = 96
"""Elements of NaN on both sides of every tensor, which begins up to 63 elements further."""
NUMBERS = ("normal", "large", "huge", "subnormal", "not finite", "zeros", "mixed")
TORCH = {**DTYPES, "f64": torch.float64}
ENTRIES = ("gemv", "gemm", "accumulate")
TILES = ("triton: fused_tile", "triton: gemm_accumulate")
"""Plans in which u meets a bf16 factor in bf16."""
VECTORS = {"AVX-512": "", "AVX2": "#undef CPU_CAPABILITY_AVX512\n#define CPU_CAPABILITY_AVX2\n"}
"""What a kernel is built for, and the lines before its source that say so."""


@dataclass(frozen=True)
class Call:
    """One call. The same fields give the same tensors."""

    spec: str
    plan: str
    """An entry point, "gemv", "gemm" or "accumulate"; "op"; "hoisted", the op with row scales that are hoisted; or a
    printed `triton.Plan`, for a process that interprets."""
    m: int
    threads: int = 1
    numbers: str = "normal"
    seed: int = 0
    vectors: str = "AVX-512"

    @property
    def kernel(self) -> KernelSpec:
        return KernelSpec.parse(self.spec)

    @property
    def table(self) -> tuple[str, str]:
        """(a plan table of the op, which plan it picks): panels and the library multiply where they can, and beyond
        some m."""
        bound = 1 + self.seed % 8 if self.kernel.library_takes or cpp.takes_panels(self.kernel) else TOKENS
        more = bound + (self.seed // 8 % 16 if self.kernel.library_takes else TOKENS)
        rows = [("gemv_cpp", bound)] + [("gemm_cpp", more)] * (cpp.takes_panels(self.kernel) and more > bound)
        table = PlanTable((*rows, ("gemm_accumulate", None)))
        return str(table), table.pick(self.m)

    @property
    def by(self) -> str:
        """The plan that runs, for coverage."""
        if self.plan == "op":
            return f"op: {self.table[1]}"
        if self.plan == "hoisted":
            return f"hoisted: {self.table[1]}"
        return self.plan if self.plan in ENTRIES else f"triton: {self.plan.partition('[')[0]}"

    @property
    def strided(self) -> bool:
        return self.plan == "op" and self.seed % 3 == 0

    @property
    def leading(self) -> tuple[int, ...]:
        """What activations have before their features."""
        first = next((n for n in (2, 3, 5) if self.m % n == 0), 1)
        return (first, self.m // first) if self.plan == "op" and self.seed % 2 == 0 else (self.m,)

    def fault(self) -> str | None:
        """What is wrong with what the kernels answer, if anything. Raises what they raise."""
        x, operands = tensors(self)
        run = {**dict.fromkeys(ENTRIES, by_entry), "op": by_op, "hoisted": by_hoisted}.get(self.plan, by_triton)
        got = run(self, x, operands)
        wanted = answers(self.kernel, x, operands, "accumulate" in self.by, self.by in TILES)
        for i, (answer, y) in enumerate(zip(wanted, got, strict=True)):
            if fault := answer.fault(y):
                return f"output {i} by {self.by}: {fault}"
        return _beside_naive(naive(self.kernel, x, operands), wanted, got) if self.numbers == "normal" else None


def _beside_naive(naives: list[Tensor], wanted: list[Answer], got: list[Tensor]) -> str | None:
    """Over many numbers, errors are no larger than those of segments in the same dtypes."""
    for i, (theirs, answer, ours) in enumerate(zip(naives, wanted, got, strict=True)):
        if ours.numel() >= 256:
            error, allowed = ((y.double() - answer.exact).norm() / answer.exact.norm() for y in (ours, theirs))
            if error > 1.5 * allowed + 2 * torch.finfo(torch.float32).eps:
                return f"output {i}: error {error:.3g}, that of segments is {allowed:.3g}"
    return None


# --- Tensors -------------------------------------------------------------------------------------------------


def between_nans(values: Tensor, seed: int) -> Tensor:
    """A copy of `values` inside a larger buffer of NaNs, off any alignment: what is read beyond an end shows."""
    buffer = torch.full((values.numel() + 2 * GUARD + 64,), torch.nan, dtype=values.dtype)
    start = GUARD + seed % 64
    return buffer[start : start + values.numel()].view(values.shape).copy_(values)


def guards_hold(y: Tensor) -> bool:
    """Whether the NaNs around it are what they were."""
    buffer = torch.empty(0, dtype=y.dtype).set_(y.untyped_storage())
    start = y.storage_offset()
    return bool(buffer[:start].isnan().all() and buffer[start + y.numel() :].isnan().all())


def tensors(call: Call) -> tuple[Tensor, dict[str, Tensor]]:
    """x and the operands by their names, activations as ``[m, …]``. Each depends on its own name and shape alone."""

    def make(name: str, shape: tuple[int | str, ...], dtype: str) -> Tensor:
        sizes = [call.m if size == "m" else int(size) for size in shape]
        seed = int(hashlib.sha256(f"{name} {call.seed}".encode()).hexdigest()[:8], 16)
        values = numbers(call.numbers, sizes, dtype, torch.Generator().manual_seed(seed))
        return between_nans(values, seed)

    operands = {o.name: make(o.name, o.shape, o.dtype) for o in call.kernel.operands()}
    return make("x", ("m", call.kernel.k), call.kernel.x), operands


def numbers(kind: str, sizes: list[int], dtype: str, generator: torch.Generator) -> Tensor:
    """Random numbers of a kind of `NUMBERS`; "mixed" tensors are each of one of the others."""
    if kind == "mixed":
        kind = NUMBERS[int(torch.randint(0, len(NUMBERS) - 1, (), generator=generator))]
    values = torch.randn(sizes, generator=generator, dtype=torch.float64)
    some = torch.rand(sizes, generator=generator)
    few = some < 2 / max(1, values.numel()) if values.numel() > 8 else some < 0.1
    largest = torch.finfo(TORCH[dtype]).max
    if kind == "large":
        values = values * 10 ** float(torch.randint(1, 5, (), generator=generator))
    elif kind == "huge":
        values = torch.where(few, values.sign() * (1e30 if dtype != "f16" else 6e4), values)
    elif kind == "subnormal":
        values = values * torch.finfo(TORCH[dtype]).smallest_normal / 4
    elif kind == "not finite":
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.randint(0, 3, sizes, generator=generator)]
        values = torch.where(few, odd.double(), values)
    elif kind == "zeros":
        values = torch.where(some < 0.9, values.sign() * 0.0, values)
    finite = values.clamp(-largest, largest)
    return torch.where(values.isfinite(), finite, values).to(TORCH[dtype])


# --- Kernels -------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def built(spec: str, vectors: str) -> Future[Path]:
    """A spec's library with both entry points, on its way."""
    return build.start(VECTORS[vectors] + cpp.emit(KernelSpec.parse(spec)))


@contextlib.contextmanager
def threads(count: int, library: ctypes.CDLL | None = None) -> Iterator[None]:
    """OpenMP's, of torch and of `library`, within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    if library is not None and library.omp_get_max_threads() != count:
        library.omp_set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def by_entry(call: Call, x: Tensor, operands: dict[str, Tensor]) -> list[Tensor]:
    """By `gemv`, `gemm`, or `accumulate`, which finds base products where outputs go."""
    spec = call.kernel
    library = ctypes.CDLL(str(built(call.spec, call.vectors).result()))
    empty = [torch.full((call.m, n), torch.nan, dtype=DTYPES[out]) for n, out in spec.outputs]
    if call.plan == "accumulate":
        products = [
            (x.double() @ weight(spec, i, operands).double().T).to(DTYPES[p.out])
            if p.dense
            else torch.full((call.m, p.n), torch.nan, dtype=DTYPES[p.out])
            for i, p in enumerate(spec.projections)
        ]
        empty = [*products, *empty] if spec.swiglu else products
    outs = [between_nans(y, call.seed + i) for i, y in enumerate(empty)]
    inputs = [operands[operand.name] for operand in spec.operands()]
    with threads(call.threads, library):
        getattr(library, call.plan)(
            ctypes.c_int64(call.m),
            ctypes.c_void_p(x.data_ptr()),
            (ctypes.c_void_p * len(inputs))(*[t.data_ptr() for t in inputs]),
            (ctypes.c_void_p * len(outs))(*[t.data_ptr() for t in outs]),
        )
    assert all(map(guards_hold, outs)), f"{call.plan} wrote outside of an output"
    return outs[-len(spec.outputs) :]


def by_op(call: Call, x: Tensor, operands: dict[str, Tensor]) -> list[Tensor]:
    arguments = []
    for operand in call.kernel.operands():
        t = operands[operand.name]
        arguments.append(t.view(*call.leading, t.shape[-1]) if operand.activation else t)
    x = x.view(*call.leading, x.shape[-1])
    if call.strided:
        x, arguments = _strided(x), [_strided(t) for t in arguments]
    return _project(call, x, arguments, f"{call.table[0]} | {call.spec}")


def by_hoisted(call: Call, x: Tensor, operands: dict[str, Tensor]) -> list[Tensor]:
    """Every row scale is hoisted: the first column of its weight, `operands` has it then. The weights are written to,
    past autograd's sight, after a first call; the second must know."""
    spec = call.kernel
    given = [o for o in spec.operands() if o.role != "rowscale"]
    derived, real = [], {}
    for at, operand in enumerate(spec.operands()):
        if operand.role == "rowscale":
            i = operand.projection
            source = next(place for place, o in enumerate(given) if o.name == f"w{i}")
            derived.append(Derived(at, (source,), _first_column(spec.projections[i].transposed, operand.dtype)))
            real[f"w{i}"] = operands[f"w{i}"].clone()
            operands[operand.name] = weight(spec, i, operands)[:, 0].to(DTYPES[operand.dtype])
    program = Program(PlanTable.parse(call.table[0]), spec, derived=tuple(derived))
    arguments = [operands[o.name] for o in given]
    for name, numbers_ in real.items():
        operands[name].data.copy_(numbers_.flip(0))
    _project(call, x, arguments, str(program))
    for name, numbers_ in real.items():
        operands[name].data.copy_(numbers_)
    return _project(call, x, arguments, str(program))


@functools.cache
def _first_column(transposed: bool, dtype: str) -> str:
    """A recipe: that of a weight, as a vector of `dtype`."""
    graph = torch.fx.Graph()
    w = graph.placeholder("w")
    column = graph.call_function(torch.ops.aten.select.int, (w, 0 if transposed else 1, 0))
    cast = graph.call_function(torch.ops.prims.convert_element_type.default, (column, DTYPES[dtype]))
    return write([column, cast], [w])


def _project(call: Call, x: Tensor, arguments: list[Tensor], program: str) -> list[Tensor]:
    ops.ensure_loaded()
    with threads(call.threads):
        outputs: list[Tensor] = torch.ops.gaws.project(x, arguments, program)
    for y, (n, _) in zip(outputs, call.kernel.outputs, strict=True):
        assert y.shape == (*x.shape[:-1], n) and y.is_contiguous(), f"an output is {list(y.shape)}, {y.stride()}"
    return [y.view(call.m, y.shape[-1]) for y in outputs]


def _strided(t: Tensor) -> Tensor:
    """The same numbers, each row beside others that are NaN."""
    wide = torch.full((*t.shape, 2), torch.nan, dtype=t.dtype)
    wide[..., 0] = t
    return wide[..., 0]


def by_triton(call: Call, x: Tensor, operands: dict[str, Tensor]) -> list[Tensor]:
    """In Triton's interpreter. For a process in which it was chosen before Triton was imported."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "the interpreter is chosen by TRITON_INTERPRET=1"
    spec, plan = call.kernel, triton.Plan.parse(call.plan)
    outs = [between_nans(torch.full((call.m, n), torch.nan, dtype=DTYPES[out]), call.seed) for n, out in spec.outputs]
    flags = torch.zeros(call.m * triton.flags_per_token(spec, plan), dtype=torch.int32)
    kept = {"flags": flags.view(call.m, -1)} if plan.style.keeps_state else {}
    triton.load(spec, plan).launch(x, [operands[o.name] for o in spec.operands()], outs, **kept)
    assert all(map(guards_hold, outs)), f"{plan} wrote outside of an output"
    assert not flags.any(), "counters are not cleared"
    return outs
