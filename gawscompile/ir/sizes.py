"""Sizes, numbers or symbolic: what is known of them without a guard."""

from __future__ import annotations

import functools
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv


def settled(size: Any) -> Any:
    """A size as a number, where it has but one value."""
    number = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else None
    return size if number is None else number


def plain_sizes(sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Sizes for a record: symbolic ones as text."""
    return tuple(size if isinstance(size, int) else str(size) for size in sizes)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal; never adds a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return _same_expression(_expression(a), _expression(b))


def same_sizes(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def same_strides(sizes: tuple[Any, ...], a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether they say the same of a tensor of `sizes`; never adds a guard."""
    return all(same_size(n, 1) or same_size(x, y) for n, x, y in zip(sizes, a, b, strict=True))


def _expression(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


@functools.lru_cache(maxsize=4096)
def _same_expression(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether the two are equal for all values of their symbols, which are whole numbers for which both are defined."""
    return bool(a == b or sympy.expand(_divided(a) - _divided(b)) == 0)


def _divided(expression: sympy.Expr) -> sympy.Expr:
    """The same with every division that leaves nothing over carried out: ``s**2 // s`` is s."""

    def quotient(over: sympy.Expr, under: sympy.Expr) -> sympy.Expr:
        try:
            exact = sympy.cancel(over / under)
        except sympy.PolynomialError:
            return FloorDiv(over, under)
        return exact if exact.is_integer else FloorDiv(over, under)

    return expression.replace(FloorDiv, quotient)
