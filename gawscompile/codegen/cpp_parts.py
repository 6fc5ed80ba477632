"""The parts of a projection in the C++ emitter, as `projections.cpp` has them: what each is, and what it reads."""

from __future__ import annotations

from collections.abc import Sequence

from gawscompile.codegen.cpp_modes import Scratch
from gawscompile.codegen.cpp_packed import dot
from gawscompile.ir.operators import LowRank, as_number
from gawscompile.ir.spec import KernelSpec, Operand


class Parts:
    """The parts of a group's projections, as C++. Where parts read an operand of `summed`, its checksum is taken. With
    `lone`, each bank has one plain adapter for all rows, or none."""

    def __init__(self, spec: KernelSpec, ranks: Scratch, summed: Sequence[Operand] = (), lone: bool = False) -> None:
        self._spec, self._ranks, self._summed, self._lone = spec, ranks, summed, lone

    def seen(self, name: str) -> str:
        """The last argument of what reads the operand `name`."""
        return f", Seen{{sum_{name}}}" if any(o.name == name for o in self._summed) else ""

    def hashes(self, i: int) -> list[str]:
        """The checksums of B's and C's blocks."""
        own = [o for o in self._summed if o.projection == i and o.role in ("b", "c")]
        return [f"hash<{o.shape[1]}>(sum_{o.name}, {o.name})" for o in own]

    def expanded(self, i: int, product: str | None = None, weight: bool = True) -> list[str]:
        """Dots and lines of a row: the base (a dot, or the line `product`), the adapters, the epilogue."""
        p = self._spec.projections[i]
        streams = weight and p.dense and not p.transposed
        dots = [f"weight<K>(w{i}, x{self.seen(f'w{i}')})"] if streams else []
        if weight and p.packed and not p.summed_apart:
            dots, streams = [dot(i, p.packed)], True
        if p.banked and self._lone:
            dots.append(f"only_adapter(bank{i})")
        elif p.banked:  # what it scales is W x alone, so it comes before all others
            dots += [f"rescaled(bank{i})"] * bool(streams) + [f"banked(bank{i})"]
            product = product and f"rescaled(bank{i}, {product})"
        dots += [f"factor<{sizes}>({factor}, {source})" for sizes, factor, source in self._terms(i)]
        lines = []
        for ending in self._ranks.endings[i]:
            pointer, stride = ending.source.pointer, ending.source.stride
            if ending.mode:
                sizes = f"{ending.mode.rows}, {ending.mode.columns}, {stride}"
                dots.append(f"slices<{sizes}>({ending.factor}, {pointer})")
            else:
                lines.append(f"plus({pointer}, Int<LDU>{{}})")
        lines += [product] if product else []
        lines += [f"chained(bank{i})"] * bool(p.banked and not self._lone)
        lines += [f"plus(base{i}, Int<N{i}>{{}})"] * (p.opaque is not None)
        return [_all(dots), _all([*lines, *self._scale(i), *self._epilogue(i)])]

    def added(self, i: int, n0: str, panels: bool = False) -> list[str]:
        """Lines before and after, and terms, that join a base's product by 2V columns from `n0` on. With `panels`, the
        adapters of low rank may be in the product."""
        p, lines = self._spec.projections[i], self._epilogue(i)
        bank = bool(p.banked)
        scale = [f"chained(bank{i})"] * bank + self._scale(i)
        terms = [f"Joined(bank{i}, {n0}, N{i}{', folded' * panels})"] * bank  # it scales W x: nothing comes before it
        for j, (sizes, factor, source) in enumerate(self._terms(i)):
            term = f"turned<{sizes}>({factor}, {source}, {n0}, N{i})"
            terms.append(f"unless(folded, {term})" if panels and j < len(p.lowrank) else term)
        return [_all([]), _all([*scale, *lines]), *terms] if scale else [_all(lines), _all([]), *terms]

    def folded(self, i: int, weight: str) -> str:
        """The weight, with what its adapters of low rank add to its panels."""
        p = self._spec.projections[i]
        terms = [f"deltas<K>(bank{i})"] * bool(p.banked)
        terms += [f"delta<{t.rank}, K>(a{i}_{j}, b{i}_{j}, {scale_of(t, i, j)})" for j, t in enumerate(p.lowrank)]
        return f"adapted({weight}, folded, {_all(terms)})" if terms else weight

    def _terms(self, i: int) -> list[tuple[str, str, str]]:
        """B u and C z: rank and stride, the factor, and what it multiplies."""
        p = self._spec.projections[i]
        terms = [(f"{t.rank}, LDU", f"b{i}_{j}", f"u + {self._ranks.offsets[i, j]}") for j, t in enumerate(p.lowrank)]
        return terms + [(f"{g.rank}, {g.rank}", f"c{i}_{j}", f"z{i}_{j}") for j, g in enumerate(p.given)]

    def _scale(self, i: int) -> list[str]:
        return [f"times(rowscale{i})"] if self._spec.projections[i].rowscale else []

    def _epilogue(self, i: int) -> list[str]:
        """What joins scaled rows."""
        p = self._spec.projections[i]
        residual = [f"plus(res{i}, Int<N{i}>{{}})"] if p.residual else []
        return [f"plus(bias{i})"] * bool(p.bias) + residual


def scale_of(term: LowRank, i: int, j: int) -> str:
    """A term's scale, as a C++ expression."""
    return f"float(*scale{i}_{j})" if as_number(term.scale) is None else f"{term.scale!r}f"


def _all(parts: list[str]) -> str:
    return f"all({', '.join(parts)})"
