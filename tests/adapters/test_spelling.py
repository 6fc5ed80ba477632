"""The graphs that the forwards become: what `passes` may rely on to find a GAWS or GAWS-D."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.adapters.common import KINDS, single
from tests.graphs import capture

SPELLINGS = {
    "gaws": "view mul permute view mm view view",
    "gawsd": "view mul permute clone permute view mm view permute clone view",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [lambda: nn.Linear(64, 96), lambda: Conv1D(96, 64)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("diag", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_one_spelling_for_each_kind(kind, make, diag, frozen):
    model = single(kind, make(), diag=diag).requires_grad_(not frozen)
    nodes = [node for node in capture(model, torch.randn(1, 3, 64)).graph.nodes if node.op == "call_function"]
    names = [node.target.overloadpacket.__name__ for node in nodes]
    assert names.count("addmm") == names.count("mm") == names.count("add") == 1
    start = names.index("addmm") + 2  # after the base's own product and its view
    wanted = [name for name in SPELLINGS[kind].split() if diag or name != "mul"]
    assert names[start:-1] == wanted
