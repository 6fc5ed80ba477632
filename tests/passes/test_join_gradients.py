"""join_gradients: gradients of factors that read one activation are one product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gawscompile.passes import join_gradients
from gawscompile.passes.context import backward
from tests.graphs import capture, capture_joint, count

aten = torch.ops.aten


class Siblings(torch.nn.Module):
    """Two frozen projections of one activation, with LoRAs of unequal ranks."""

    def __init__(self, ranks=(4, 6), several=False):
        super().__init__()
        torch.manual_seed(0)
        self.several = several
        for i, rank in enumerate(ranks):
            self.register_buffer(f"w{i}", torch.randn(48, 32) / 5)
            self.register_parameter(f"a{i}", torch.nn.Parameter(torch.randn(rank, 32) / 5))
            self.register_parameter(f"b{i}", torch.nn.Parameter(torch.randn(48, rank) / 2))

    def forward(self, x):
        parts = [2.0 * F.linear(F.linear(x, getattr(self, f"a{i}")), getattr(self, f"b{i}")) for i in range(2)]
        if self.several:  # two adapters of one projection
            return F.linear(x, self.w0) + parts[0] + parts[1]
        return F.linear(x, self.w0) + parts[0], (F.linear(x, self.w1) + parts[1]).tanh()


def joined(model, *shape, dtype=torch.float32, **settings):
    x = draw(*shape).detach().to(dtype).requires_grad_()
    captured = capture_joint(lambda x: torch.cat(out) if isinstance(out := model(x), tuple) else out, x, **settings)
    context = captured.until("join_gradients")
    got = captured.run(context)
    loose = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(got, captured.outputs, **loose)
    assert all(one.stride() == other.stride() for one, other in zip(got, captured.outputs, strict=True))
    return captured, context


def draw(*shape):
    return torch.randn(*shape, requires_grad=True)


@pytest.mark.parametrize("leading", [(5,), (2, 3)])
def test_siblings_share_the_reads_of_their_activation(leading):
    captured, context = joined(Siblings(), *leading, 32)
    assert context.record.passes["join_gradients"] == 1
    before = captured.until("turn_products")
    assert count(before, aten.mm.default) - count(context, aten.mm.default) == 1
    products = context.graph.find_nodes(op="call_function", target=aten.mm.default)
    assert (10, 32) in [tuple(node.meta["val"].shape) for node in products]


def test_two_adapters_share_the_reads_of_their_gradient():
    _, context = joined(Siblings(several=True), 5, 32)
    assert context.record.passes["join_gradients"] == 2  # of both A, and of both B, whose products were turned


class Mixed(Siblings):
    """fp32 factors beside a bf16 base: each sibling casts x for itself, as PEFT does."""

    def forward(self, x):
        outputs = []
        for i in range(2):
            u = F.linear(x.float(), getattr(self, f"a{i}"))
            base = F.linear(x, getattr(self, f"w{i}").bfloat16())
            outputs.append((base + 2.0 * F.linear(u, getattr(self, f"b{i}"))).bfloat16())
        return tuple(outputs)


def test_casts_of_one_activation_are_one():
    _, context = joined(Mixed(), 5, 32, dtype=torch.bfloat16)
    assert context.record.passes["join_gradients"] == 1


def test_any_number_of_tokens():
    _, context = joined(Siblings(), 2, 3, 32, dynamic=True)
    assert context.record.passes["join_gradients"] == 1


def test_a_wide_one_stays_alone():
    _, context = joined(Siblings((4, 65)), 5, 32)
    assert "join_gradients" not in context.record.passes


def test_other_activations_are_not_joined():
    class Chain(Siblings):
        def forward(self, x):
            x = F.linear(x, self.w0[:32]) + F.linear(F.linear(x, self.a0), self.b0[:32])
            return F.linear(x, self.w1) + F.linear(F.linear(x, self.a1), self.b1)

    _, context = joined(Chain(), 5, 32)
    assert "join_gradients" not in context.record.passes


def test_a_gradient_that_is_read_before_the_last_stays_alone():
    """The last product is of something that was made of the first."""
    captured = capture_joint(lambda x: torch.cat(Siblings()(x)), draw(5, 32))
    context = captured.until("turn_products")
    products = [node for node in context.graph.find_nodes(op="call_function", target=aten.mm.default) if backward(node)]
    first, last = [node for node in products if tuple(node.meta["val"].shape) in ((4, 32), (6, 32))]
    left = last.args[0].args[0]
    with context.graph.inserting_before(last.args[0]):
        number = context.insert(aten.sum.default, (first,), first, first.meta["val"].sum())
        last.args[0].args = (context.insert(aten.add.Tensor, (left, number), left, left.meta["val"]), [1, 0])
    context.stage = "join_gradients"
    join_gradients.run(context.graph, context)
    assert "join_gradients" not in context.record.passes
    assert {first, last} <= set(context.graph.nodes)


@pytest.mark.slow  # many steps, which take long to trace
def test_factors_that_are_made_of_others_in_many_steps():
    """As Householder reflections are. Paths from a gradient to the outputs are counted in powers of two."""

    class Made(Siblings):
        def __getattr__(self, name):
            found = super().__getattr__(name)
            if name in ("a0", "a1"):
                for _ in range(40):
                    found = (found.sin() + found.cos()) / 1.5
            return found

    _, context = joined(Made(), 5, 32)
    assert context.record.passes["join_gradients"] == 1


def test_without_gradients_there_is_nothing_to_do():
    assert "join_gradients" not in capture(Siblings(), torch.randn(5, 32)).until("join_gradients").record.passes
