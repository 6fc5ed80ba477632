"""bitsandbytes' layers that lay their codes out in their first call are compiled and traced all the same."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch

import gawscompile
from gawscompile import ahead
from gawscompile.planning.devices import GPUS
from gawscompile.runtime import first_calls

bitsandbytes = pytest.importorskip("bitsandbytes")

AWAITS = pytest.mark.skipif(
    not bitsandbytes.functional.has_avx512bf16(), reason="bitsandbytes lays nothing out on a CPU without avx512_bf16"
)


def layers():
    """Two linears on nf4 that were never called; whoever calls them first decides in which dtype they multiply."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(bitsandbytes.nn.LinearNF4(64, 64, bias=False) for _ in range(2)))
    return model.to("cpu").eval()


def laid_out(model):
    return [getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in model]


@AWAITS
@pytest.mark.parametrize("training", [False, True])
def test_codes_are_laid_out_outside_of_training(training):
    model = layers().train(training)
    first_calls.lay_out(model)
    assert laid_out(model) == [not training] * 2
    assert not any(layer.compute_type_is_set for layer in model)


def test_a_compile_lays_nothing_out():
    model = layers()  # bitsandbytes gives no gradient through the layout for CPUs, and it may be trained next
    gawscompile.compile(model)
    assert laid_out(model) == [False] * 2


def test_a_model_that_was_never_called_is_explained():
    report = gawscompile.explain(layers(), torch.randn(1, 64))
    assert [entry.status for entry in report.linears] == ["fused"] * 2


@AWAITS
def test_torch_compile_is_told_to_call_it_first(caplog):
    torch._dynamo.reset()
    compiled, x = torch.compile(layers(), backend="gaws"), torch.randn(1, 64)
    with torch.no_grad(), suppress(Exception):  # torch fails in a way of its own
        compiled(x)
    (said,) = [record.getMessage() for record in caplog.records if "bitsandbytes" in record.getMessage()]
    assert "call the model once, without gradients" in said


def test_tracing_for_a_gpu_lays_nothing_out():
    model = layers()
    for layer in model:
        layer.support_avx512bf16_for_cpu = True
    (traced,) = ahead.trace(model, GPUS["H100"], torch.randn(1, 64))
    assert len(traced.record.groups) == 2 and all("nf4 g=64" in group.program for group in traced.record.groups)
    assert laid_out(model) == [False] * 2
    assert all(layer.support_avx512bf16_for_cpu for layer in model)
    with pytest.raises(RuntimeError), first_calls.put_off(model):
        assert not any(layer.support_avx512bf16_for_cpu for layer in model)
        raise RuntimeError
    assert all(layer.support_avx512bf16_for_cpu for layer in model)


@AWAITS
def test_a_layer_that_cannot_be_laid_out_is_told_in_a_warning(caplog):
    model = torch.nn.Sequential(bitsandbytes.nn.LinearNF4(64, 48, bias=False)).to("cpu").eval()  # not whole 32 rows
    first_calls.lay_out(model)
    assert laid_out(model) == [False]
    assert "N must be divisible by block_n" in caplog.text
