"""fuse_epilogues: a residual added to a projection rides in it, and so does the product of SwiGLU's gate and up."""

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from gawscompile.analysis.reading import aten
from gawscompile.ir.records import Reason
from gawscompile.ir.sums import project
from gawscompile.planning import devices
from tests.graphs import Captured, bert_graph, capture, count, llama_graph
from tests.passes.test_fuse_zflora import specs


def residuals(context):
    return sum(p.residual is not None for spec in specs(context) for p in spec.projections)


def test_two_residuals_a_layer():
    for captured in (llama_graph(), bert_graph()):
        before, after = captured.until("fuse_zflora"), captured.until("fuse_epilogues")
        assert residuals(after) == 4
        assert count(before, aten.add.Tensor) - count(after, aten.add.Tensor) == 4 + gated(after)
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


# --- SwiGLU ------------------------------------------------------------------------------------------------


def gated(context):
    return sum(spec.swiglu for spec in specs(context))


X, GATE, UP = torch.randn(3, 8), torch.randn(6, 8), torch.randn(6, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, gate, up: F.silu(F.linear(x, gate)) * F.linear(x, up),
        lambda x, gate, up: F.linear(x, up) * F.silu(F.linear(x, gate)),
        lambda x, gate, up: (y := F.linear(x, gate)) * torch.sigmoid(y) * F.linear(x, up),
        lambda x, gate, up: F.linear(x, up) * (torch.sigmoid(y := F.linear(x, gate)) * y),
    ],
)
def test_gate_and_up_leave_one_output(function, dtype):
    captured = capture(function, X.to(dtype), GATE.to(dtype), UP.to(dtype))
    context = captured.until("fuse_epilogues")
    assert gated(context) == 1 and count(context, project) == 1
    assert count(context, aten.exp.default) == count(context, aten.mul.Tensor) == 0
    assert count(context, aten.sigmoid.default) == 0
    loose = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}  # two roundings less than as spelled
    torch.testing.assert_close(captured.run(context), captured.outputs, **loose)


def test_each_layer_of_a_llama_with_adapters_is_gated():
    captured = llama_graph()
    context = captured.until("fuse_epilogues")
    assert gated(context) == 2
    assert all(p.lowrank for spec in specs(context) if spec.swiglu for p in spec.projections)
    torch.testing.assert_close(captured.run(context), captured.outputs)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, gate, up: F.gelu(F.linear(x, gate)) * F.linear(x, up),
        lambda x, gate, up: torch.sigmoid(F.linear(x, gate)) * F.linear(x, up),
        lambda x, gate, up: F.silu(F.linear(x, gate)) * F.linear(x, up)[:1],
        lambda x, gate, up: F.silu(F.linear(x, gate)) * F.linear(x.sin(), up),
        lambda x, gate, up: F.silu(y := F.linear(x, gate)) * F.linear(x, up) + y,
        lambda x, gate, up: F.silu(F.linear(x, gate)) * (y := F.linear(x, up)) + y,
        lambda x, gate, up: (y := F.silu(F.linear(x, gate))) * F.linear(x, up) + y,
        lambda x, gate, up: F.silu(y := F.linear(x, gate)) * y + F.linear(x, up),
        lambda x, gate, up: (y := F.linear(x, gate)) / (torch.exp(-y) + 2) * F.linear(x, up),
        lambda x, gate, up: torch.sigmoid(F.linear(x, gate)) * (y := F.linear(x, up)) * y,
        lambda x, gate, up: (y := F.linear(x, gate)) * torch.sigmoid(y) * torch.sigmoid(y) * F.linear(x, up),
        lambda x, gate, up: (y := F.linear(x, up)) / (torch.exp(-F.linear(x, gate)) + 1) * y,
    ],
)
def test_what_is_not_swiglu_keeps_its_product(function):
    captured = capture(function, X, GATE, UP)
    context = captured.until("fuse_epilogues")
    assert gated(context) == 0
    torch.testing.assert_close(captured.run(context), captured.outputs)


@pytest.mark.parametrize(
    "function",
    [lambda x, gate, up: F.silu(x @ gate.T) * (x @ up.T), lambda x, gate, up: F.silu(x @ gate.T) * F.linear(x, up)],
)
def test_a_weight_kept_as_k_n_keeps_its_product(function):
    captured = capture(lambda x, gate, up: function(x, gate.T, up), X, GATE.T.contiguous(), UP)
    context = captured.until("fuse_epilogues")
    assert gated(context) == 0 and count(context, project) == 1
    assert any("a weight is kept as [k, n]" in note for note in context.record.notes)
    torch.testing.assert_close(captured.run(context), captured.outputs)


def test_on_a_gpu_a_weight_kept_as_k_n_is_gated():
    """Traced and planned without one."""
    with FakeTensorMode() as mode, torch.device("cuda"):
        inputs = torch.empty(3, 64), torch.empty(64, 48), torch.empty(64, 48)
    with mode:
        traced = make_fx(lambda x, gate, up: F.silu(x @ gate) * (x @ up), select_decomp_table())(*inputs)
    with devices.planning_for(devices.GPUS["H100"]):
        context = Captured(traced.graph, traced, [], [], frozenset((1, 2))).until("fuse_epilogues")
    assert gated(context) == 1


def test_gate_of_three_siblings_keeps_its_product():
    captured = capture(
        lambda x, gate, up, other: (F.silu(F.linear(x, gate)) * F.linear(x, up), F.linear(x, other)),
        *(X, GATE, UP, torch.randn(5, 8)),
    )
    context = captured.until("fuse_epilogues")
    assert gated(context) == 0 and count(context, project) == 1
    torch.testing.assert_close(captured.run(context), captured.outputs)


RESIDUAL = torch.linspace(-1, 1, 96).view(2, 3, 16)


@pytest.mark.parametrize(
    ("says", "function", "r"),
    [
        ("others read the projection's output too", lambda y, r: (y + r, y.sin()), RESIDUAL),
        ("it comes after the projection", lambda y, r: y + r.sin(), RESIDUAL),
        ("it has another shape or dtype", lambda y, r: y + r, RESIDUAL[0]),
        ("it is scaled as it is added", lambda y, r: torch.add(y, r, alpha=0.5), RESIDUAL),
        ("it is laid out otherwise", lambda y, r: y + r, RESIDUAL.mT.contiguous().mT),
        (None, lambda y, r: y + r, RESIDUAL),
        (None, lambda y, r: (y + 1.0) * r, RESIDUAL),
        (None, lambda y, r: y + (y.sin() * r).sum(-1, keepdim=True), RESIDUAL),
    ],
)
def test_a_residual_that_is_not_taken_is_told(says, function, r):
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 16), torch.randn(16, 16)
    context = capture(lambda x, w, r: function(F.linear(x, w), r), x, w, r).until("fuse_epilogues")
    notes = [note for note in context.record.notes if Reason.EPILOGUE.value in note]
    assert [says in note for note in notes] == [True] if says else not notes


def test_a_product_that_is_not_taken_is_told():
    def others(x, w, v):
        gate, up = F.linear(x, w), F.linear(x, v)
        return F.silu(gate) * up, up.sin()

    def apart(x, w, v):
        return F.silu(F.linear(x, w)) * x, F.linear(x, v)

    torch.manual_seed(0)
    tensors = torch.randn(2, 3, 16), torch.randn(16, 16), torch.randn(16, 16)
    for function, says in ((others, "others read up too"), (apart, "gate and up are not of one group")):
        context = capture(function, *tensors).until("fuse_epilogues")
        (note,) = [note for note in context.record.notes if Reason.EPILOGUE.value in note]
        assert says in note
