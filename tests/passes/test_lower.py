"""lower: groups call their op; linears left over are spelled in aten as they were."""

import pytest
import torch

from gawscompile.analysis.reading import aten
from gawscompile.ir.sums import linear
from tests.graphs import capture, count, small_bert, small_llama, tokens
from tests.passes.test_choose_plan import FAST_LIBRARY


def close(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_whole_pipeline_on_real_kernels():
    for model, inputs in ((small_llama(), {"use_cache": False}), (small_bert(), {})):
        captured = capture(model, tokens(2, 5), kernels=True, **inputs)
        context = captured.until()
        assert count(context, torch.ops.gaws.project.default) == len(context.record.groups) == 9
        assert count(context, aten.mm.default) == count(context, aten.addmm.default) == 0
        close(captured.run(context), captured.outputs)


@pytest.mark.slow  # test_generation has prompts of any length
def test_one_compiled_graph_serves_any_symbolic_number_of_tokens():
    captured = capture(small_llama(layers=1), tokens(1, 5), use_cache=False, dynamic=True, kernels=True)
    close(captured.run(captured.until()), captured.outputs)


def test_leftovers_are_spelled_as_aotautograd_spells_them(monkeypatch):
    monkeypatch.setattr("gawscompile.planning.devices.cpu", lambda: FAST_LIBRARY)
    for dynamic in (False, True):
        captured = capture(small_bert(layers=1, lora=None), tokens(4, 16), dynamic=dynamic, kernels=True)
        context = captured.until()
        assert count(context, linear) == 0
        if not dynamic:
            assert count(context, aten.addmm.default) == 7
        close(captured.run(context), captured.outputs)
