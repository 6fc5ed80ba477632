"""Operators on one activation, and their sums.

Each operator is a NamedTuple, so it may stand in the arguments of an fx node with nodes as its leaves: the graph
between passes *is* the algebra, prints as such, and runs (``operator_sum`` and its kin are plain functions whose
meaning is the segment-by-segment computation that frameworks execute).

Shapes: x ``[..., K]``; a base weight ``[N, K]`` or its transpose; LoRA's A ``[r, K]`` and B ``[N, r]``; a bias ``[N]``;
Kronecker factors as `Mode` says.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

# In a graph the leaves are fx nodes; when it runs they are tensors.
Leaf = Any


class Dense(NamedTuple):
    """``W x``, W ``[N, K]``, or kept as ``[K, N]`` where it is `transposed` (GPT-2's Conv1D)."""

    weight: Leaf
    transposed: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """``(N, K)``."""
        sizes = _shape(self.weight)
        return sizes[::-1] if self.transposed else sizes

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight.T if self.transposed else self.weight)


class LowRank(NamedTuple):
    """``s * B (A x)`` (LoRA: Hu et al. 2021, eq. 3). `scale` is a number or a 0-d tensor."""

    b: Leaf
    a: Leaf
    scale: Any = 1.0

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x.to(self.a.dtype), self.a), self.b) * self.scale


class Kept(NamedTuple):
    """``y``, ``[..., N]``: what a base that stays as it is, since its weight is quantised, has made of x already."""

    product: Leaf

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return self.product


class Given(NamedTuple):
    """``B z``: z ``[..., r]`` is an activation that is there already, few features wide, B ``[N, r]`` (zFLoRA's widened
    stream: Gowda et al. 2025)."""

    b: Leaf
    z: Leaf

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.z.to(self.b.dtype), self.b)


class Bias(NamedTuple):
    """``+ v``, v ``[N]``."""

    vector: Leaf

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return self.vector


class RowScale(NamedTuple):
    """``c ⊙`` all else in the sum but biases: c ``[N]`` (DoRA: Liu et al. 2024, eq. 5; (IA)³: Liu et al. 2022)."""

    vector: Leaf


class Mode(NamedTuple):
    """``(I_before ⊗ G ⊗ I_after) x``: a mode product, G applied along the middle of x's features as three axes
    (Van Loan 2000, "The ubiquitous Kronecker product"). G ``[rows, columns]``, or a vector ``[columns]``, its diagonal.
    """

    before: int
    matrix: Leaf
    after: int

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        g = self.matrix
        axes = x.unflatten(-1, (self.before, g.shape[-1], self.after))
        product = axes * g[:, None] if g.dim() == 1 else torch.einsum("oi,...bia->...boa", g, axes)
        return product.flatten(-3)


class Kronecker(NamedTuple):
    """``s * M_p … M_1 x``, the first mode product first.

    ``I_n ⊗ G`` (GAWS) and ``G ⊗ I_d`` (GAWS-D: Alsuradi et al. 2026) are one mode product, with a diagonal before it
    where there is `diag`; ``w1 ⊗ w2`` (LoKr: Yeh et al. 2023) is ``(I ⊗ w2)(w1 ⊗ I)``, more where those have factors.
    """

    modes: tuple[Mode, ...]
    scale: Any = 1.0

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.modes[0].matrix.dtype)
        for mode in self.modes:
            x = mode.apply(x)
        return x * self.scale


Summand = Dense | Kept | LowRank | Given | Bias | Kronecker
Operator = Summand | RowScale
OPERATORS: tuple[type, ...] = (Dense, Kept, LowRank, Given, Bias, Kronecker, RowScale)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The canonical spelling of a linear: x ``[..., K]``, weight ``[N, K]``, bias ``[N]`` → ``[..., N]``."""
    return F.linear(x, weight, bias)


def operator_sum(x: torch.Tensor, terms: tuple[Operator, ...], out: torch.dtype) -> torch.Tensor:
    """The sum of `terms` on x ``[..., K]``, cast to `out`: ``[..., N]``."""
    scales, biases, (first, *rest) = split_sum(terms)
    total = first.apply(x)
    for term in rest:
        total = total + term.apply(x)
    for scale in scales:
        total = total * scale.vector
    for bias in biases:
        total = total + bias.apply(x)
    return total.to(out)


def split_sum(
    terms: tuple[Operator, ...],
) -> tuple[list[RowScale], list[Bias], list[Dense | Kept | LowRank | Given | Kronecker]]:
    """What scales the rows of a sum, what is added after that, and the sum itself."""
    scales = [term for term in terms if isinstance(term, RowScale)]
    biases = [term for term in terms if isinstance(term, Bias)]
    return scales, biases, [term for term in terms if not isinstance(term, (RowScale, Bias))]


def operator_group(
    x: torch.Tensor, sums: tuple[tuple[Operator, ...], ...], outs: tuple[torch.dtype, ...]
) -> list[torch.Tensor]:
    """Several sums on one activation."""
    return [operator_sum(x, terms, out) for terms, out in zip(sums, outs, strict=True)]


def describe(terms: tuple[Operator, ...]) -> str:
    """A sum in words: ``Dense[576x576] + 2·LowRank(r=16)``. Leaves need a shape (tensors, or nodes with a value)."""
    scales, _, scaled = split_sum(terms)
    if not scales:
        return " + ".join(_describe(term) for term in terms if not isinstance(term, RowScale))
    sizes = "".join(f"diag[{_shape(scale.vector)[0]}]·" for scale in scales)
    biases = "".join(f" + {_describe(term)}" for term in terms if isinstance(term, Bias))
    return f"{sizes}({' + '.join(map(_describe, scaled))}){biases}"


def _describe(term: Summand) -> str:
    if isinstance(term, Dense):
        return "Dense[{}x{}]".format(*term.sizes)
    if isinstance(term, LowRank):
        scale = f"{term.scale:g}" if isinstance(term.scale, (int, float)) else "s"
        return f"{scale}·LowRank(r={_shape(term.a)[0]})"
    if isinstance(term, Kronecker):
        scale = f"{term.scale:g}" if isinstance(term.scale, (int, float)) else "s"
        return f"{scale}·Kronecker({' '.join(map(_describe_mode, reversed(term.modes)))})"
    if isinstance(term, Kept):
        return f"Kept[{_shape(term.product)[-1]}]"
    if isinstance(term, Given):
        return f"Given(r={_shape(term.b)[1]})"
    return f"Bias[{_shape(term.vector)[0]}]"


def _describe_mode(mode: Mode) -> str:
    """``I10⊗[256x256]``; an identity of one is left out."""
    sizes = _shape(mode.matrix)
    middle = f"[{'x'.join(map(str, sizes))}]" if len(sizes) == 2 else f"diag[{sizes[0]}]"
    parts = [f"I{mode.before}"] * (mode.before > 1) + [middle] + [f"I{mode.after}"] * (mode.after > 1)
    return "⊗".join(parts)


def _shape(leaf: Leaf) -> tuple[int, ...]:
    return tuple(leaf.meta["val"].shape if isinstance(leaf, torch.fx.Node) else leaf.shape)
