"""Leaves: where an operator has nodes, tensors or types, and what each is to a kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from gawscompile.ir.types import SpecError, type_of

Leaf = Any
"""A node, a tensor or a `TensorType`."""


@dataclass(frozen=True)
class Place:
    """What an operand is to a kernel: its role, the stem of its name in code, what kind of tensor it is, and the stage
    that reads it: the ``base`` product, ``shrink`` (u = A x), each of the ``rows`` of y, or a ``chain`` of modes. The
    sizes of a ``table`` may change from call to call; what is ``flat`` may have any shape of as many numbers."""

    role: str
    stem: str
    kind: Literal["matrix", "vector", "activation", "number", "table", "flat"]
    stage: Literal["base", "shrink", "rows", "chain"]


def places(kind: Any) -> dict[str, Place | None]:
    """The fields of a class of operators; those that are leaves with their place."""
    return _places(kind)


@functools.cache
def _places(kind: Hashable) -> dict[str, Place | None]:
    fields: Any = kind
    if hasattr(fields, "PLACE"):  # an operator of one leaf
        return {"value": fields.PLACE}
    hints = get_type_hints(fields, include_extras=True)
    return {name: getattr(hints[name], "__metadata__", (None,))[0] for name in fields._fields}


def leaves(term: Any, at: int | None = None) -> Iterator[tuple[Place, int | None, Leaf]]:
    """The leaves of an operator in the order of its fields. A mode's have their number in the chain."""
    for name, place in places(type(term)).items():
        value = getattr(term, name)
        if name == "modes":
            for number, mode in enumerate(value):
                yield from leaves(mode, number)
        elif place is not None and _is_leaf(value):
            yield place, at, value


def rebuilt(term: Any, change: Callable[[Place, Leaf], Leaf]) -> Any:
    """The same operator with other leaves, which are asked for in the order of `leaves`."""
    values = []
    for name, place in places(type(term)).items():
        value = getattr(term, name)
        if name == "modes":
            value = tuple(rebuilt(mode, change) for mode in value)
        elif place is not None and _is_leaf(value):
            value = change(place, value)
        values.append(value)
    return type(term)(*values)


def _is_leaf(value: Any) -> bool:
    """Not where a scale is a number, or what an operator may have is missing."""
    return value is not None and not isinstance(value, (int, float))


def misfit(term: Any, k: Any) -> Any:
    """Raises `SpecError`: `term` does not map `k` features."""
    raise SpecError(f"{term.describe()} does not fit {k} features: {[type_of(leaf) for _, _, leaf in leaves(term)]}")
