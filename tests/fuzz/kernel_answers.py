"""What a kernel may answer: the fp64 answer of its own inputs, and how far sums in fp32 may be from it.

Beside every value goes a bound of the magnitudes that were added up to it (fp32 sums err by eps times that), what
subnormal numbers may cost (``vdpbf16ps`` takes them for zeros), and the largest number on the way (beyond fp32's range
nothing is promised).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gawscompile.ir.operators import Mode, as_number
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import DTYPES

EPS = torch.finfo(torch.float32).eps
SUBNORMAL = torch.finfo(torch.float32).smallest_normal
RANGE = 1e38  # of fp32, with room for a factor of three


@dataclass
class Value:
    """fp64 tensors of one shape ``[m, n]``: the exact value, the sum of magnitudes behind it, what subnormals cost, the
    largest magnitude on the way to it, and the number of summands."""

    exact: Tensor
    size: Tensor
    lost: Tensor
    peak: Tensor
    depth: int = 1

    @staticmethod
    def of(x: Tensor) -> Value:
        x = x.double()
        return Value(x, x.abs(), torch.zeros_like(x), x.abs())

    def times(self, matrix: Tensor) -> Value:
        """``x M'`` for M ``[n, k]``."""
        m, ones = matrix.double().abs(), torch.ones_like(self.exact)
        size = self.size @ m.T
        lost = self.lost @ m.T + SUBNORMAL * (ones @ m.T + self.size.sum(-1, keepdim=True) + m.shape[1])
        peak = torch.maximum(size, _most(self.peak)).expand_as(size)
        return Value(self.exact @ matrix.double().T, size, lost, peak, self.depth + m.shape[1])

    def mode(self, mode: Mode, g: Tensor) -> Value:
        """``(I ⊗ G ⊗ I) x``."""
        if mode.rows is None:
            return self.scaled(g.double().repeat_interleave(mode.after).repeat(mode.before))
        if g.dim() == 3:  # each by itself: zeros between the blocks would spread what is not finite
            parts = [(t.chunk(len(g), -1)) for t in (self.exact, self.size, self.lost, self.peak)]
            found = [Value(*part, depth=self.depth).times(block) for *part, block in zip(*parts, g, strict=True)]
            fields = ([getattr(one, name) for one in found] for name in ("exact", "size", "lost", "peak"))
            return Value(*(torch.cat(field, -1) for field in fields), depth=found[0].depth)
        parts = (turned(t, mode) for t in (self.exact, self.size, self.lost, self.peak))
        found = Value(*parts, depth=self.depth).times(g)
        back = (straightened(t, mode, len(self.exact)) for t in (found.exact, found.size, found.lost, found.peak))
        return Value(*back, depth=found.depth)

    def scaled(self, by: Tensor | float) -> Value:
        """Each column, or all, times a number."""
        by = torch.as_tensor(by, dtype=torch.float64)
        size, most = self.size * by.abs(), torch.maximum(self.peak, self.peak * by.abs())
        return Value(self.exact * by, size, self.lost * by.abs() + SUBNORMAL, most, self.depth + 1)

    def plus(self, other: Value | None) -> Value:
        if other is None:
            return self
        size = self.size + other.size
        peak = torch.maximum(torch.maximum(self.peak, other.peak), size)
        return Value(self.exact + other.exact, size, self.lost + other.lost, peak, self.depth + other.depth)

    def error(self) -> Tensor:
        """Of fp32 sums in some order."""
        return (8 + self.depth**0.5 / 2) * EPS * self.size + self.lost


def turned(x: Tensor, mode: Mode) -> Tensor:
    """``[m, k]`` as the rows that a mode's matrix meets: ``[m * before * after, columns]``."""
    sizes = (len(x), mode.before, mode.columns, mode.after)
    return x.reshape(sizes).movedim(2, 3).reshape(len(x) * mode.before * mode.after, mode.columns)


def straightened(y: Tensor, mode: Mode, m: int) -> Tensor:
    """What became of them as ``[m, n]``."""
    sizes = (m, mode.before, mode.after, y.shape[-1])
    return y.reshape(sizes).movedim(3, 2).reshape(m, mode.outputs)


def _most(x: Tensor) -> Tensor:
    """Each token's largest number, ``[m, 1]``; 0 where there is none."""
    return x.amax(-1, keepdim=True) if x.shape[-1] else torch.zeros(*x.shape[:-1], 1, dtype=x.dtype)


