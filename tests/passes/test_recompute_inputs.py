"""recompute_inputs: what an adapter's gradient alone reads is not saved where elementwise operations make it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

import gawscompile  # noqa: F401
from gawscompile.analysis.reading import VIEWS
from tests.graphs import capture, capture_joint

aten = torch.ops.aten
N = 48


class Adapted(torch.nn.Module):
    """A frozen projection with a LoRA."""

    def __init__(self, n=N, k=N):
        super().__init__()
        self.register_buffer("w", torch.randn(n, k) / 5)
        self.a, self.b = (torch.nn.Parameter(torch.randn(sizes) / 3) for sizes in ((4, k), (n, 4)))

    def forward(self, x):
        return F.linear(x, self.w) + 2.0 * F.linear(F.linear(x, self.a), self.b)


class Layer(torch.nn.Module):
    """A norm, SwiGLU, and the projections around it."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.RMSNorm(N).requires_grad_(False)
        self.gate, self.up, self.down = Adapted(), Adapted(), Adapted()
        self.dropout = torch.nn.Dropout(dropout) if dropout else torch.nn.Identity()

    def forward(self, h):
        x = self.norm(h)
        return h + self.down(self.dropout(F.silu(self.gate(x)) * self.up(x)))


def drawn(*sizes):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(1)).requires_grad_()


def again(captured):
    """The operations that the backward computes again, in the graph's order, without views."""
    nodes = captured.until().graph.nodes
    found = [node.target for node in nodes if node.meta.get("recompute") == CheckpointPolicy.MUST_RECOMPUTE]
    return [target for target in found if target not in VIEWS]


def saved(function, *inputs):
    """The tensors that autograd keeps for the backward, which runs."""
    torch._dynamo.reset()
    kept: list[torch.Tensor] = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    compiled = torch.compile(function, backend="gaws", dynamic=False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = compiled(*inputs)
    out.sum().backward()
    return kept


def test_neither_a_product_nor_what_a_norm_gives_is_saved():
    model, h = Layer(), drawn(3, 7, N)
    x = model.norm(h)
    product = F.silu(model.gate(x)) * model.up(x)
    kept = saved(model, h)
    got = [p.grad.clone() for p in (h, *model.parameters()) if p.grad is not None]
    for p in (h, *model.parameters()):
        p.grad = None
    model(h).sum().backward()
    for one, other in zip(got, [p.grad for p in (h, *model.parameters()) if p.grad is not None], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    def among(value):
        alike = [one.reshape(value.shape) for one in kept if one.numel() == value.numel() and one.dtype == value.dtype]
        return any(torch.allclose(one, value, rtol=1e-3, atol=1e-3) for one in alike)

    assert among(h) and among(model.gate(x)) and among(model.up(x))
    assert not among(x) and not among(product)


def test_what_is_tagged():
    targets = again(capture_joint(Layer(), drawn(3, 7, N)))
    assert targets == 3 * [aten.mul.Tensor], "the norm's two and SwiGLU's; silu is read by up's gradient as well"


def test_each_sibling_may_cast_for_itself():
    """As PEFT's fp32 factors do beside a bf16 base: x is formed again in bf16, and widened once for both gradients."""

    def model(h, norm=torch.nn.RMSNorm(N).requires_grad_(False), pair=(Adapted(), Adapted())):  # noqa: B008
        x = norm(h).bfloat16()
        return sum(F.linear(x, one.w.bfloat16()) + F.linear(F.linear(x.float(), one.a), one.b) for one in pair)

    targets = again(capture_joint(model, drawn(3, 7, N)))
    cast = torch.ops.prims.convert_element_type.default
    assert targets == [*2 * [aten.mul.Tensor], *2 * [cast]]


def test_two_values_made_of_one_that_no_gradient_reads():
    def model(h, first=Adapted(), second=Adapted()):  # noqa: B008
        middle = h.sin() + 1
        return first(middle * 2) + second(middle * 3)

    targets = again(capture_joint(model, drawn(5, N)))
    assert targets == [aten.sin.default, aten.add.Tensor, aten.mul.Tensor, aten.mul.Tensor]


def test_any_number_of_tokens():
    assert again(capture_joint(Layer(), drawn(3, 7, N), dynamic=True))


def test_a_dropped_part_is_drawn_once():
    """The mask is saved; what it leaves of x is formed again."""
    captured = capture_joint(Layer(dropout=0.5).train(), drawn(3, 7, N))
    targets = again(captured)
    assert targets and not any(torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()) for target in targets)


def test_what_other_gradients_read_is_saved():
    """Of x * x the gradient reads x, which no projection's alone is then."""

    def model(x, adapted=Adapted()):  # noqa: B008
        x = x.sin()
        return adapted(x) * x

    assert not again(capture_joint(model, drawn(5, N)))


def test_what_would_have_to_be_saved_in_its_place_is_not_formed_again():
    """The sum's gradient reads neither of its two terms."""

    def model(x, first=Adapted(), second=Adapted(), third=Adapted()):  # noqa: B008
        return third(first(x) + second(x))

    assert not again(capture_joint(model, drawn(5, N)))


class Counting(torch.nn.Module):
    """Adds a buffer to what the adapter reads, and writes the buffer afterwards. No gradient reads it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.adapted = Adapted()
        self.register_buffer("count", torch.full((N,), 2.0))

    def forward(self, x):
        y = self.adapted(x.sin() + self.count)
        self.count.add_(1)
        return y


def test_what_the_forward_writes_is_not_read_again():
    model, other = Counting(), Counting()
    compiled = torch.compile(model, backend="gaws", dynamic=False, options={"strict": True})
    for _ in range(2):
        for run in (compiled, other):
            run(drawn(5, N)).sum().backward()
        assert torch.equal(model.count, other.count)
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-4)


def test_an_input_that_no_gradient_reads_is_not_kept():
    """It is the caller's, who may write it before the backward comes."""
    adapted = Adapted()
    assert not again(capture_joint(lambda x: adapted(x.sin()), torch.randn(5, N)))


def test_a_norm_that_is_written_before_the_backward_is_an_error():
    """As in eager mode, which saves its bias likewise."""
    model = torch.nn.Sequential(torch.nn.LayerNorm(N).requires_grad_(False), Adapted())
    for run in (model, torch.compile(model, backend="gaws", dynamic=False, options={"strict": True})):
        loss = run(drawn(5, N)).sum()
        with torch.no_grad():
            model[0].bias.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_long_chain_is_saved():
    def model(x, adapted=Adapted()):  # noqa: B008
        y = x.sin()
        for _ in range(20):
            y = y * 1.5 + 0.5
        return adapted(y)

    assert not again(capture_joint(model, drawn(5, N)))


def test_a_checkpoint_keeps_its_own_tags():
    layer = Layer()

    def model(x):
        return checkpoint(layer, x, use_reentrant=False)

    captured = capture_joint(model, drawn(3, 7, N))
    assert "recompute_inputs" not in captured.until().record.passes


def test_without_gradients_there_is_nothing_to_do():
    assert "recompute_inputs" not in capture(Layer().eval(), torch.randn(3, 7, N)).until().record.passes
