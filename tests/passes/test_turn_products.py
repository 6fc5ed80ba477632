"""turn_products: the gradient of a tall, narrow factor reads the layer's gradient by rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gawscompile.analysis.reading import transposed
from gawscompile.passes import turn_products
from gawscompile.passes.context import backward
from tests.graphs import capture, capture_joint

aten = torch.ops.aten


def adapted(rank=4, n=48):
    w = torch.nn.Parameter(torch.randn(n, 32) / 5, requires_grad=False)
    a, b = torch.nn.Parameter(torch.randn(rank, 32) / 5), torch.nn.Parameter(torch.randn(n, rank) / 2)
    return lambda x: F.linear(x, w) + 2.0 * F.linear(F.linear(x, a), b)


def tall(context, rank=4, n=48):
    """Products that are B's gradient, as B has it."""
    mms = [node for node in context.graph.nodes if node.target is aten.mm.default and backward(node)]
    return [node for node in mms if tuple(node.meta["val"].shape) == (n, rank)]


@pytest.mark.parametrize("leading", [(5,), (2, 3)])
def test_the_gradient_of_b_is_turned(leading):
    captured = capture_joint(adapted(), torch.randn(*leading, 32, requires_grad=True))
    assert len(tall(captured.until("gather_summands"))) == 1
    context = captured.until("turn_products")
    assert not tall(context) and context.record.passes["turn_products"] == 1
    (flat,) = tall(context, 48, 4)
    assert transposed(flat.args[0]) is not None and transposed(flat.args[1]) is None
    got = captured.run(context)
    torch.testing.assert_close(got, captured.outputs)
    assert all(one.stride() == other.stride() for one, other in zip(got, captured.outputs, strict=True))


@pytest.mark.parametrize(("rank", "n"), [(16, 48), (65, 400)])
def test_a_product_that_is_not_narrow_stays(rank, n):
    captured = capture_joint(adapted(rank, n), torch.randn(5, 32, requires_grad=True))
    context = captured.until("turn_products")
    assert len(tall(context, rank, n)) == 1 and "turn_products" not in context.record.passes


def test_without_gradients_there_is_nothing_to_do():
    assert "turn_products" not in capture(adapted(), torch.randn(5, 32)).until("turn_products").record.passes


def test_products_on_other_devices_stay():
    captured = capture_joint(adapted(), torch.randn(5, 32, requires_grad=True))
    context = captured.until("gather_summands")
    (product,) = tall(context)
    product.meta["val"] = product.meta["val"].to("meta")
    turn_products.run(context.graph, context)
    assert tall(context) == [product]
