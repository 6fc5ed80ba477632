"""DoRA (Liu et al. 2024): an adapter's rows are as long as its magnitudes say, ``c ⊙ (W + s B A)`` with
``c = m / ‖W + s B A‖``.

A bank takes c once, from the base weight as it is when an adapter is read, and multiplies B's rows by it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

NUMBERS = 1 << 22
"""Of a base weight that are widened to fp32 at a time."""


class Scaled(NamedTuple):
    """What the rows of a module are multiplied by, and the magnitudes that say so: c and m, [n] in fp32 on the CPU."""

    c: Tensor
    m: Tensor

    def folded(self, b: Tensor) -> Tensor:
        """B's rows multiplied by c, in fp32."""
        return b.float() * self.c.to(b.device)[:, None]

    def unfolded(self, b: Tensor) -> Tensor:
        """The same undone. A row that c makes zero says nothing, and stays so."""
        c = self.c.to(b.device)[:, None]
        return torch.where(c == 0, 0.0, b.float() / c)


@torch.no_grad()
def norms(layer: nn.Module, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``‖W + s B A‖`` of each row, [n] in fp32, W the weight of a linear or of a ``Conv1D``."""
    weight: Any = layer.weight
    w: Tensor = weight if type(layer) is nn.Linear else weight.T
    found, step = torch.empty(len(w)), max(1, NUMBERS // w.shape[1])
    wide = a.to(w.device).float()
    for row in range(0, len(w), step):
        rows = slice(row, row + step)
        found[rows] = torch.addmm(w[rows].float(), b[rows].to(w.device).float(), wide, alpha=scale).norm(dim=1)
    return found
