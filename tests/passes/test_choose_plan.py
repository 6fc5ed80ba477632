"""choose_plan: a plan table per group; linears that gain nothing go back to Inductor."""

import pytest
import torch

from gawscompile.analysis.reading import aten
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.sums import project
from gawscompile.planning import cost, devices
from gawscompile.planning.devices import Device
from tests.graphs import capture, count, llama_graph, small_bert, small_llama, tokens

SLOW_LIBRARY = Device(
    "slow library", 50e9, 2e-6, 2e-6, *({d: r for d in ("f32", "bf16", "f16")} for r in (3e11, 1e10, 1e10))
)
FAST_LIBRARY = Device(
    "fast library", 50e9, 2e-6, 2e-6, *({d: r for d in ("f32", "bf16", "f16")} for r in (1e10, 3e14, 9e13))
)


@pytest.fixture
def device(monkeypatch, request):
    monkeypatch.setattr("gawscompile.planning.devices.cpu", lambda: request.param)


def programs(context):
    return [n.args[3] for n in context.graph.find_nodes(op="call_function", target=project)]


@pytest.mark.parametrize("device", [SLOW_LIBRARY], indirect=True)
def test_static_tokens_get_one_row_and_every_group_its_record(device):
    context = capture(small_llama(layers=2), tokens(1, 1), use_cache=False).until("choose_plan")
    assert [str(p.table) for p in programs(context)] == ["gemv_cpp"] * 9
    assert len(context.record.groups) == 9
    assert {entry.status for entry in context.record.linears} == {"fused"}
    assert context.record.linear("model.layers.1.mlp.down_proj") is None  # PEFT's prefix is part of the path
    assert context.record.linear("base_model.model.model.layers.1.mlp.down_proj").group == 7


@pytest.mark.parametrize("device", [FAST_LIBRARY], indirect=True)
def test_plain_linears_go_back_to_inductor_where_the_library_is_faster(device):
    captured = capture(small_bert(layers=1, lora=None), tokens(4, 16))
    context = captured.until("choose_plan")
    assert count(context, project) == 0 and count(context, aten.addmm.default) == 7
    assert {(e.status, e.reason) for e in context.record.linears} == {("rejected", "LIBRARY")}
    torch.testing.assert_close(captured.run(captured.until()), captured.outputs)


@pytest.mark.parametrize("device", [FAST_LIBRARY], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_that_goes_back_has_its_product_again(device, dtype, monkeypatch):
    # More queries than a kernel of attention takes: what is left is the library's, bit by bit.
    monkeypatch.setattr(devices, "multiplies_in_fp32", lambda dtype: False)
    captured = capture(small_llama(dtype, layers=1, lora=None), tokens(4, 24), use_cache=False)
    assert any(
        n.args[2]
        for n in captured.until("fuse_epilogues").graph.find_nodes(op="call_function", target=project)
    )
    context = captured.until("choose_plan")
    assert count(context, project) == 0 and {e.reason for e in context.record.linears} == {"LIBRARY"}
    torch.testing.assert_close(captured.run(captured.until()), captured.outputs)


@pytest.mark.parametrize("device", [FAST_LIBRARY], indirect=True)
def test_adapted_linears_stay_and_accumulate_onto_the_library(device):
    context = capture(small_llama(layers=1), tokens(4, 16), use_cache=False).until("choose_plan")
    assert {str(p.table) for p in programs(context)} == {"gemm_accumulate"}
    assert context.record.linears[-1].reason == "LIBRARY"  # the head has no adapter


def test_symbolic_tokens_keep_the_whole_table():
    context = llama_graph(1, dynamic=True).until("choose_plan")
    spec = KernelSpec.parse(context.record.groups[0].spec)
    assert context.record.groups[0].plan == str(cost.plan(spec).table)
    assert not context.record.groups[0].tokens.isdigit()


def test_crossovers_are_where_the_costs_cross():
    spec = KernelSpec.parse("k=576 x=bf16; n=1536 w=bf16 out=bf16 lora(r=16 f32 s=2.0)")
    device = Device(
        "crossing",
        50e9,
        2e-6,
        2e-6,
        {"f32": 3e11, "bf16": 7e11},
        {"f32": 2e11, "bf16": 1e12},
        {"f32": 16e9, "bf16": 24e9},
    )
    planned = cost.plan(spec, device)
    (first, last), (second, rest) = planned.table.rows
    assert (first, second, rest) == ("gemv_cpp", "gemm_accumulate", None)
    assert planned.seconds(first, last) <= planned.seconds(second, last)
    assert planned.seconds(first, last + 1) > planned.seconds(second, last + 1)


def test_output_wider_than_the_weights_has_no_library_plan():
    spec = KernelSpec.parse("k=64 x=bf16; n=64 w=bf16 out=f32")
    assert "gemm_accumulate" not in cost.plan(spec, FAST_LIBRARY).costs
