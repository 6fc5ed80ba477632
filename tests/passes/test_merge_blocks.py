"""GraLoRA's two batched products become one low-rank term, and whatever only looks like them stays as it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gawscompile.analysis.reading import aten
from gawscompile.ir.operators import Kronecker, LowRank
from gawscompile.ir.sums import linear, operator_sum
from tests.graphs import capture, count


def gralora(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """As PEFT computes it: a ``[k, K/k, r]``, b ``[k, r, N/k]``."""
    k, _, r = a.shape
    *leading, features = x.shape
    inner = torch.einsum("...ni,nir->...nr", x.reshape(*leading, k, features // k), a)
    dealt = inner.reshape(*leading, k, k, r // k).transpose(-3, -2).reshape(*leading, k, r)
    return torch.einsum("...jr,jro->...jo", dealt, b).reshape(*leading, -1)


def layer(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w) + 1.5 * gralora(x, a, b)


def tensors(k=2, r=4, features=(64, 48), tokens=(2, 5), dtype=torch.float32):
    torch.manual_seed(k * r)
    into, out = features
    x, w = torch.randn(*tokens, into, dtype=dtype), torch.randn(out, into, dtype=dtype)
    return x, w, torch.randn(k, into // k, r, dtype=dtype), torch.randn(k, r, out // k, dtype=dtype)


class Module(torch.nn.Module):
    """`function` with its tensors but the first as parameters: only what is stored can be hoisted."""

    def __init__(self, function, *tensors: Tensor) -> None:
        super().__init__()
        self.function = function
        self.tensors = torch.nn.ParameterList(torch.nn.Parameter(t) for t in tensors)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.tensors)


def captured(function, x, *rest, dynamic=False):
    return capture(Module(function, *rest).eval(), x, dynamic=dynamic)


def right(found, tolerance=1e-5):
    """The answers of the whole pipeline."""
    context = found.until()
    for got, want in zip(found.run(context), found.outputs, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())
    return context


@pytest.mark.parametrize(
    ("tokens", "dynamic"), [((2, 5), False), ((2, 5), None), ((1, 1), False), ((1, 7), False), ((3, 1), False)]
)
@pytest.mark.parametrize(("k", "r"), [(2, 4), (4, 4), (2, 2), (4, 8)])
def test_blocks_become_one_low_rank_term(k, r, tokens, dynamic):
    x, *rest = tensors(k, r, (64, 128), tokens)
    if dynamic is None:
        torch._dynamo.mark_dynamic(x, 1)
    found = captured(layer, x, *rest, dynamic=dynamic)
    context = found.until("hoist_weights")
    (total,) = context.graph.find_nodes(op="call_function", target=operator_sum)
    (_, term) = total.args[1].terms
    assert isinstance(term, LowRank) and term.scale == 1.5
    assert tuple(term.a.meta["val"].shape) == (k * r, 64) and tuple(term.b.meta["val"].shape) == (128, k * r)
    assert not context.graph.find_nodes(op="call_function", target=aten.bmm.default)
    right(found)


def test_it_follows_its_parameters():
    x, *rest = tensors()
    found = captured(layer, x, *rest)
    context = right(found)
    (factors_before,) = found.run(context)
    for t in found.inputs:
        if t.shape in ((2, 32, 4), (2, 4, 24)):
            t.data.mul_(-0.5)  # which no version counter sees
    (want,) = torch.fx.GraphModule(found.module, found.graph)(*found.inputs)
    assert not torch.allclose(want, factors_before, atol=1e-2)
    torch.testing.assert_close(found.run(context)[0], want, rtol=1e-5, atol=1e-4)


def test_bf16_over_fp32_factors():
    x, w, a, b = tensors()

    def function(x, w, a, b):
        return F.linear(x, w) + gralora(x.to(a.dtype), a, b).to(x.dtype)

    found = captured(function, x.bfloat16(), w.bfloat16(), a, b)
    assert count(found.until("merge_blocks"), aten.bmm.default) == 0
    right(found, 2e-2)


def shared(x, w, a, b):
    """Somebody else reads what lies between the two."""
    k, _, r = a.shape
    inner = torch.einsum("...ni,nir->...nr", x.reshape(*x.shape[:-1], k, -1), a)
    dealt = inner.reshape(*x.shape[:-1], k, k, r // k).transpose(-3, -2).reshape(*x.shape[:-1], k, r)
    return F.linear(x, w) + torch.einsum("...jr,jro->...jo", dealt, b).flatten(-2) + inner.sum()


def activated(x, w, a, b):
    """Between them is more than a permutation."""
    k = a.shape[0]
    inner = torch.einsum("...ni,nir->...nr", x.reshape(*x.shape[:-1], k, -1), a)
    return F.linear(x, w) + torch.einsum("...jr,jro->...jo", torch.relu(inner), b).flatten(-2)


def per_token(x, w, a, b):
    """Blocks of tokens, not of features."""
    halves = x[:, :4].reshape(2, -1, x.shape[-1])
    return F.linear(x, w).sum(1), torch.bmm(torch.bmm(halves[..., : a.shape[1]], a), b)


def computed(x, w, a, b):
    """A is made of the activation."""
    return F.linear(x, w) + gralora(x, a * x.mean(), b)


def interleaved(x, w, a, b):
    """Blocks take every other feature."""
    k = a.shape[0]
    slices = x.reshape(*x.shape[:-1], -1, k).transpose(-1, -2)
    inner = torch.einsum("...ni,nir->...nr", slices, a)
    return F.linear(x, w) + torch.einsum("...jr,jro->...jo", inner, b).flatten(-2)


LEFT = {shared: "FACTOR_SHAPE", activated: "FACTOR_SHAPE", interleaved: "RESHAPED", per_token: None, computed: None}
"""By the reason in the notes; none where no parameters multiply blocks of features."""


@pytest.mark.parametrize("function", LEFT)
def test_what_only_looks_alike_stays(function):
    found = captured(function, *tensors(tokens=(2, 5)))
    context = found.until("merge_blocks")
    assert count(context, aten.bmm.default) == 2
    reason, notes = LEFT[function], [note for note in context.record.notes if "blocks left alone" in note]
    assert bool(notes) == bool(reason) and all(reason in note for note in notes[:1])
    right(found)


def test_blocks_may_stay_in_their_order():
    def block_diagonal(x, w, a, b):
        k = a.shape[0]
        inner = torch.einsum("...ni,nir->...nr", x.reshape(*x.shape[:-1], k, -1), a)
        return F.linear(x, w) + torch.einsum("...jr,jro->...jo", inner, b).flatten(-2)

    found = captured(block_diagonal, *tensors())
    assert count(found.until("merge_blocks"), linear) == 3
    right(found)


def test_wide_blocks_are_left_alone_and_said_so():
    found = captured(layer, *tensors(r=16))
    context = found.until("merge_blocks")
    assert count(context, aten.bmm.default) == 2
    assert any("FACTOR_SHAPE" in note and "32 ranks" in note for note in context.record.notes)
    right(found)


def test_merged_blocks_beside_a_base_that_is_refused_are_what_inductor_knows():
    """A graph of joint passes is past Inductor's decompositions: what has no lowering ends the compile."""
    from torch._inductor.lowering import lowerings

    def on_fp64(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, w.to(x.dtype)) + gralora(x, a, b)

    x, w, a, b = tensors()
    context = right(captured(on_fp64, x, w.double(), a, b))
    assert context.record.passes["merge_blocks"] == 1 and not context.record.groups
    used = {node.target for node in context.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    assert not [target for target in used if target not in lowerings]


# ---- one product: a block-diagonal factor ---------------------------------------------------------------------


def blocks(x: Tensor, g: Tensor) -> Tensor:
    """``blockdiag(G_1 … G_n) x``, g ``[n, rows, columns]``."""
    return torch.einsum("noi,...ni->...no", g, x.unflatten(-1, (g.shape[0], g.shape[2]))).flatten(-2)


def batched(x: Tensor, g: Tensor) -> Tensor:
    """The same by a batched product."""
    slices = x.reshape(-1, g.shape[0], g.shape[2]).transpose(0, 1)
    return torch.bmm(slices, g.transpose(1, 2)).transpose(0, 1).reshape(*x.shape[:-1], -1)


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in shapes]


