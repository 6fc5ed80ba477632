"""fuse_epilogues: a residual added to a projection rides in it."""

import torch
import torch.nn.functional as F

from gawscompile.operators.project import project
from gawscompile.passes.context import aten
from tests.graphs import capture, count, small_bert, small_llama, tokens
from tests.passes.test_fuse_zflora import specs


def residuals(context):
    return sum(p.residual is not None for spec in specs(context) for p in spec.projections)


def test_two_residuals_a_layer():
    for model, inputs in ((small_llama(layers=2), {"use_cache": False}), (small_bert(layers=2), {})):
        captured = capture(model, tokens(1, 4), **inputs)
        before, after = captured.until("fuse_zflora"), captured.until("fuse_epilogues")
        assert residuals(after) == 4
        assert count(before, aten.add.Tensor) - count(after, aten.add.Tensor) == 4
        torch.testing.assert_close(captured.run(after), captured.outputs)


def refused(function, *inputs):
    captured = capture(function, *inputs)
    context = captured.until("fuse_epilogues")
    assert residuals(context) == 0
    torch.testing.assert_close(captured.run(context), captured.outputs)


def test_output_that_is_read_elsewhere_keeps_its_add():
    def twice(x, w, r):
        y = F.linear(x, w)
        return y + r, y.sin()

    refused(twice, torch.randn(3, 8), torch.randn(6, 8), torch.randn(3, 6))


def test_broadcast_residual_keeps_its_add():
    refused(lambda x, w, r: F.linear(x, w) + r, torch.randn(3, 8), torch.randn(6, 8), torch.randn(3, 1))


def test_wider_residual_keeps_its_add():
    x, w = torch.randn(3, 8).bfloat16(), torch.randn(6, 8).bfloat16()
    refused(lambda x, w, r: F.linear(x, w) + r, x, w, torch.randn(3, 6))


def test_residual_that_comes_later_keeps_its_add():
    refused(lambda x, w: F.linear(x, w) + F.linear(x, w.sin()).sin(), torch.randn(3, 8), torch.randn(6, 8))


def test_doubling_is_no_residual():
    refused(lambda x, w: (y := F.linear(x, w)) + y, torch.randn(3, 8), torch.randn(6, 8))


def test_only_one_residual_per_projection():
    captured = capture(
        lambda x, w, r, s: F.linear(x, w) + r + s, torch.randn(3, 8), torch.randn(6, 8), *torch.randn(2, 3, 6)
    )
    context = captured.until("fuse_epilogues")
    assert residuals(context) == 1 and count(context, project) == 1
    torch.testing.assert_close(captured.run(context), captured.outputs)
