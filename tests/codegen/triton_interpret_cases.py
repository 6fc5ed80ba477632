"""Runs generated Triton modules in Triton's interpreter and prints one JSON line of measurements per case.

A script, as the interpreter must be chosen before Triton is imported: ``TRITON_INTERPRET=1 python <this file>``.
`test_triton.py` runs it once and judges the lines. Every tensor lies between NaNs and outputs start as NaN, so a
read or a write beyond an end, or an element that was left out, shows.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from gawscompile.codegen import triton as emitter
from gawscompile.codegen.spec import DTYPES, KernelSpec, Operand

GUARD = 128  # elements of NaN on both sides of a tensor


def _lora(rank: int | None, dtype: str = "f32", scale: str = "2.0") -> str:
    return f" lora(r={rank} {dtype} s={scale})" if rank else ""


def _cases() -> dict[str, tuple[str, int]]:
    """Name → (printed spec, number of tokens)."""
    cases = {}
    for m in (1, 2, 5):
        for rank in (None, 1, 3, 16, 17):
            cases[f"rank_{rank}-m{m}"] = (f"k=96 x=f32; n=40 w=f32 out=f32{_lora(rank)}", m)
    qkv = "; ".join(f"n={n} w=bf16 out=bf16{_lora(16, 'bf16')}" for n in (48, 16, 16))
    specs = {
        "qkv": f"k=64 x=bf16; {qkv}",
        "only_q_and_v": f"k=64 x=f32; n=48 w=f32 out=f32{_lora(4)}; n=16 w=f32 out=f32; n=16 w=f32 out=f32{_lora(4)}",
        "unequal_ranks": f"k=64 x=f32; n=9 w=f32 out=f32{_lora(3)}; n=40 w=f32 out=f32{_lora(8)}",
        "five_kinds_of_work": "k=64 x=f32; "
        + "; ".join(
            f"n={n} w=f32 out=f32{_lora(r, scale=f'{r}.0')}" for n, r in ((8, 1), (20, 2), (7, 3), (16, 5), (33, 8))
        ),
        "two_adapters": f"k=64 x=bf16; n=24 w=bf16 out=bf16{_lora(3, 'f32')}{_lora(17, 'bf16', '-0.5')}",
        "bias": f"k=64 x=f32; n=40 w=f32 out=f32 bias=f32{_lora(4)}",
        "residual": f"k=64 x=f32; n=40 w=f32 out=f32 residual=f32{_lora(4)}",
        "bias_and_residual_odd": f"k=33 x=bf16; n=35 w=bf16 out=bf16 bias=f32 residual=bf16{_lora(3, 'f32')}",
        "bias_without_adapter": "k=64 x=f32; n=40 w=f32 out=f32 bias=f32 residual=f32",
        "tensor_scale": f"k=64 x=f32; n=40 w=f32 out=f32{_lora(4, 'f32', 'tensor.f32')}",
        "tensor_scale_f64": f"k=64 x=f32; n=40 w=f32 out=f32{_lora(4, 'f32', 'tensor.f64')}",
        "tensor_scales": "; ".join(["k=64 x=f32"] + [f"n=12 w=f32 out=f32{_lora(4, 'f32', 'tensor.f32')}"] * 2),
        "scale_one": f"k=64 x=f32; n=40 w=f32 out=f32{_lora(4, 'f32', '1.0')}",
        "odd_n_and_k": f"k=101 x=f32; n=37 w=f32 out=f32{_lora(16)}",
        "odd_siblings": "; ".join(["k=37 x=bf16"] + [f"n={n} w=bf16 out=bf16{_lora(17, 'bf16')}" for n in (577, 3)]),
        "ones": f"k=1 x=f32; n=1 w=f32 out=f32{_lora(1)}",
        "bf16_with_f32_adapters": f"k=96 x=bf16; n=40 w=bf16 out=bf16{_lora(16, 'f32')}",
        "bf16_to_f32": f"k=96 x=bf16; n=40 w=bf16 out=f32{_lora(16, 'bf16')}",
        "f16": f"k=96 x=f16; n=40 w=f16 out=f16{_lora(16, 'f16')}",
        "f16_odd": f"k=50 x=f16; n=19 w=f16 out=f16 bias=f16{_lora(3, 'f16', 'tensor.f32')}",
        "f32_over_bf16": f"k=96 x=f32; n=40 w=bf16 out=f32{_lora(16, 'bf16')}",
        "rank_48": f"k=64 x=f32; n=24 w=f32 out=f32{_lora(48)}",
        "rank_150": f"k=64 x=f32; n=24 w=f32 out=f32{_lora(150)}",
        "long_k": f"k=5120 x=f32; n=8 w=f32 out=f32{_lora(2)}",
        "many_rows": f"k=64 x=bf16; n=8192 w=bf16 out=bf16{_lora(8, 'bf16')}; n=64 w=bf16 out=bf16{_lora(8, 'bf16')}",
    }
    cases |= {f"{name}-m{m}": (text, m) for name, text in specs.items() for m in (1, 5)}
    # The second token of the gemv kernels, and a second block of tokens.
    cases |= {f"{name}-m{m}": (specs[name], m) for name in ("qkv", "bias_and_residual_odd") for m in (2, 70)}
    return cases


CASES = _cases()


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

    def scale(self, projection: int, term: int) -> Tensor:
        number = self.spec.projections[projection].lowrank[term].scale
        return self.get("scale", projection, term) if number is None else torch.tensor(number, dtype=torch.float64)


def guarded(tensor: Tensor) -> Tensor:
    """`tensor` in the middle of a buffer that is NaN elsewhere."""
    buffer = torch.full((tensor.numel() + 2 * GUARD,), torch.nan, dtype=tensor.dtype)
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
        return guarded((torch.randn(shape, generator=generator) * scale).to(emitter.OPERAND_DTYPES[dtype]))

    arguments = {}
    for o in spec.operands():
        shape = tuple(m if size == "m" else int(size) for size in o.shape)
        fan_in = shape[1] if o.role in ("weight", "a", "b") else 1
        arguments[o] = normal(shape, o.dtype, fan_in**-0.5)
    return Problem(spec, normal((m, spec.k), spec.x), arguments)


def reference(p: Problem, i: int, without: str = "") -> Tensor:
    """y_i in fp64, from the algebra; `without` names a part to leave out: ``bias``, ``residual``, ``term0`` …"""
    projection = p.spec.projections[i]
    x = p.x.double()
    y = x @ p.get("weight", i).double().T
    if projection.bias and without != "bias":
        y = y + p.get("bias", i).double()
    if projection.residual and without != "residual":
        y = y + p.get("residual", i).double()
    for j in range(len(projection.lowrank)):
        if without != f"term{j}":
            a, b = p.get("a", i, j).double(), p.get("b", i, j).double()
            y = y + p.scale(i, j).double() * ((x @ a.T) @ b.T)
    return y


def segments(p: Problem, i: int) -> Tensor:
    """y_i as frameworks execute it, segment by segment, each result rounded to its dtype."""
    projection = p.spec.projections[i]
    weight = p.get("weight", i)
    common = torch.promote_types(p.x.dtype, weight.dtype)
    y = functional.linear(p.x.to(common), weight.to(common))
    if projection.bias:
        y = y + p.get("bias", i).to(common)
    for j in range(len(projection.lowrank)):
        a, b = p.get("a", i, j), p.get("b", i, j)
        y = y + (functional.linear(functional.linear(p.x.to(a.dtype), a), b) * p.scale(i, j).to(a.dtype)).to(common)
    if projection.residual:
        y = y + p.get("residual", i).to(common)
    return y.to(DTYPES[projection.out])


def distance(y: Tensor, exact: Tensor) -> float:
    """Root mean square of the error, relative to that of the exact values."""
    return float((y.double() - exact).norm() / exact.norm())


def measure(spec: KernelSpec, m: int) -> list[dict[str, object]]:
    """For each projection: errors of the kernel and of segments, and how far off each part's absence would be."""
    p = problem(spec, m)
    outs = [guarded(torch.full((m, q.n), torch.nan, dtype=DTYPES[q.out])) for q in spec.projections]
    returned = emitter.load(spec).launch(p.x, list(p.arguments.values()), outs)
    results = []
    for i, q in enumerate(spec.projections):
        exact = reference(p, i)
        parts = ["bias"] * bool(q.bias) + ["residual"] * bool(q.residual) + [f"term{j}" for j in range(len(q.lowrank))]
        results.append(
            {
                "in_place": returned[i].data_ptr() == outs[i].data_ptr(),
                "guards_hold": guards_hold(outs[i]),
                "finite": bool(outs[i].isfinite().all()),
                "error": distance(outs[i], exact),
                "segments": distance(segments(p, i), exact),
                "without": {part: distance(reference(p, i, part), exact) for part in parts},
            }
        )
    return results