ALONE = {
    "alone": (lambda x, w, g: F.linear(x, w) + 2.0 * blocks(x, g), [(4, 6, 8)], "blockdiag(4 [6x8])"),
    "batched": (lambda x, w, g: F.linear(x, w) + 2.0 * batched(x, g), [(4, 6, 8)], "blockdiag(4 [6x8])"),
    "B of BD-LoRA": (
        lambda x, w, a, b: F.linear(x, w) + 2.0 * blocks(F.linear(x, a), b),
        [(8, 32), (4, 6, 2)],
        "blockdiag(4 [6x2]) [8x32]",
    ),
    "A of BD-LoRA": (
        lambda x, w, a, b: F.linear(x, w) + 2.0 * F.linear(blocks(x, a), b),
        [(4, 2, 8), (24, 8)],
        "[24x8] blockdiag(4 [2x8])",
    ),
}


@pytest.mark.parametrize("dynamic", [False, None])
@pytest.mark.parametrize("name", ALONE)
def test_distinct_blocks_are_read_as_they_are(name, dynamic):
    function, shapes, says = ALONE[name]
    x, *rest = drawn((2, 5, 32), (24, 32), *shapes)
    if dynamic is None:
        torch._dynamo.mark_dynamic(x, 1)
    found = captured(function, x, *rest, dynamic=dynamic)
    context = found.until("recover_operators")
    (total,) = context.graph.find_nodes(op="call_function", target=operator_sum)
    (_, term) = total.args[1].terms
    assert isinstance(term, Kronecker) and term.scale == 2.0
    (entry,) = context.record.linears
    assert entry.operators == f"Dense[24x32] + 2·Kronecker({says})"
    context = right(found)
    assert count(context, torch.ops.gaws.project.default) == 1 and not count(context, aten.bmm.default)


