"""Random operands for a spec, between NaNs, and the fp64 answer with the error that rounding allows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gawscompile.ir import banked
from gawscompile.ir.packed import Packed, plain_scales, spread
from gawscompile.ir.places import rebuilt
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import OPERAND_DTYPES

GUARD = 96
TORCH = OPERAND_DTYPES


def guarded(values: Tensor) -> Tensor:
    """A contiguous copy of `values` inside a larger buffer of NaNs (bytes: of 127s): a read beyond an end shows in the
    answer."""
    around = float("nan") if values.is_floating_point() else 127
    buffer = torch.full((values.numel() + 2 * GUARD,), around, dtype=values.dtype)
    inside = buffer[GUARD : GUARD + values.numel()].view(values.shape)
    return inside.copy_(values)


@dataclass
class Problem:
    """Operands of a spec for `m` tokens; `want` and `allowed` (fp64) are each projection's answer and error."""

    spec: KernelSpec
    x: Tensor
    operands: dict[str, Tensor]
    want: list[Tensor]
    allowed: list[Tensor]

    @staticmethod
    def of(text: str, m: int, seed: int = 0, leading: tuple[int, ...] | None = None) -> Problem:
        spec = KernelSpec.parse(text)
        generator = torch.Generator().manual_seed(seed)

        def make(shape: tuple[int, ...], dtype: str) -> Tensor:
            if dtype in ("i8", "u8"):
                return guarded(torch.randint(0, 256, shape, generator=generator).to(torch.uint8).view(TORCH[dtype]))
            if dtype == "i32":  # features, some of them twice, some from the end
                return guarded(torch.randint(-spec.k, spec.k, shape, generator=generator, dtype=torch.int32))
            return guarded(torch.randn(shape, generator=generator, dtype=torch.float64).to(TORCH[dtype]))

        leading = (m,) if leading is None else leading
        x = make((*leading, spec.k), spec.x)
        operands = {}
        for i, p in enumerate(spec.projections):
            if p.banked:
                rows = max(r for r in (1, 2, 3, 5) if m % r == 0)
                schedule, room = banked.drawn(rows, 1 + (m + i) % 4, spec.k, p.n, generator)
                operands |= {f"pool{i}": make((room,), p.banked.dtype), f"schedule{i}": schedule}
        for operand in spec.operands():
            if operand.table:
                continue
            sizes = [leading if size == "m" else (int(size),) for size in operand.shape]
            operands[operand.name] = make(tuple(s for size in sizes for s in size), operand.dtype)
        return Problem.with_operands(spec, x, operands)

    @staticmethod
    def with_operands(spec: KernelSpec, x: Tensor, operands: dict[str, Tensor]) -> Problem:
        """The answer for tensors that there are."""
        answers = [_answer(spec, i, x.double(), operands) for i in range(len(spec.projections))]
        if spec.swiglu:
            answers = [_gated(*answers, spec)]
        return Problem(spec, x, operands, [want for want, _ in answers], [allowed for _, allowed in answers])

    def check(self, outputs: list[Tensor]) -> None:
        assert len(outputs) == len(self.want)
        for i, (got, want, allowed) in enumerate(zip(outputs, self.want, self.allowed, strict=True)):
            excess = ((got.double() - want).abs() / allowed).max().item() if want.numel() else 0.0
            assert excess <= 1, f"projection {i} of {self.spec}: error is {excess:.3g} times what rounding allows"


def _whole(g: Tensor) -> Tensor:
    """A mode's factor as a matrix."""
    return (torch.diag, lambda matrix: matrix, lambda blocks: torch.block_diag(*blocks))[g.dim() - 1](g)


def weight(spec: KernelSpec, i: int, operands: dict[str, Tensor]) -> Tensor:
    """A projection's base weight as ``[n, k]``, in fp64; zeros where it has none."""
    if spec.projections[i].packed is not None:
        return packed(spec, i, operands).dense(torch.float64)
    if spec.projections[i].dense is None:
        return torch.zeros(spec.projections[i].n, spec.k, dtype=torch.float64)
    w = operands[f"w{i}"].double()
    return w.T if spec.projections[i].transposed else w


def packed(spec: KernelSpec, i: int, operands: dict[str, Tensor]) -> Packed:
    """A projection's packed base, of tensors."""
    found: Packed = rebuilt(spec.projections[i].packed, lambda place, _: operands[f"{place.stem}{i}"])
    return found