def overflow() -> dict[str, float]:
    """An fp16 adapter whose s A x exceeds fp16's range while the result does not: errors with and without tiles."""
    spec = KernelSpec.parse("k=64 x=f16; n=16 w=f16 out=f16 lora(r=4 f16 s=512.0)")
    errors = {}
    for m in (1, 5):
        p = problem(spec, m)
        p.get("a", 0, 0).mul_(200)
        p.get("b", 0, 0).mul_(1e-3)
        (y,) = emitter.launch(spec, p.x, list(p.arguments.values()))
        errors[f"m{m}"] = distance(y, reference(p, 0))
    return errors


def live() -> bool:
    """Whether a factor that is replaced between two calls shows in the second."""
    spec = KernelSpec.parse(CASES["qkv-m1"][0])
    p = problem(spec, 1)
    emitter.launch(spec, p.x, list(p.arguments.values()))
    p = replace(p, arguments={o: t.neg() if o.role == "b" else t for o, t in p.arguments.items()})
    y = emitter.launch(spec, p.x, list(p.arguments.values()))
    return all(distance(y[i], reference(p, i)) < 0.01 for i in range(3))


def repair_interpreter() -> None:
    """Teach the interpreter bf16, which its makers do not support (triton-lang/triton 11584).

    It keeps bf16 as integers: a dot multiplies the bit patterns, and a cast from fp32 truncates where GPUs round to
    nearest even. Both come right by way of fp32 and of torch's cast.
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


def main() -> None:
    repair_interpreter()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN: the scratch for u is poisoned, too
    for name, (text, m) in CASES.items():
        spec = KernelSpec.parse(text)
        digest = hashlib.sha256(emitter.emit(spec).encode()).hexdigest()
        print(json.dumps({"case": name, "digest": digest, "projections": measure(spec, m)}), flush=True)
    print(json.dumps({"case": "overflow", **overflow()}))
    print(json.dumps({"case": "live", "shows": live()}))


if __name__ == "__main__":
    main()
