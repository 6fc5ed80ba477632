"""What is known of a tensor before it is there: its shape and dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gawscompile.ir.sizes import settled

DTYPES: dict[str, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
SCALE_DTYPES = {**DTYPES, "f64": torch.float64}
"""A scale may be of fp64 too, which is what Dynamo makes of a Python float that changes."""

OPERAND_DTYPES = {**SCALE_DTYPES, "i32": torch.int32, "i8": torch.int8, "u8": torch.uint8}
"""Of everything that a kernel reads. A bank's schedule is of integers, a quantised weight of bytes."""

_NAMES = {dtype: name for name, dtype in OPERAND_DTYPES.items()}

ANY = "any"
"""A size that a kernel does not fix."""


class SpecError(ValueError):
    """Operators that do not fit together, or a text that describes none; the message names the part at fault."""


@dataclass(frozen=True)
class TensorType:
    """A shape, in which "m" stands for the number of tokens and `ANY` for any size, and the name of a dtype."""

    shape: tuple[Any, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Of the whole tensor. Its sizes are numbers."""
        size = OPERAND_DTYPES[self.dtype].itemsize
        for n in self.shape:
            size *= int(n)
        return size


def type_of(leaf: Any) -> TensorType:
    """Of a node with a value, a tensor, or a type."""
    if isinstance(leaf, TensorType):
        return leaf
    value = leaf.meta["val"] if isinstance(leaf, torch.fx.Node) else leaf
    sizes = tuple(size if type(size) is int else settled(size) for size in value.shape)
    return TensorType(sizes, _NAMES.get(value.dtype) or str(value.dtype).removeprefix("torch."))


def shape_of(leaf: Any) -> tuple[Any, ...]:
    return type_of(leaf).shape


def dtype_of(leaf: Any) -> str:
    """Its name."""
    return type_of(leaf).dtype