def in_bf16(term: Packed) -> bool:
    """Whether what codes stand for is rounded to bf16 for such an x: for the CPU's dot products, in groups of whole 64
    columns, and in blocks."""
    whole = term.group % 64 == 0 or term.kept.layout == "blocks"
    return torch.cpu._is_avx512_bf16_supported() and whole and term.kept.layout != "tiles"


def in_wholes(term: Packed, tokens: int) -> bool:
    """Whether AVX2 makes whole numbers of an x of bf16, and multiplies them by codes, or by levels."""
    if torch.backends.cpu.get_cpu_capability() != "AVX2" or term.group % 64 != 0:
        return False
    layouts = {"bytes": True, "pairs": True, "halves": term.summed_apart, "tiles": term.kept.rows == 32 and tokens == 1}
    return layouts.get(term.kept.layout, False)


def _magnitude(spec: KernelSpec, i: int, operands: dict[str, Tensor], tokens: int) -> Tensor:
    """What the rounding of W x is measured by: |W|, or |scale| (|level| + |zero|), and a coded scale's two parts. Dot
    products in bf16 round levels of 4 bits to bf16, and sum codes of 8 bits up as two numbers of 256 at most each.
    Whole numbers are off by 2^-14 of the largest level, and by 2^-16 of the largest of 64 numbers of x, here four times
    the others; codes of tiles have no sign there. Other sums of 16 bits are of codes without sign, and of whole
    bytes."""
    if spec.projections[i].packed is None:
        return weight(spec, i, operands).abs()
    term = packed(spec, i, operands)
    size = term.kept.numbers(term.codes, term.table, term.n, term.k, torch.float64).abs()
    if spec.x == "bf16" and in_bf16(term):
        size = size + 512 if term.kept.layout == "bytes" else size * (1 + 2**14 / 6)
    elif spec.x == "bf16" and in_wholes(term, tokens):
        without_sign = 8 if term.kept.layout == "tiles" else 0
        size = (size + without_sign) * (1 + 2**9 / 6) + (size.max() * 2**9 / 6 if term.kept.layout == "pairs" else 0)
    elif spec.x != "f32" and term.kept.layout in ("halves", "tiles"):
        size = size + 32  # bytes, a sixteenth of them, and what comes off
    if term.zeros is not None:
        size = size + spread(term.zeros.double().abs(), term.n, term.k)
    if term.scales is not None:
        parts = [part if part is None else part.abs() for part in (term.levels, term.outer, term.offset)]
        scales = plain_scales(term.scales, *parts, torch.float64).abs() * abs(term.factor)
        each = scales.reshape(-1, 1 + term.kept.shifted)
        size = size * spread(each[:, 0], term.n, term.k, term.kept.by_groups)
        if term.kept.shifted:
            size = size + spread(each[:, 1], term.n, term.k, True)
    if term.order is not None:
        size = torch.zeros_like(size).index_add(1, term.order % term.k, size)
    return size


