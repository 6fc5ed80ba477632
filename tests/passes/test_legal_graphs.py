"""Graphs that random programs found passes to fail on: each goes through whole, and its answers are right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from gawscompile.backend import STAGES
from gawscompile.ir.operators import LowRank
from gawscompile.ir.sizes import same_size
from gawscompile.ir.sums import operator_sum
from tests.graphs import capture
from tests.test_partial import cut

K, R = 8, 2


def make(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes))) / sizes[-1] ** 0.5).to(dtype)


def adapted(x, w, a, b):
    return F.linear(x, w) + 2.0 * F.linear(F.linear(x, a), b)


def right(captured, loose=1e-5):
    context = captured.until()
    for got, want in zip(captured.run(context), captured.outputs, strict=True):
        torch.testing.assert_close(got, want, rtol=loose, atol=loose * want.abs().max().item())
    return context


def terms_of(captured):
    context = captured.until("recover_operators")
    sums = context.graph.find_nodes(op="call_function", target=operator_sum)
    return [type(term) for node in sums for term in node.args[1].terms]


EQUAL_SIZES = {
    "on flat activations": lambda x, w, a, b: adapted(x.view(-1, K), w, a, b).view(x.shape[0], x.shape[1], K),
    "a batch of one matrix": lambda x, w, a, b: torch.bmm(x, w.T.expand(x.shape[0], K, K)) + x,
    "heads": lambda x, w, a, b: adapted(x, w, a, b).view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2) * 2,
    "flat, and back by half": lambda x, w, a, b: adapted(x.reshape(x.shape[0] * x.shape[1], K), w, a, b).view(
        x.shape[0], -1, K
    ),
    "einsum": lambda x, w, a, b: torch.einsum("bsk,nk->bsn", x, w) + torch.einsum("bsr,nr->bsn", F.linear(x, a), b),
    "einsum, turned": lambda x, w, a, b: torch.einsum("bsk,nk->sbn", x, w),
    "columns": lambda x, w, a, b: (w @ F.linear(x, w).view(-1, K).T).T.tanh(),
    "one after the other": lambda x, w, a, b: adapted(torch.bmm(x, w.T.expand(x.shape[0], K, K)), w, a, b),
}


@pytest.mark.parametrize("name", EQUAL_SIZES)
def test_batch_and_sequence_of_one_length(name):
    """They are one symbol where lengths may change, and so are features that a weight then settles."""
    for tokens in (4, K):
        captured = capture(EQUAL_SIZES[name], make(tokens, tokens, K), make(K, K), make(R, K), make(K, R), dynamic=True)
        right(captured)


class Positions(torch.nn.Module):
    """A length that seems free until something of one length is added: every symbol of it is settled then."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.w = torch.nn.Parameter(make(5, K)), torch.nn.Parameter(make(K, K))
        self.a, self.b = torch.nn.Parameter(make(R, K)), torch.nn.Parameter(make(K, R))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        flat = adapted(x[0], self.w, self.a, self.b) + self.positions
        batched = torch.bmm(x, self.w.T.expand(2, K, K)) + self.positions
        return flat, batched, self.w @ x[0].T + self.positions.T, adapted(x, self.w, self.a, self.b) * self.positions


def test_a_length_that_is_settled_later():
    captured = capture(Positions(), make(2, 5, K), dynamic=True)
    context = right(captured)
    assert sum(entry.adapters for entry in context.record.linears) == 2


def test_sizes_that_are_equal_are_known_to_be():
    env = ShapeEnv()
    symbolic = StatelessSymbolicContext([DimDynamic.DYNAMIC] * 2)
    s, t = FakeTensorMode(shape_env=env).from_tensor(torch.empty(6, 10), symbolic_context=symbolic).shape
    guards = len(env.guards)
    for a, b in ((s * s // s, s), (s * t * 8 // (8 * t), s), ((s * s + s) // (s + 1), s), (12 * s // s, 12)):
        assert same_size(a, b) and same_size(b, a)
    for a, b in ((s, t), (s, 6), (s // 2 * 2, s), (s * t // 4, s * (t // 4)), (s * s // s, t)):
        assert not same_size(a, b) and not same_size(b, a)
    assert len(env.guards) == guards


def test_two_factors_of_a_kronecker_adapter_on_a_quantised_base():
    def function(x, q, s, w1, w2):
        return F.linear(x, q.to(x.dtype) * s) + 2.0 * F.linear(x, torch.kron(w1, w2))

    q = torch.randint(-99, 99, (16, 16), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    captured = capture(function, make(2, 3, 16), q, make(16, 1) / 64, make(4, 4), make(4, 4))
    context = right(captured)
    (group,) = context.record.groups
    assert group.spec == "k=16 x=f32; n=16 opaque=f32 out=f32 kron(1*4x4*4 4*4x4*1 f32 s=2.0)"


@pytest.mark.parametrize("adapter", [False, True])
def test_a_kronecker_adapter_on_what_another_linear_makes(adapter):
    """The sum broadcasts and stays; its parts are projections, and so is what they read."""

    def function(x, v, w, g, u, a, b):
        y = adapted(x, v, a, b) if adapter else F.linear(x, v)
        return (torch.bmm(y[None], w.T.T[None]) + 0.5 * (y.unflatten(-1, (4, 4)) @ g.T).flatten(-2)) @ u.T

    inputs = make(3, 16), make(16, 16), make(16, 16), make(4, 4), make(16, 16), make(R, 16), make(16, R)
    context = right(capture(function, *inputs))
    assert len(context.record.linears) == 4 and all(entry.status == "fused" for entry in context.record.linears)


def test_a_narrow_product_and_its_views_that_several_read():
    def function(x, a, w, v):
        u = F.linear(x, a)
        return F.linear(u, w), u.view(-1, 1) * 2, F.linear(u.view(3, 2, 1), v), u.double()

    right(capture(function, make(3, 16), make(R, 16), make(16, R), make(4, 1)))


def fp32_factors_on_bf16(x, w, a, b, c):
    y = F.linear(x, w, c) + (2.0 * F.linear(F.linear(x.float(), a), b)).to(x.dtype)
    return y, F.linear(y.float(), a), F.linear(F.linear(y, w).float(), b.T)


def test_a_cut_pipeline_casts_as_the_whole_one_does():
    """An fp32 factor on a bf16 activation, by itself and beside a base, whichever pass is the last."""
    bf16 = torch.bfloat16
    inputs = make(3, 16, dtype=bf16), make(16, 16, dtype=bf16), make(R, 16), make(16, R), make(16, dtype=bf16)
    captured = capture(fp32_factors_on_bf16, *inputs)
    whole = cut(captured)
    assert LowRank in terms_of(captured)
    for options in [{"fuel": n} for n in range(whole.record.matches)] + [{"disable": (name,)} for name in STAGES]:
        context = cut(captured, **options)
        for got, want in zip(captured.run(context), captured.outputs, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
