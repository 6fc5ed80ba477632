"""Sums of operators on one activation, groups of sums, and what a graph calls for them.

A `Sum` is a projection: a base, its adapters and what is added in the same kernel. Its leaves are those of its
operators: nodes in a graph, tensors when that runs, types in a `KernelSpec`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from gawscompile.ir.operators import (
    ORDER,
    REPEATED,
    Banked,
    Bias,
    Dense,
    Given,
    Kronecker,
    LowRank,
    Mode,
    Opaque,
    Operator,
    Residual,
    RowScale,
)
from gawscompile.ir.packed import Packed
from gawscompile.ir.parsing import PARSERS, known
from gawscompile.ir.places import Leaf, leaves
from gawscompile.ir.types import DTYPES, SpecError, shape_of

_FIELD = re.compile(r"(?:(\w+)=(\w+)|(lora|given|kron|bank|packed)\(([^)]*)\))(?: |$)")


class Sum(NamedTuple):
    """``y = c ⊙ (base + Σ adapters) + bias``, cast to `out`, plus a residual. Its terms are in the order of `ORDER`."""

    terms: tuple[Operator, ...]
    out: str

    @staticmethod
    def of(terms: Iterable[Operator], out: str) -> Sum:
        """Of `terms` in any order."""
        return Sum(tuple(sorted(terms, key=lambda term: ORDER.index(type(term)))), out)

    def plus(self, term: Operator) -> Sum:
        return Sum.of((*self.terms, term), self.out)

    def _only(self, kind: type) -> Any:
        return next((term for term in self.terms if isinstance(term, kind)), None)

    @property
    def leaves(self) -> list[Leaf]:
        """What it reads beside its activation, in the order in which a kernel takes it."""
        return [leaf for term in self.terms for _, _, leaf in leaves(term)]

    @property
    def dense(self) -> Dense | None:
        found: Dense | None = self._only(Dense)
        return found

    @property
    def packed(self) -> Packed | None:
        found: Packed | None = self._only(Packed)
        return found

    @property
    def weight(self) -> Leaf:
        """Of a dense base. Raises `SpecError` where the base is another."""
        if self.dense is None:
            raise SpecError(f"only a dense base has a weight: {self.text()}")
        return self.dense.weight

    @property
    def transposed(self) -> bool:
        return self.dense is not None and self.dense.transposed

    @property
    def summed_apart(self) -> bool:
        """Whether a C++ kernel makes sums of W's rows in memory before adapters join them: W is transposed, or packed
        by several rows."""
        return self.transposed or (self.packed is not None and self.packed.summed_apart)

    def _value(self, kind: type) -> Leaf | None:
        term = self._only(kind)
        return term.value if term else None

    @property
    def opaque(self) -> Leaf | None:
        """What an opaque base has made of x."""
        return self._value(Opaque)

    @property
    def bias(self) -> Leaf | None:
        return self._value(Bias)

    @property
    def residual(self) -> Leaf | None:
        return self._value(Residual)

    @property
    def rowscale(self) -> Leaf | None:
        return self._value(RowScale)

    @property
    def lowrank(self) -> tuple[LowRank, ...]:
        return tuple(term for term in self.terms if isinstance(term, LowRank))

    @property
    def given(self) -> tuple[Given, ...]:
        return tuple(term for term in self.terms if isinstance(term, Given))

    @property
    def kronecker(self) -> tuple[Kronecker, ...]:
        return tuple(term for term in self.terms if isinstance(term, Kronecker))

    @property
    def banked(self) -> Banked | None:
        found: Banked | None = self._only(Banked)
        return found

    @property
    def adapted(self) -> bool:
        """Whether anything is added that is no bias or residual."""
        return any(isinstance(term, (*REPEATED, RowScale, Banked)) for term in self.terms)

    @property
    def plain(self) -> bool:
        """Whether it is ``W x`` and no more."""
        return len(self.terms) == 1

    @property
    def rank(self) -> int:
        """Sum of the ranks of all low-rank terms."""
        return sum(term.rank for term in self.lowrank)

    @property
    def n(self) -> int:
        """Output features."""
        base = self.dense or self.packed
        return int(base.sizes[0] if base else shape_of(self.opaque)[-1])

    def check(self, k: Any) -> None:
        """Raises `SpecError` where the terms are no sum on `k` features, naming one that is at fault."""
        counts = Counter(map(type, self.terms))
        if twice := [kind.__name__ for kind, count in counts.items() if count > 1 and kind not in REPEATED]:
            raise SpecError(f"a sum has one {twice[0]} at most: {self.describe()}")
        if counts[Dense] + counts[Packed] + counts[Opaque] != 1:
            raise SpecError(f"a sum has one base: {self.describe()}")
        if counts[Opaque] and (counts[RowScale] or not self.adapted):
            raise SpecError(f"to an opaque base adapters are added, and no row scale: {self.describe()}")
        if counts[Banked] and counts[Opaque]:
            raise SpecError(f"a bank stands beside a base that the kernel multiplies: {self.describe()}")
        if list(self.terms) != sorted(self.terms, key=lambda term: ORDER.index(type(term))):
            raise SpecError(f"the terms of a sum are not in order: {self.describe()}")
        for term in self.terms:
            if (made := term.features(k)) != self.n:
                raise SpecError(f"{term.describe()} makes {made} features, not {self.n}")

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """The sum on x ``[..., k]``: ``[..., n]``. In fp64, where proofs run it, it is not rounded."""
        bias, scale, base = self.bias, self.rowscale, self.terms[0]
        assert isinstance(base, (Dense, Packed, Opaque))
        dtype = self.weight.dtype if self.dense else x.dtype if self.packed else None
        together = bias is not None and scale is None and dtype in (None, bias.dtype)
        total = base.apply(x, bias if together else None)
        if bias is not None and scale is None and not together:
            total = total + bias
        product = total
        for term in self.terms:
            if isinstance(term, Banked):
                total = total + term.apply(x, product, bias if scale is None else None)
            elif isinstance(term, (LowRank, Given, Kronecker)):
                total = total + term.apply(x)
        if scale is not None:
            total = total * scale
            total = total if bias is None else total + bias
        total = total if x.dtype == torch.float64 else total.to(DTYPES[self.out])
        return total if self.residual is None else total + self.residual

    def describe(self) -> str:
        """``Dense[576x576] + 2·LowRank(r=16)``."""
        late = (Bias, Residual) if self.rowscale is not None else ()
        scaled = [term.describe() for term in self.terms if not isinstance(term, (RowScale, *late))]
        added = [term.describe() for term in self.terms if isinstance(term, late)]
        if self.rowscale is None:
            return " + ".join(scaled)
        return " + ".join([f"diag[{self.n}]·({' + '.join(scaled)})", *added])

    def formula(self, i: int) -> str:
        """``y0[576] = W0 x + 2 B0_0[576x16] (A0_0 x)``, `i` being the sum's number in its group."""
        named = [term.formula(name) for term, name in self.numbered(i)]
        late = (Bias, Residual) if self.rowscale is not None else ()
        scaled = [text for term, text in zip(self.terms, named, strict=True) if not isinstance(term, (RowScale, *late))]
        added = [text for term, text in zip(self.terms, named, strict=True) if isinstance(term, late)]
        if self.rowscale is not None:
            scaled = [f"rowscale{i} * ({' + '.join(scaled)})"]
        return f"y{i}[{self.n}] = {' + '.join([*scaled, *added])}"

    def numbered(self, i: int) -> Iterator[tuple[Operator, str]]:
        """Every term with the end of its leaves' names: ``0``, or ``0_1`` for the second of its kind."""
        counts: Counter[type] = Counter()
        for term in self.terms:
            yield term, f"{i}_{counts[type(term)]}" if isinstance(term, REPEATED) else str(i)
            counts[type(term)] += 1

    def text(self) -> str:
        """``n=576 w=bf16 out=bf16 lora(r=16 f32 s=2.0)``."""
        base, *rest = (term.text() for term in self.terms)
        return " ".join([f"n={self.n}", base, f"out={self.out}", *rest])

    @staticmethod
    def parse(text: str, k: int) -> Sum:
        """The sum over types that prints as `text`. Raises `SpecError`, naming the part that is not understood."""
        fields: dict[str, str] = {}
        terms: list[Operator] = []
        numbers: list[tuple[str, str]] = []
        position = 0
        while position < len(text):
            if not (match := _FIELD.match(text, position)):
                raise SpecError(f"not a projection spec: {text!r} at {text[position:]!r}")
            position = match.end()
            name, value = (match[1], match[2]) if match[1] else (match[3], match[4])
            if name in ("n", "out") and name not in fields:
                fields[name] = value
            else:
                numbers.append((name, value))
        if fields.keys() != {"n", "out"} or not fields["n"].isdecimal():
            raise SpecError(f"not a projection spec: {text!r}")
        for name, value in numbers:
            if name not in PARSERS:
                raise SpecError(f"not a projection spec: {text!r} at {name!r}")
            terms.append(PARSERS[name](value, int(fields["n"]), k))
        return Sum.of(terms, known(fields["out"]))


