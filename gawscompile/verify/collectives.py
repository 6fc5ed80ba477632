"""What collectives are in a proof, which runs in one process and must not talk to others: these may prove something
else at that time, or nothing.

An all-reduce adds up what ranks make of their own shards, and a reduce-scatter gives each of them a part of the tokens.
In a proof it is a fixed linear map along the tokens, to all or to that part: it lets exactly that through which is
linear in the features and the same for every token, as sums over ranks do. A bias that would be added once for each
rank, or an activation that moved through the sum, shows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from gawscompile.analysis.collectives import ADDING, all_reduces, reduce_scatters, waits
from gawscompile.analysis.reading import is_call


def simulated(node: Node, inputs: Any) -> torch.Tensor:
    """A collective's result for `inputs`, in their dtype. Raises `NotImplementedError` for one that no rewrite goes
    through; the rewrite is undone then, and a note says why."""
    x: torch.Tensor = inputs[0]
    if is_call(node, waits()):
        return x
    if not is_call(node, all_reduces(), reduce_scatters()) or inputs[1] not in ADDING or not x.dim():
        raise NotImplementedError(f"a proof knows no {node.target} of {inputs[1:]}")
    tokens = x.numel() // max(1, x.shape[-1])
    generator = torch.Generator().manual_seed(tokens)
    mixed = 2 * torch.eye(tokens, dtype=x.dtype) + torch.randn(tokens, tokens, generator=generator, dtype=x.dtype) / 4
    parts = inputs[2] if is_call(node, reduce_scatters()) else 1
    part = mixed[: tokens // parts] @ x.reshape(tokens, -1)
    return part.reshape(x.shape[0] // parts, *x.shape[1:])
