"""Runs generated Triton modules in Triton's interpreter and prints one JSON line of measurements per case and plan.

A program, as the interpreter must be chosen before Triton is imported: ``TRITON_INTERPRET=1 python -m
tests.codegen.triton_interpret_cases NAMES``, names of `CASES`, "seeds", "overflow", "live" or "attention".
`test_triton_numbers.py` runs it once and judges the lines. Every tensor lies between NaNs and outputs start as NaN, so
a read or a write beyond an end, or an element that was left out, shows.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from gawscompile.codegen import triton as emitter
from gawscompile.ir import banked
from gawscompile.ir.operators import Kronecker, Mode, as_number
from gawscompile.ir.spec import KernelSpec, Operand
from gawscompile.ir.sums import Sum
from gawscompile.ir.types import DTYPES, OPERAND_DTYPES, SCALE_DTYPES
from tests.codegen.interpreted_specs import CASES

GUARD = 128  # elements of NaN on both sides of a tensor
DECODE_TOKENS = 2


def plans_for(spec: KernelSpec, m: int) -> list[emitter.Plan]:
    """Every decode plan for few tokens and every other one for many, each with the fewest rows per program."""
    fewest = {plan.name: plan for plan in emitter.plans(spec)}
    return [plan for plan in fewest.values() if (plan.rows is not None) == (m <= DECODE_TOKENS)]


@dataclass
class Problem:
    """A spec with its tensors; `arguments` are in the order of `spec.operands()`."""

    spec: KernelSpec
    x: Tensor
    arguments: dict[Operand, Tensor]

    def get(self, role: str, projection: int, term: int | None = None) -> Tensor:
        """An operand by what it is; raises `StopIteration` for one that the spec does not have."""
        key = (role, projection, term)
        return next(t for o, t in self.arguments.items() if (o.role, o.projection, o.term) == key)

    def kronecker(self, projection: int, term: int, exact: bool = False) -> Kronecker:
        """A Kronecker term as the algebra has it; in fp64 if `exact`."""
        spec = self.spec.projections[projection].kronecker[term]
        named = {o.name: t.double() if exact else t for o, t in self.arguments.items()}
        factors = [named[f"g{projection}_{term}_{at}"] for at in range(len(spec.modes))]
        modes = (Mode(mode.before, g, mode.after) for mode, g in zip(spec.modes, factors, strict=True))
        scale = named[f"kron_scale{projection}_{term}"] if as_number(spec.scale) is None else torch.tensor(spec.scale)
        return Kronecker(tuple(modes), scale.to(factors[0].dtype))

    def weight(self, projection: int, dtype: torch.dtype | None = None) -> Tensor:
        """``[n, k]``; what a packed one stands for, in `dtype` or x's."""
        if self.spec.projections[projection].packed:
            term = self.spec.bound(self.arguments.values())[projection].packed
            assert term is not None
            return term.dense(dtype or self.x.dtype)
        w = self.get("weight", projection)
        return w.T if self.spec.projections[projection].transposed else w

    def scale(self, projection: int, term: int) -> Tensor:
        number = as_number(self.spec.projections[projection].lowrank[term].scale)
        return self.get("scale", projection, term) if number is None else torch.tensor(number, dtype=torch.float64)


def guarded(tensor: Tensor) -> Tensor:
    """`tensor` in the middle of a buffer that is NaN elsewhere, or the largest code."""
    beside = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    buffer = torch.full((tensor.numel() + 2 * GUARD,), beside, dtype=tensor.dtype)
    view = buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)


def guards_hold(tensor: Tensor) -> bool:
    """Whether the buffer of a guarded tensor still is NaN outside of it."""
    start = tensor.storage_offset()
    buffer = tensor.as_strided((tensor.numel() + 2 * GUARD,), (1,), start - GUARD)
    return bool(buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all())