@dataclass
class Answer:
    """What one output may be: each number between `low` and `high`, which are of its dtype, where `judged`."""

    exact: Tensor
    low: Tensor
    high: Tensor
    judged: Tensor
    overflows: Tensor | None = None
    """Where a product that feeds another may overflow. That has any sign: there what is not finite need only be not
    finite."""

    def fault(self, got: Tensor) -> str | None:
        """What is wrong with an output ``[m, n]``, if anything: the first number that is."""
        between = (self.low <= got) & (got <= self.high)
        unlike = torch.where(self.exact.isnan(), ~got.isnan(), got.isfinite() | (got == -self.exact))
        if self.overflows is not None:
            unlike = torch.where(self.overflows, got.isfinite(), unlike)
        wrong = torch.where(self.exact.isfinite(), self.judged & ~between, unlike)
        if not wrong.any():
            return None
        t, n = (int(i) for i in wrong.nonzero()[0])
        range_ = f"{self.low[t, n].item():.9g} … {self.high[t, n].item():.9g}"
        return f"{int(wrong.sum())} of {wrong.numel()}; [{t}, {n}] is {got[t, n].item():.9g}, not {range_}"


def weight(spec: KernelSpec, i: int, operands: dict[str, Tensor]) -> Tensor:
    """A base weight as ``[n, k]``."""
    return operands[f"w{i}"].T if spec.projections[i].transposed else operands[f"w{i}"]


def projection(spec: KernelSpec, i: int, x: Tensor, operands: dict[str, Tensor]) -> tuple[Value, Value | None]:
    """(y_i, its base's product), for x ``[m, k]``."""
    p, given = spec.projections[i], Value.of(x)
    base = given.times(weight(spec, i, operands)) if p.dense else None
    added: list[Value] = []
    for j, term in enumerate(p.lowrank):
        u = given.times(operands[f"a{i}_{j}"]).scaled(_scale(term.scale, f"scale{i}_{j}", operands))
        added.append(u.times(operands[f"b{i}_{j}"]))
    added += [Value.of(operands[f"z{i}_{j}"]).times(operands[f"c{i}_{j}"]) for j in range(len(p.given))]
    for j, term in enumerate(p.kronecker):
        part = given
        for at, mode in enumerate(term.modes):
            part = part.mode(mode, operands[f"g{i}_{j}_{at}"])
            part = part if at else part.scaled(_scale(term.scale, f"kron_scale{i}_{j}", operands))
        added.append(part)
    total = added.pop(0) if base is None else base
    for part in added:
        total = total.plus(part)
    if p.rowscale:
        total = total.scaled(operands[f"rowscale{i}"])
    for name in (f"base{i}", f"bias{i}", f"res{i}"):
        if name in operands:
            total = total.plus(Value.of(operands[name].expand_as(total.exact)))
    return total, base.scaled(operands[f"rowscale{i}"]) if base and p.rowscale else base


def _scale(scale: object, name: str, operands: dict[str, Tensor]) -> Tensor | float:
    """In fp32, as kernels take it."""
    number = as_number(scale)
    return (operands[name] if number is None else torch.tensor(number)).float().double()


def answers(
    spec: KernelSpec, x: Tensor, operands: dict[str, Tensor], library: bool = False, tiles: bool = False
) -> list[Answer]:
    """What every output may be. `library`: its base's product was rounded to its dtype on the way. `tiles`: a factor in
    bf16 may have met its u in bf16."""
    values, errors, judged = [], [], []
    for i, p in enumerate(spec.projections):
        total, base = projection(spec, i, x, operands)
        info = torch.finfo(DTYPES[p.out])
        error, safe = total.error(), total.peak < RANGE
        if library and base is not None:
            rows = operands[f"rowscale{i}"].double().abs() if p.rowscale else 1.0  # it magnifies what a subnormal lost
            error = error + info.eps / 2 * base.exact.abs() + info.tiny * info.eps * rows
            safe = safe & (base.peak < info.max / 3)
        if library and spec.swiglu:  # gate and up are stored before their product is taken
            error = error + info.eps / 2 * total.exact.abs() + info.tiny * info.eps
            safe = safe & (total.peak < info.max / 3)
        if tiles and any(term.dtype == "bf16" for term in (*p.lowrank, *p.kronecker)):
            error = error + torch.finfo(torch.bfloat16).eps * total.size
        values.append(total.exact)
        errors.append(error)
        judged.append(safe)
    if spec.swiglu:
        exact, error = _gated(values, errors)
        values, errors, judged = [exact], [error], [judged[0] & judged[1] & (exact.abs() + error < RANGE)]
    overflows = [_overflows(spec, i, x, operands) for i in range(len(spec.projections))]
    overflows = [overflows[0] | overflows[1]] if spec.swiglu else overflows
    outs = [DTYPES[p.out] for p in spec.projections[: len(values)]]
    return [
        Answer(exact, (exact - error).to(out), (exact + error).to(out), safe & error.isfinite(), over)
        for exact, error, safe, over, out in zip(values, errors, judged, overflows, outs, strict=True)
    ]


