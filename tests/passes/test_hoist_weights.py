"""`hoist_weights`: what parameters alone determine, and a projection reads, is computed once per state of those."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gawscompile.ir.operators import RowScale
from gawscompile.ir.recipe import RecipeError, hoisted, run, write
from gawscompile.ir.sums import operator_sum
from gawscompile.ir.types import SpecError
from gawscompile.planning.table import Derived, PlanTable, Program
from gawscompile.planning.targets import TRITON
from tests.graphs import capture, count

K, N, R = 24, 20, 3
SPEC = "k=24 x=f32; n=20 w=f32 out=f32 rowscale=f32"


class Layer(nn.Module):
    """An adapted linear; `kind` names the spelling of what is added."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.base = nn.Linear(K, N)
        self.a, self.b, self.c, self.d = (nn.Parameter(torch.randn(s)) for s in ((R, K), (N, R), (R, K), (N, R)))
        self.magnitude = nn.Parameter(torch.rand(N) + 0.5)
        self.register_buffer("table", torch.randn(N, K))

    def forward(self, x, other):
        return KINDS[self.kind](self, x, other)


def dora(layer, x, other):
    norm = torch.linalg.norm(layer.base.weight + 2.0 * layer.b @ layer.a, dim=1)
    scale = (layer.magnitude / norm).view(1, -1)
    whole = layer.base(x)
    lora = nn.functional.linear(x @ layer.a.T, layer.b)
    return whole + (scale - 1) * (whole - layer.base.bias) + scale * lora * 2.0


def hadamard(layer, x, other):
    return layer.base(x) + x @ ((layer.b @ layer.a) * (layer.d @ layer.c)).T


KINDS = {
    "dora": dora,
    "row scale": lambda layer, x, other: layer.base(x) * layer.magnitude,
    "hadamard": hadamard,
    "factors assembled": lambda layer, x, other: layer.base(x) + (x @ torch.softmax(layer.a, 0).T) @ layer.b.T,
    "shared buffer": lambda layer, x, other: (
        layer.base(x) + (x @ layer.table[:R].T) @ (layer.b * layer.magnitude[:, None]).T
    ),
    # near misses
    "of an input": lambda layer, x, other: nn.functional.linear(x, layer.base.weight * other[:, None]),
    "random": lambda layer, x, other: nn.functional.linear(x, layer.base.weight * torch.rand(N, 1)),
    "base read twice": lambda layer, x, other: (lambda h: (h * layer.magnitude, torch.relu(h)))(layer.base(x)),
    "scale of an input": lambda layer, x, other: layer.base(x) * other,
}
HOISTED = {"dora": 1, "hadamard": 1, "factors assembled": 1, "shared buffer": 2}


def captured(kind):
    return capture(Layer(kind), torch.randn(2, 5, K), torch.rand(N), kernels=True)


@pytest.mark.parametrize("kind", HOISTED)
def test_hoisted_and_right(kind):
    c = captured(kind)
    context = c.until("hoist_weights")
    assert count(context, hoisted) == HOISTED[kind]
    context = c.until()
    torch.testing.assert_close(c.run(context), c.outputs, rtol=1e-5, atol=1e-5)
    program = Program.parse(next(node.args[2] for node in calls(context) if " | [[" in node.args[2]))
    assert program.derived and str(program) == str(Program.parse(str(program)))


@pytest.mark.parametrize("kind", HOISTED)
def test_it_follows_its_sources(kind):
    c = captured(kind)
    context = c.until()
    c.run(context)
    for at in c.stored:
        c.inputs[at].data.mul_(1.3)
    want = [out for out in c.module(*c.inputs) if isinstance(out, torch.Tensor)]
    torch.testing.assert_close(c.run(context), want, rtol=1e-5, atol=1e-5)
    assert (want[0] - c.outputs[0]).abs().max() > 1e-3


def calls(context):
    return context.graph.find_nodes(op="call_function", target=torch.ops.gaws.project.default)


@pytest.mark.parametrize("kind", ["of an input", "random", "scale of an input"])
def test_what_is_not_of_parameters_alone_stays(kind):
    c = captured(kind)
    context = c.until()
    assert not context.record.passes.get("hoist_weights")
    assert not any(" | [[" in node.args[2] for node in calls(context))
    if kind != "random":
        torch.testing.assert_close(c.run(context), c.outputs, rtol=1e-5, atol=1e-5)
    if kind != "scale of an input":
        assert {entry.reason for entry in context.record.linears} == {"WEIGHT_COMPUTED"}


def test_rows_are_scaled_in_the_sum():
    context = captured("dora").until("recover_operators")
    (node,) = context.graph.find_nodes(op="call_function", target=operator_sum)
    assert [type(term).__name__ for term in node.args[1].terms] == ["Dense", "Bias", "RowScale", "LowRank"]
    (entry,) = context.record.linears
    assert entry.operators == f"diag[{N}]·(Dense[{N}x{K}] + 2·LowRank(r={R})) + Bias[{N}]"
    context = captured("row scale").until("recover_operators")
    (node,) = context.graph.find_nodes(op="call_function", target=operator_sum)
    assert isinstance(node.args[1].terms[-1], RowScale)


def test_a_base_that_others_read_runs_once():
    c = captured("base read twice")
    context = c.until()
    (entry,) = context.record.linears
    assert entry.operators == f"Dense[{N}x{K}] + Bias[{N}]"
    torch.testing.assert_close(c.run(context), c.outputs, rtol=1e-5, atol=1e-5)


def test_recipes_are_text():
    graph = torch.fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    nodes = [graph.call_function(torch.ops.aten.mm.default, (b, a))]
    nodes.append(graph.call_function(torch.ops.prims.convert_element_type.default, (nodes[-1], torch.bfloat16)))
    nodes.append(graph.call_function(torch.ops.aten.sum.dim_IntList, (nodes[-1], [1], True)))
    text = write(nodes, [a, b])
    one, two = torch.randn(2, 3), torch.randn(4, 2)
    torch.testing.assert_close(run(text, [one, two]), (two @ one).to(torch.bfloat16).sum(1, keepdim=True))
    exact = run(text, [one.double(), two.double()], exact=True)
    torch.testing.assert_close(exact, (two.double() @ one.double()).sum(1, keepdim=True))
    with pytest.raises(RecipeError, match="no operator"):
        write([graph.call_function(torch.relu, (a,))], [a])


def test_constants_are_spelled_out_while_they_are_few():
    graph, holder = torch.fx.Graph(), nn.Module()
    holder.few, holder.many = torch.tensor([1.5, 2.5]), torch.zeros(100)
    few, many = graph.get_attr("few"), graph.get_attr("many")
    assert run(write([few], [], holder), []).tolist() == [1.5, 2.5]
    with pytest.raises(RecipeError, match="too large"):
        write([many], [], holder)


def test_no_recipe_for_a_gpu():
    with pytest.raises(SpecError, match="hoisted on a GPU"):
        table = PlanTable((("two_launch", None),))
        Program(table, Program.parse(f"gemv_cpp | {SPEC}").spec, TRITON, derived=(Derived(1, (0,), "[]"),))
