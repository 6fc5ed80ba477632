"""Linears that tensor parallelism shards: which part of an adapter each rank's pool has, and how a rank adds it.

Each rank has a bank of its own, which reads the same folders. Of a column-parallel linear it keeps A and its rows of
B, of a row-parallel one its columns of A and B. There the bank adds to what one rank makes alone, before the one
all-reduce that the base has anyway.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from gawscompile.banks.checkpoints import Adapter, Factors
from gawscompile.banks.kronecker import Chain
from gawscompile.banks.layer import BankedLinear, Shared
from gawscompile.banks.opening import BankError
from gawscompile.banks.reading import sizes_of


@dataclass(frozen=True)
class Split:
    """A linear of which a rank has the outputs from `start` to `end`, or where `rows`, the inputs; `first` is the rank
    that adds what is added once. `group` is the ranks' process group."""

    rows: bool
    start: int
    end: int
    first: bool
    group: Any

    def sizes(self, whole: tuple[int, int]) -> tuple[int, int]:
        """Outputs and inputs of this rank's part."""
        n, k = whole
        return (n, self.end - self.start) if self.rows else (self.end - self.start, k)

    def of(self, path: str, factors: Factors | Chain) -> Factors:
        """This rank's part of what an adapter adds. Raises `BankError`."""
        if isinstance(factors, Chain) or factors.scaled is not None:
            kind = "a Kronecker product" if isinstance(factors, Chain) else "DoRA"
            raise BankError(f"{path} is sharded over ranks, and the adapter is {kind} there: a bank shards LoRA alone")
        mine = slice(self.start, self.end)
        if self.rows:  # a bias is added once, where all parts are summed up
            return dataclasses.replace(factors, a=factors.a[:, mine], bias=factors.bias if self.first else None)
        bias = None if factors.bias is None else factors.bias[mine]
        return dataclasses.replace(factors, b=factors.b[mine], bias=bias)


def splits(model: nn.Module, bases: Mapping[str, nn.Module]) -> dict[str, Split]:
    """The linears of `bases` that a plan of transformers has sharded, by path. Raises `BankError` for one that is
    sharded in another way."""
    if not torch.distributed.is_available():
        return {}
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    found = {}
    for path, base in bases.items():
        weight = base.weight
        if not isinstance(weight, DTensor) or not any(one.is_shard() for one in weight.placements):
            continue
        plan: Any = getattr(model, "tp_plan", None) or {}
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", path), plan.get(path))
        if style not in ("colwise", "rowwise") or weight.device_mesh.ndim > 1:
            how = f"by the style {style!r}" if style else "by no plan of transformers"
            raise BankError(f"{path} is sharded {how}: a bank is for colwise and rowwise of a tp_plan; leave it out")
        shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
        axis = int(style == "rowwise")
        group, start = weight.device_mesh.get_group(), offset[axis]
        found[path] = Split(axis == 1, start, start + shape[axis], weight.device_mesh.get_local_rank() == 0, group)
    return found


def part_of(adapter: Adapter, split: Mapping[str, Split]) -> Adapter:
    """What a rank keeps of an adapter. Raises `BankError`."""
    if not split:
        return adapter
    parts = {path: split[path].of(path, one) if path in split else one for path, one in adapter.factors.items()}
    return dataclasses.replace(adapter, factors=parts)


class ShardedLinear(BankedLinear):
    """A linear of which this rank has a part, and what the bank adds to it. Column-parallel: x ``[rows, …, k]`` →
    ``[rows, …, n_i]``. Row-parallel: ``[rows, …, k_i]`` → ``[rows, …, n]``, the same on all ranks."""

    def __init__(self, base_layer: nn.Module, bank: Shared, index: int, split: Split) -> None:
        super().__init__(base_layer, bank, index, sizes_of(base_layer))
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        whole: Any = self.weight
        bias = cast(Any, self.bias)
        weight, bias = whole.to_local(), None if bias is None else bias.to_local()
        inner = None if self.split.rows else bias
        y = self.added(x, nn.functional.linear(x, weight, inner), inner)
        if not self.split.rows:
            return y
        y = torch.distributed._functional_collectives.all_reduce(y, "sum", self.split.group)
        return y if bias is None else y + bias