def operands_of(sums: Iterable[Sum]) -> list[Leaf]:
    """The leaves of `sums` in the order in which a kernel takes them."""
    return [leaf for total in sums for leaf in total.leaves]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The canonical spelling of a linear: x ``[..., k]``, weight ``[n, k]``, bias ``[n]`` → ``[..., n]``. A weight
    ``[blocks, n/blocks, k/blocks]`` is the block-diagonal matrix of these, and comes without a bias."""
    if weight.dim() == 3:
        assert bias is None, "a block-diagonal weight comes without a bias"
        return Mode(1, weight, 1).apply(x)
    return F.linear(x, weight, bias)


def operator_sum(x: torch.Tensor, total: Sum) -> torch.Tensor:
    """One sum on x ``[..., k]``: ``[..., n]``."""
    return total.apply(x)


def operator_group(x: torch.Tensor, sums: tuple[Sum, ...]) -> list[torch.Tensor]:
    """Several sums on one activation."""
    return [total.apply(x) for total in sums]


def project(x: torch.Tensor, sums: tuple[Sum, ...], swiglu: bool, program: object) -> list[torch.Tensor]:
    """A group that is to run in generated kernels, by `program` once that is chosen. With `swiglu` there are two sums
    and one output, ``silu(y_0) * y_1`` (SwiGLU: Shazeer 2020)."""
    outputs = operator_group(x, sums)
    return [F.silu(outputs[0]) * outputs[1]] if swiglu else outputs


OURS = (linear, operator_sum, operator_group, project)
"""What the passes put into a graph, and what only they understand."""
