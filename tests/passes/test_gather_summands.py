"""gather_summands: gradients of one activation are added up projection by projection."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gawscompile.ir.operators import Given
from gawscompile.ir.sums import operator_sum, project
from gawscompile.passes.context import backward
from tests.graphs import Pair, capture, capture_joint, count

aten = torch.ops.aten


def trained(model: torch.nn.Module) -> torch.nn.Module:
    """Adapters alone want gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith((".a", ".b")))
    return model


@pytest.fixture(scope="module")
def joint():
    return capture_joint(trained(Pair()), torch.randn(2, 3, 32, requires_grad=True))


def sums(context, of_backward):
    nodes = context.graph.find_nodes(op="call_function", target=operator_sum)
    found = [node.args[1] for node in nodes if backward(node) == of_backward]
    return [total for total in found if total.dense.sizes == (32, 32)]


def test_each_projection_is_one_sum_in_both_directions(joint):
    context = joint.until("recover_operators")
    for of_backward in (False, True):
        found = sums(context, of_backward)
        assert len(found) == 3 and all(len(total.given) == 1 for total in found)
        assert all(total.transposed == of_backward for total in found)
    assert context.record.passes["gather_summands"] == 1  # x, which q and k read
    torch.testing.assert_close(joint.run(context), joint.outputs, rtol=1e-4, atol=1e-5)


def test_one_projection_adds_the_other(joint):
    context = joint.until("fuse_epilogues")
    residuals = [t.residual for n in context.graph.find_nodes(op="call_function", target=project) for t in n.args[1]]
    assert sum(residual is not None for residual in residuals) == 3  # of forward, of dx: the skip and the sibling
    assert not [note for note in context.record.notes if "after the projection" in note]
    torch.testing.assert_close(joint.run(context), joint.outputs, rtol=1e-4, atol=1e-5)


def test_without_it_they_are_no_sums(joint):
    """The guard of the tests above: autograd's own order keeps q's base and adapter apart."""
    from gawscompile.passes import gather_summands

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather_summands, "run", lambda graph, context: None)
        found = sums(joint.until("recover_operators"), True)
    assert sum(bool(total.given) for total in found) < 3


def test_a_part_that_others_read_stays_whole():
    class Read(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(32, 32, bias=False) for _ in range(2))
            self.scale = torch.nn.Parameter(torch.rand(32))
            self.layers.requires_grad_(False)

        def forward(self, x):
            x = self.scale * x
            return self.layers[0](x).sin() + self.layers[1](x).cos()

    captured = capture_joint(Read(), torch.randn(4, 32, requires_grad=True))
    context = captured.until("gather_summands")
    assert "gather_summands" not in context.record.passes  # each reads a gradient of its own: nothing to gather
    torch.testing.assert_close(captured.run(context), captured.outputs)


def test_forwards_keep_their_order():
    w, v, a, b = (torch.nn.Parameter(torch.randn(n, k)) for n, k in ((32, 32), (32, 32), (4, 32), (32, 4)))

    def forward(x):
        return F.linear(x, w) + F.linear(x.sin(), v) + F.linear(F.linear(x, a), b)

    captured = capture_joint(forward, torch.randn(5, 32, requires_grad=True))
    context = captured.until("gather_summands")
    first = next(n for n in context.graph.find_nodes(op="call_function", target=aten.add.Tensor))
    assert not backward(first) and first.args[0].args[0].name == "primals_1"
    plain = capture(forward, torch.randn(5, 32)).until("gather_summands")
    assert "gather_summands" not in plain.record.passes and count(plain, aten.add.Tensor) == 2


def test_terms_are_what_they_were(joint):
    """A's and B's change places in the backward: u has B's columns."""
    (total, *_) = sums(joint.until("recover_operators"), True)
    (term,) = total.given
    assert isinstance(term, Given) and term.rank == 4 and tuple(term.c.meta["val"].shape) == (32, 4)