def _banked(x: Tensor, pool: Tensor, schedule: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a bank adds to each row, and the magnitudes that go into it, and what it multiplies ``W x`` by."""
    tokens, rows, n = x.flatten(0, -2), len(schedule) - 1, len(w)
    total, size = torch.zeros(len(tokens), n).double(), torch.zeros(len(tokens), n).double()
    scales = torch.ones(len(tokens), n).double()
    for t, token in enumerate(tokens):
        z, bound = token, token.abs()
        for entry in schedule[1 + t * rows // len(tokens)]:
            a0, b0, ra, rb, _, after, *_ = (int(field) for field in entry)
            scale, weight = (float(field) for field in entry[4:6].view(torch.float32))
            if ra < 0:  # a mode, which the next follows where `after` is negated
                g = pool[32 * a0 : 32 * a0 - ra * rb].view(-ra, rb)
                z, bound = (_mode(b0, one, abs(after), part) for one, part in ((g, z), (g.abs(), bound)))
                if after > 0:
                    total[t], size[t] = total[t] + scale * z, size[t] + abs(scale) * bound
                    z, bound = token, token.abs()
                continue
            a = pool[32 * a0 : 32 * a0 + ra * len(token)].view(ra, len(token))
            b = pool[32 * b0 : 32 * b0 + n * rb].view(n, rb)
            bias, row = b[:, ra : ra + 1].sum(1), b[:, ra + 1 :].sum(1)
            total[t] += scale * b[:, :ra] @ (a @ token) + weight * bias + weight * row * (w @ token)
            size[t] += abs(scale) * b[:, :ra].abs() @ (a.abs() @ token.abs()) + abs(weight) * bias.abs()
            size[t] += abs(weight) * row.abs() * (w.abs() @ token.abs())
            scales[t] += weight * row
    return total.view(*x.shape[:-1], n), size.view(*x.shape[:-1], n), scales.view(*x.shape[:-1], n)


def _mode(before: int, g: Tensor, after: int, x: Tensor) -> Tensor:
    """``(I ⊗ G ⊗ I) x``, written out."""
    return torch.kron(torch.kron(torch.eye(before).double(), g.contiguous()), torch.eye(after).double()) @ x


def _gated(gate: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor], spec: KernelSpec) -> tuple[Tensor, Tensor]:
    """silu(gate) * up, whose slopes carry the errors of both on; silu's is at most 1.1."""
    want = torch.nn.functional.silu(gate[0]) * up[0]
    half_ulp = torch.finfo(TORCH[spec.projections[0].out]).eps / 2
    carried = 1.1 * gate[1] * (up[0].abs() + up[1]) + gate[0].abs() * up[1]
    return want, carried + 2 * half_ulp * want.abs() + 1e-6 * want.abs()


def _answer(spec: KernelSpec, i: int, x: Tensor, operands: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """c * (W x + sum s B (A x) + sum C z) + bias + residual, and a bound on the error of fp32 sums of rounded products.

    A sum of K products in fp32 errs by a small multiple of eps times the sum of their magnitudes. Plans that round the
    base product to the output's dtype first (the library's matmul does) err by half an ulp of that too.
    """
    p = spec.projections[i]
    w = weight(spec, i, operands)
    base, size = x @ w.T, x.abs() @ _magnitude(spec, i, operands, x.numel() // spec.k).T
    total = base.clone()
    for j, term in enumerate(p.lowrank):
        a, b = operands[f"a{i}_{j}"].double(), operands[f"b{i}_{j}"].double()
        scale = float(operands.get(f"scale{i}_{j}", term.scale))
        total = total + scale * (x @ a.T) @ b.T
        size = size + abs(scale) * (x.abs() @ a.abs().T) @ b.abs().T
    if p.banked:
        added, much, scales = _banked(x, operands[f"pool{i}"].double(), operands[f"schedule{i}"], w)
        total, size, base = total + added, size + much, base * scales
    for j in range(len(p.given)):
        c, z = operands[f"c{i}_{j}"].double(), operands[f"z{i}_{j}"].double()
        total, size = total + z @ c.T, size + z.abs() @ c.abs().T
    for j, kron in enumerate(p.kronecker):
        scale = float(operands.get(f"kron_scale{i}_{j}", kron.scale))
        factors = [operands[f"g{i}_{j}_{at}"].double() for at in range(len(kron.modes))]
        dense = torch.eye(spec.k, dtype=torch.float64)
        for mode, g in zip(kron.modes, factors, strict=True):
            middle = _whole(g)
            dense = torch.kron(torch.kron(torch.eye(mode.before), middle), torch.eye(mode.after)).double() @ dense
        total = total + scale * x @ dense.T
        bound = torch.eye(spec.k, dtype=torch.float64)
        for mode, g in zip(kron.modes, factors, strict=True):
            middle = _whole(g).abs()
            bound = torch.kron(torch.kron(torch.eye(mode.before), middle), torch.eye(mode.after)).double() @ bound
        size = size + abs(scale) * x.abs() @ bound.T
    if p.rowscale:
        rows = operands[f"rowscale{i}"].double()
        base, total, size = base * rows, total * rows, size * rows.abs()
    for name in (f"base{i}", f"bias{i}", f"res{i}"):
        if name in operands:
            total, size = total + operands[name].double(), size + operands[name].double().abs()
    half_ulp = torch.finfo(TORCH[p.out]).eps / 2 if p.out != "f32" else 0.0
    allowed = 1.02 * half_ulp * (total.abs() + base.abs()) + 6 * torch.finfo(torch.float32).eps * size
    return total, allowed