def problem(spec: KernelSpec, m: int, seed: int = 0) -> Problem:
    """Random tensors; each part of a sum is about as large as the others."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> Tensor:
        return guarded((torch.randn(shape, generator=generator) * scale).to(SCALE_DTYPES[dtype]))

    arguments = {}
    for o in spec.operands():
        if o.table:
            if o.role == "pool":
                schedule, size = bank(spec, o, m, generator)
            arguments[o] = normal((size,), o.dtype, 0.2) if o.role == "pool" else schedule
            continue
        if o.flat:
            arguments[o] = guarded(part_of_packed(spec, o, generator))
            continue
        shape = tuple(m if size == "m" else int(size) for size in o.shape)
        fan_in = shape[-1] if o.role in ("weight", "a", "b", "c") or (o.role == "mode" and len(shape) > 1) else 1
        if o.role == "weight" and spec.projections[o.projection].transposed:
            fan_in = shape[0]
        arguments[o] = normal(shape, o.dtype, fan_in**-0.5)
    return Problem(spec, normal((m, spec.k), spec.x), arguments)


def part_of_packed(spec: KernelSpec, o: Operand, generator: torch.Generator) -> Tensor:
    """Random codes; scales, and what coded ones are made of, are positive, such that W's numbers are about k^-½."""
    term = spec.projections[o.projection].packed
    assert term is not None
    dtype, (count,) = OPERAND_DTYPES[o.dtype], o.shape
    if not dtype.is_floating_point:
        bounds = torch.iinfo(dtype)
        return torch.randint(bounds.min, bounds.max + 1, (int(count),), generator=generator, dtype=dtype)
    level = {"int8": 74.0, "uint8": 148.0}.get(term.coding, 0.6)
    drawn = torch.rand((int(count),), generator=generator) + 0.5
    sizes = {"outer": 1.0, "zeros": 0.5 * level, "offset": 0.1 * spec.k**-0.5 / level / term.factor}
    return (drawn * sizes.get(o.role, spec.k**-0.5 / level / term.factor)).to(dtype)