def turned_tokens(x: Tensor, g: Tensor) -> Tensor:
    """Blocks of features, with the tokens' two dimensions exchanged on the way."""
    a, b, _ = x.shape
    slices = torch.bmm(x.reshape(a * b, len(g), -1).transpose(0, 1), g.transpose(1, 2))
    return slices.view(len(g), a, b, -1).permute(2, 1, 0, 3).reshape(b, a, -1)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, g: F.linear(x, w).relu() + blocks(x, g).relu(),  # no sum
        lambda x, w, g: F.linear(x, w) + blocks(x, g).unflatten(-1, (4, 6)).transpose(-1, -2).flatten(-2),
        lambda x, w, g: F.linear(x, w) + blocks(x, g) + 1.5 * batched(x, g.tanh()),
        lambda x, w, g: F.linear(x, w).sin() + turned_tokens(x, g),
        lambda x, w, g: F.linear(x, w).relu() + blocks(blocks(x, g).sin(), g.mT).sum(-1, keepdim=True),
        lambda x, w, g: blocks(F.linear(x, w.T @ w), g),
        lambda x, w, g: F.linear(x, w) + blocks(x.unflatten(-1, (4, 8)), g[:2, :3, :4]).flatten(-2),
        lambda x, w, g: F.linear(x.flatten(0, 1), w) + 2.0 * blocks(x.flatten(0, 1), g),
    ],
)
def test_near_misses_of_blocks_are_right(function):
    right(captured(function, *drawn((4, 4, 32), (24, 32), (4, 6, 8))))


def test_distinct_blocks_run_in_a_kernel():
    function, shapes, _ = ALONE["B of BD-LoRA"]
    x, *rest = drawn((1, 1, 32), (24, 32), *shapes)
    module = Module(function, *rest).eval()
    found = capture(module, x, kernels=True)
    context = right(found)
    with torch.no_grad():  # kernels read the blocks where PEFT keeps them: what is written to them counts at once
        module.tensors[-1].mul_(-3.0)
        torch.testing.assert_close(found.run(context), [module(x)], rtol=1e-4, atol=1e-4)


def test_siblings_with_blocks_are_one_group_and_a_block_may_have_one_rank():
    def function(x, w, v, g, h, a, b):
        ranks = F.linear(batched(x, a), b)
        return F.linear(x, w) + 2.0 * blocks(x, g), F.linear(x, v) + 0.5 * batched(x, h) + ranks

    shapes = (1, 3, 32), (24, 32), (16, 32), (4, 6, 8), (4, 4, 8), (4, 1, 8), (16, 4)
    context = right(captured(function, *drawn(*shapes)))
    (group,) = context.record.groups
    assert len(group.members) == 2 and group.spec.count("kron(") == 3, group.spec


def test_flat_tokens_are_followed():
    def flat(x, w, a, b):
        return F.linear(x.flatten(0, 1), w) + 1.5 * gralora(x.flatten(0, 1), a, b)

    context = captured(flat, *tensors()).until("recover_operators")
    (entry,) = context.record.linears
    assert "LowRank(r=8)" in entry.operators
