"""Vectors in sums: biases, and what scales rows; and the merging of summands that are alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch.fx import Node

from gawscompile.analysis.identity import reinterpreted, through_casts
from gawscompile.analysis.matrices import Product, Scale
from gawscompile.analysis.reading import args, aten, dtype, is_call, shape, value
from gawscompile.ir.sizes import same_size, same_sizes
from gawscompile.ir.types import DTYPE_NAMES


class Vector(NamedTuple):
    """``scale * v``, the same for every token; times other vectors, `rows`, where its sum's rows were scaled."""

    node: Node
    scale: Scale = Scale()
    rows: tuple[Node, ...] = ()

    def scaled(self, by: Any) -> Vector:
        return self._replace(scale=self.scale.times(by))


def readable(v: Node) -> Node:
    """The tensor that v is a cast of, where kernels read its dtype, and else v itself."""
    source: Node = through_casts(v)
    return source if dtype(source) in DTYPE_NAMES else v


def shifted(v: Any) -> tuple[Any, float]:
    """(u, s) where v is u + s."""
    if is_call(v, aten.add.Tensor, aten.sub.Tensor) and not v.kwargs and isinstance(args(v)[1], (int, float)):
        return args(v)[0], float(args(v)[1]) * (1 if is_call(v, aten.add.Tensor) else -1)
    return v, 0.0


def vector_of(v: Any, size: Any) -> Node | None:
    """The vector of `size` numbers that v is beside an activation of so many features: it has one for each feature, and
    the same for every token. A vector along the tokens, ``[m, 1]``, is none, even where m is `size`.
    """
    if value(v) is None or not same_sizes(shape(v)[-1:], (size,)):
        return None
    if not all(same_size(n, 1) for n in shape(v)[:-1]):
        return None
    while value(v) is not None and len(shape(v)) > 1:
        v = reinterpreted(v)
    return v if value(v) is not None and same_sizes(shape(v), (size,)) else None


def merged(products: Iterable[Product]) -> tuple[Product, ...]:
    """Products of the same matrices as one: DoRA takes its base away and adds it again."""
    found: dict[Any, Product] = {}
    for p in products:
        key = (p.matrices, p.given, p.scale.nodes)
        before = found.get(key)
        number = p.scale.number + (before.scale.number if before else 0.0)
        found[key] = (before or p)._replace(scale=p.scale._replace(number=number))
    return tuple(p for p in found.values() if p.scale.number)


def merged_vectors(vectors: Iterable[Vector]) -> tuple[Vector, ...]:
    found: dict[Any, Vector] = {}
    for v in vectors:
        key = (v.node, v.rows, v.scale.nodes)
        number = v.scale.number + (found[key].scale.number if key in found else 0.0)
        found[key] = v._replace(scale=v.scale._replace(number=number))
    return tuple(v for v in found.values() if v.scale.number)