def bank(spec: KernelSpec, pool: Operand, m: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """A schedule, and the size of its pool."""
    total = spec.projections[pool.projection]
    assert total.banked is not None and total.banked.width is not None
    rows = max(rows for rows in (1, 2, 3, 5, 14) if m % rows == 0)
    return banked.drawn(rows, total.banked.width, spec.k, total.n, generator, total.banked.longest)


def reference(p: Problem, i: int, without: str = "") -> Tensor:
    """y_i in fp64, from the algebra; `without` names a part to leave out: ``bias``, ``residual``, ``term0`` …"""
    projection = p.spec.projections[i]
    x = p.x.double()
    y = x @ p.weight(i, torch.float64).double().T
    for j in range(len(projection.lowrank)):
        if without != f"term{j}":
            a, b = p.get("a", i, j).double(), p.get("b", i, j).double()
            y = y + p.scale(i, j).double() * ((x @ a.T) @ b.T)
    for j in range(len(projection.given)):
        if without != f"given{j}":
            y = y + p.get("z", i, j).double() @ p.get("c", i, j).double().T
    if projection.banked and without != "bank":
        base = x @ p.weight(i, torch.float64).double().T
        y = y + banked.apply(x, p.get("pool", i).double(), p.get("schedule", i), base)
    for j in range(len(projection.kronecker)):
        if without != f"kron{j}":
            y = y + p.kronecker(i, j, exact=True).apply(x)
    if projection.rowscale and without != "rowscale":
        y = y * p.get("rowscale", i).double()
    if projection.bias and without != "bias":
        y = y + p.get("bias", i).double()
    if projection.residual and without != "residual":
        y = y + p.get("residual", i).double()
    return y


def segments(p: Problem, i: int) -> Tensor:
    """y_i as frameworks execute it, segment by segment, each result rounded to its dtype."""
    projection = p.spec.projections[i]
    weight = p.weight(i)
    common = torch.promote_types(p.x.dtype, weight.dtype)
    y = functional.linear(p.x.to(common), weight.to(common))
    if projection.bias and not projection.rowscale:
        y = y + p.get("bias", i).to(common)
    for j in range(len(projection.lowrank)):
        a, b = p.get("a", i, j), p.get("b", i, j)
        y = y + (functional.linear(functional.linear(p.x.to(a.dtype), a), b) * p.scale(i, j).to(a.dtype)).to(common)
    for j in range(len(projection.given)):
        c, z = p.get("c", i, j), p.get("z", i, j)
        wide = torch.promote_types(c.dtype, z.dtype)
        y = y + functional.linear(z.to(wide), c.to(wide)).to(common)
    if projection.banked:
        base = functional.linear(p.x.to(common), weight.to(common))
        y = y + banked.apply(p.x, p.get("pool", i), p.get("schedule", i), base).to(common)
    for j in range(len(projection.kronecker)):
        y = y + p.kronecker(i, j).apply(p.x).to(common)
    if projection.rowscale:
        y = y * p.get("rowscale", i).to(common)
        y = y + p.get("bias", i).to(common) if projection.bias else y
    if projection.residual:
        y = y + p.get("residual", i).to(common)
    return y.to(DTYPES[projection.out])


def references(p: Problem, without: tuple[int, str] = (0, "")) -> list[Tensor]:
    """Every output in fp64; `without` names a projection and a part of it to leave out."""
    ys = [reference(p, i, without[1] if i == without[0] else "") for i in range(len(p.spec.projections))]
    return [functional.silu(ys[0]) * ys[1]] if p.spec.swiglu else ys


def rounded(p: Problem) -> list[Tensor]:
    """Every output as frameworks execute it."""
    ys = [segments(p, i) for i in range(len(p.spec.projections))]
    return [functional.silu(ys[0]) * ys[1]] if p.spec.swiglu else ys


def distance(y: Tensor, exact: Tensor) -> float:
    """Root mean square of the error, relative to that of the exact values."""
    return float((y.double() - exact).norm() / exact.norm())


def measure(spec: KernelSpec, plan: emitter.Plan, m: int, seed: int = 0) -> list[dict[str, object]]:
    """For each output: errors of the kernel and of segments, and how far off each part's absence would be."""
    p = problem(spec, m, seed)
    outs = [guarded(torch.full((m, n), torch.nan, dtype=DTYPES[dtype])) for n, dtype in spec.outputs]
    module, flags = emitter.load(spec, plan), {}
    if plan.style.keeps_state:
        flags = {"flags": torch.zeros((m, module.FLAGS.value), dtype=torch.int32)}
    counted = [p.get("weight", i) for i in range(len(spec.projections))] if m == 1 and seed == 0 else []
    with counted_reads(counted) as reads:
        returned = module.launch(p.x, list(p.arguments.values()), outs, **flags)
    exact, theirs = references(p), rounded(p)
    results = []
    for i, out in enumerate(outs):
        mine = range(2) if spec.swiglu else [i]
        absent = {f"{part}_{j}": references(p, (j, part))[i] for j in mine for part in parts(spec.projections[j])}
        results.append(
            {
                "in_place": returned[i].data_ptr() == out.data_ptr(),
                "guards_hold": guards_hold(out),
                "flags_cleared": all(not bool(f.any()) for f in flags.values()),
                "weight_reads": sorted({int(count) for j in mine for count in reads[j]}) if counted else None,
                "finite": bool(out.isfinite().all()),
                "error": distance(out, exact[i]),
                "segments": distance(theirs[i], exact[i]),
                "without": {part: distance(answer, exact[i]) for part, answer in absent.items()},
            }
        )
    return results


def parts(q: Sum) -> list[str]:
    """What `reference` can leave out."""
    found = ["bias"] * bool(q.bias) + ["residual"] * bool(q.residual) + [f"term{j}" for j in range(len(q.lowrank))]
    found += [f"given{j}" for j in range(len(q.given))] + ["bank"] * bool(q.banked)
    return found + [f"kron{j}" for j in range(len(q.kronecker))]


@contextlib.contextmanager
def counted_reads(tensors: list[Tensor]) -> Iterator[list[Any]]:
    """How often kernels in the block load each element of `tensors`."""
    from triton.runtime.interpreter import InterpreterBuilder

    counts = [numpy.zeros(tensor.numel(), dtype=numpy.int64) for tensor in tensors]
    load = InterpreterBuilder.create_masked_load

    def counting_load(self, pointers, mask, *rest):
        addresses = pointers.data[mask.data.astype(bool)].astype(numpy.int64)
        for tensor, count in zip(tensors, counts, strict=True):
            offsets = addresses - tensor.data_ptr()
            inside = offsets[(offsets >= 0) & (offsets < tensor.numel() * tensor.itemsize)]
            numpy.add.at(count, inside // tensor.itemsize, 1)
        return load(self, pointers, mask, *rest)

    InterpreterBuilder.create_masked_load = counting_load
    try:
        yield counts
    finally:
        InterpreterBuilder.create_masked_load = load


SEEDS = 12
OVER_SEEDS = (
    *("qkv", "bf16_with_f32_adapters", "f16", "unequal_ranks", "gaws_bf16_diag", "gawsd", "lokr_even"),
    *("swiglu", "given"),
)


def over_seeds() -> list[dict[str, object]]:
    """By every plan, at one token and at five: the error over many draws, over that of the segments."""
    found = []
    for name in OVER_SEEDS:
        for m in (1, 5):
            text = next(text for case, (text, _) in CASES.items() if case.startswith(f"{name}-m"))
            spec = KernelSpec.parse(text)
            for plan in plans_for(spec, m):
                measured = [p for seed in range(SEEDS) for p in measure(spec, plan, m, seed)]
                ours, theirs = (sum(float(p[what]) ** 2 for p in measured) ** 0.5 for what in ("error", "segments"))
                found.append({"case": "seeds", "spec": name, "m": m, "plan": str(plan), "ratio": ours / theirs})
    return found


def overflow() -> dict[str, float]:
    """An fp16 adapter whose s A x exceeds fp16's range while the result does not: errors by every plan."""
    spec = KernelSpec.parse("k=64 x=f16; n=16 w=f16 out=f16 lora(r=4 f16 s=512.0)")
    errors = {}
    for m in (1, 5):
        p = problem(spec, m)
        p.get("a", 0, 0).mul_(200)
        p.get("b", 0, 0).mul_(1e-3)
        for plan in plans_for(spec, m):
            (y,) = emitter.launch(spec, plan, p.x, list(p.arguments.values()))
            errors[str(plan)] = distance(y, reference(p, 0))
    return errors


def live() -> bool:
    """Whether a factor that is replaced between two calls shows in the second."""
    spec = KernelSpec.parse(CASES["qkv-m1"][0])
    plan = emitter.Plan("single_launch", 4)
    p = problem(spec, 1)
    emitter.launch(spec, plan, p.x, list(p.arguments.values()))
    p = replace(p, arguments={o: t.neg() if o.role == "b" else t for o, t in p.arguments.items()})
    y = emitter.launch(spec, plan, p.x, list(p.arguments.values()))
    return all(distance(y[i], reference(p, i)) < 0.01 for i in range(3))


def repair_interpreter() -> None:
    """Teach the interpreter bf16, which its makers do not support (triton-lang/triton 11584).

    It keeps bf16 as integers: a dot multiplies the bit patterns, and a cast from fp32 truncates where GPUs round to
    nearest even. Both come right by way of fp32 and of torch's cast. And a range over numbers, which Triton 3.6 makes
    of arrays that NumPy 2.4 and later take for no numbers.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def rounding_cast(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        bits = torch.from_numpy(src.data.copy()).bfloat16().view(torch.int16).numpy().view("uint16")
        return handle(bits.reshape(src.data.shape), tl.bfloat16)

    def widening_dot(self, a, b, *rest):
        a, b = (cast(self, t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return dot(self, a, b, *rest)

    builder.cast_impl, builder.create_dot = rounding_cast, widening_dot
    patch_tensor = interpreter._patch_lang_tensor

    def patch_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_index

    @functools.cache
    def languages(function):
        return [value for value in function.__globals__.values() if value is tl or value is tl.core]

    def called(self, *args, **kwargs):
        if any(tl.core.is_builtin(language.load) for language in languages(self.fn)):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    # Triton searches its whole language for what to patch in each call of a function. After the first call nothing is
    # left to patch.
    interpreter.InterpretedFunction.__call__ = called


def attention() -> Iterator[dict[str, Any]]:
    """Errors against fp64, over the largest answer: keys in one part and in three, with every kind of mask, every
    other one with a soft cap and sinks."""
    from gawscompile.codegen import triton_attention
    from tests.runtime.test_attention import BOUNDS, drawn, error, masks

    f32, bf16 = ("f32", torch.float32, 5), ("bf16", torch.bfloat16, 64)
    blocks = (1, 70, 1, 2, 40)  # several of queries
    cases = [(f32, (1, 9, 3, 1, 200), 6), (f32, (2, 4, 4, 3, 7), 2), (f32, blocks, 2), (bf16, blocks, 2)]
    for (name, dtype, features), sizes, kinds in cases:
        for parts in (1, 3):
            triton_attention._parts = lambda *_, parts=parts: parts
            q, k, v = drawn(dtype, features, *sizes)
            for number, mask in itertools.islice(enumerate(masks(q, k)), kinds):
                sinks = torch.linspace(-2, 3, sizes[1]).to(dtype) if number % 2 else None
                kernel = f"attend d={features} x={name}{' cap=1.5' if number % 2 else ''}"
                got = triton_attention.launch(q, k, v, mask, 0.3, kernel, sinks)
                line = {"dtype": name, "parts": parts, "sizes": sizes, "mask": number, "bound": BOUNDS[dtype]}
                yield {"case": "attention", "error": error(got, q, k, v, mask, kernel, sinks=sinks), **line}


def main(names: list[str]) -> None:
    repair_interpreter()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN: the scratch for u is poisoned, too
    for name in [name for name in names if name in CASES]:
        text, m = CASES[name]
        spec = KernelSpec.parse(text)
        for plan in plans_for(spec, m):
            digest = hashlib.sha256(emitter.emit(spec, plan).encode()).hexdigest()
            line = {"case": name, "plan": str(plan), "digest": digest, "projections": measure(spec, plan, m)}
            print(json.dumps(line), flush=True)
    for line in over_seeds() if "seeds" in names else ():
        print(json.dumps(line), flush=True)
    if "overflow" in names:
        print(json.dumps({"case": "overflow", **overflow()}))
    if "live" in names:
        print(json.dumps({"case": "live", "shows": live()}))
    for line in attention() if "attention" in names else ():
        print(json.dumps(line))


if __name__ == "__main__":
    main(sys.argv[1:])
