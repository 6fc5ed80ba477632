"""sink_scales: nothing of a layer's width is written that only an adapter's scale needs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gawscompile.analysis.matrices import scaling_of
from gawscompile.ir.sums import linear
from gawscompile.passes.context import backward
from tests.graphs import capture, capture_joint, count

aten = torch.ops.aten


def adapted(scale=2.0, bias=False, rank=4):
    w = torch.nn.Parameter(torch.randn(48, 32) / 5, requires_grad=False)
    a, b = torch.nn.Parameter(torch.randn(rank, 32) / 5), torch.nn.Parameter(torch.randn(48, rank) / 2)
    c = torch.nn.Parameter(torch.randn(48)) if bias else None
    return lambda x: F.linear(x, w) + scale * F.linear(F.linear(x, a), b, c)


def scaled(context):
    """Gradients of the layer's width that are scaled."""
    nodes = context.graph.nodes
    return [n for n in nodes if backward(n) and scaling_of(n) is not None and n.meta["val"].shape[-1] in (32, 48)]


@pytest.mark.parametrize("leading", [(5,), (2, 3)])
def test_scales_stand_beside_narrow_products(leading):
    captured = capture_joint(adapted(), torch.randn(*leading, 32, requires_grad=True))
    assert scaled(captured.until("merge_blocks"))
    context = captured.until("sink_scales")
    assert not scaled(context) and context.record.passes["sink_scales"] == 1
    muls = [n for n in context.graph.nodes if n.target is aten.mul.Tensor and n.args[1] == 2.0]
    assert [n.meta["val"].shape[-1] for n in muls] == [4, 48, 4]  # u, the forward's own, v
    assert muls[0].args[0].target is linear and not backward(muls[0])
    torch.testing.assert_close(captured.run(context), captured.outputs)
    context = captured.until("recover_operators")
    assert count(context, aten.mul.Tensor) == 2  # both products and both sums read what is scaled there
    torch.testing.assert_close(captured.run(context), captured.outputs)


def test_a_scaled_gradient_that_others_read_stays():
    captured = capture_joint(adapted(bias=True), torch.randn(5, 32, requires_grad=True))
    context = captured.until("sink_scales")
    assert scaled(context) and "sink_scales" not in context.record.passes
    torch.testing.assert_close(captured.run(context), captured.outputs)


def test_a_scale_that_is_a_tensor_stays():
    scale = torch.nn.Parameter(torch.tensor(1.5))
    captured = capture_joint(lambda x: adapted(scale)(x), torch.randn(5, 32, requires_grad=True))
    context = captured.until("sink_scales")
    assert "sink_scales" not in context.record.passes
    torch.testing.assert_close(captured.run(context), captured.outputs)


def test_a_wide_adapter_stays():
    captured = capture_joint(adapted(rank=30), torch.randn(5, 32, requires_grad=True))
    assert "sink_scales" not in captured.until("sink_scales").record.passes


def test_without_gradients_there_is_nothing_to_do():
    assert "sink_scales" not in capture(adapted(), torch.randn(5, 32)).until("sink_scales").record.passes