def _overflows(spec: KernelSpec, i: int, x: Tensor, operands: dict[str, Tensor]) -> Tensor:
    """Where the finite numbers behind an output of adapters are beyond fp32's range on the way; and where a u whose
    sign is within its error meets a factor that is not finite."""
    finite = {name: torch.nan_to_num(t, 0.0, 0.0, 0.0) for name, t in operands.items()}
    total, _ = projection(spec, i, torch.nan_to_num(x, 0.0, 0.0, 0.0), finite)
    p = spec.projections[i]
    found = (total.peak >= RANGE) & bool(p.lowrank or p.kronecker)
    for j in range(len(p.lowrank)):
        u = Value.of(torch.nan_to_num(x, 0.0, 0.0, 0.0)).times(finite[f"a{i}_{j}"])
        unsure = (u.exact.abs() <= u.error()).double()
        found = found | (unsure @ (~operands[f"b{i}_{j}"].isfinite()).double().T > 0)
    for j, term in enumerate(p.kronecker):
        later = [operands[f"g{i}_{j}_{at}"] for at in range(1, len(term.modes))]
        found = found | any(not bool(g.isfinite().all()) for g in later)
    return found


def _gated(values: list[Tensor], errors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """silu(gate) * up. silu's slope is at most 1.1; below -87 its exp overflows in fp32, and it is 0."""
    gate, up = values
    exact = gate / (1 + (-gate).exp()) * up
    silu = functional.silu(gate).abs()
    error = 1.1 * errors[0] * (up.abs() + errors[1]) + silu * errors[1] + 1e-6 * exact.abs()
    return exact, error + 100 * SUBNORMAL * (up.abs() + 1)


def naive(spec: KernelSpec, x: Tensor, operands: dict[str, Tensor]) -> list[Tensor]:
    """Every output as frameworks execute it, segment by segment, each result rounded to its dtype."""
    found = []
    for i, p in enumerate(spec.projections):
        parts: list[Tensor] = [_linear(x, weight(spec, i, operands))] if p.dense else [operands[f"base{i}"]]
        for j, term in enumerate(p.lowrank):
            u = _linear(x, operands[f"a{i}_{j}"])
            part = _linear(u, operands[f"b{i}_{j}"])
            parts.append(part * _scale(term.scale, f"scale{i}_{j}", operands).to(part.dtype))
        parts += [_linear(operands[f"z{i}_{j}"], operands[f"c{i}_{j}"]) for j in range(len(p.given))]
        for j, term in enumerate(p.kronecker):
            part = x
            for at, mode in enumerate(term.modes):
                g = operands[f"g{i}_{j}_{at}"]
                if mode.rows is None:
                    part = part * g.repeat_interleave(mode.after).repeat(mode.before)
                elif g.dim() == 3:
                    part = torch.cat([_linear(*one) for one in zip(part.chunk(len(g), -1), g, strict=True)], -1)
                else:
                    part = straightened(_linear(turned(part, mode), g), mode, len(x))
            parts.append(part * _scale(term.scale, f"kron_scale{i}_{j}", operands).to(part.dtype))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        total = total * operands[f"rowscale{i}"] if p.rowscale else total
        for name in (f"bias{i}", f"res{i}"):
            total = total + operands[name] if name in operands else total
        found.append(total.to(DTYPES[p.out]))
    return [functional.silu(found[0]) * found[1]] if spec.swiglu else found


def _linear(x: Tensor, w: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, w.dtype)
    return functional.linear(x.to(wide), w.to(wide))
