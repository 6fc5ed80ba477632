"""`explain` of a model whose blocks are compiled one by one: each is told, whichever graph they share."""

from __future__ import annotations

import pytest
import torch

from gawscompile import explain
from gawscompile.debug.regions import regions
from tests.graphs import small_llama, tokens


@pytest.mark.slow  # compiles a model of two layers three times; smaller ones below
def test_regions_are_told_as_in_the_whole():
    model = small_llama(layers=2)
    whole = explain(model, tokens(1, 3), use_cache=False)
    layers = model.get_base_model().model.layers
    for layer in layers:
        layer.compile(backend="gaws")
    kept = [layer._compiled_call_impl for layer in layers]
    report = explain(model, tokens(1, 3), use_cache=False)
    assert [layer._compiled_call_impl for layer in layers] == kept
    assert list(regions(model)) == [f"base_model.model.model.layers.{number}" for number in range(2)]

    assert report.graphs == 1 and "2 regions are compiled one by one and share 1 graph(s)" in report.notes
    fates = {entry.path: entry.reason for entry in report.linears if entry.status != "fused"}
    assert fates == {"base_model.model.lm_head": "NOT_TRACED"}
    of = {entry.path: entry for entry in whole.linears}
    assert len(report.fused) == 14 and len({entry.path for entry in report.fused}) == 14
    for entry in report.fused:
        one = of[entry.path]
        assert (entry.shape, entry.adapters, entry.operators) == (one.shape, one.adapters, one.operators)
        assert entry.path in report.groups[entry.group].members
    layered = [group for group in whole.groups if not group.members[0].endswith("lm_head")]
    assert sum(group.after.launches for group in report.groups) == sum(group.after.launches for group in layered)
    assert "14 of 14" in report.summary()

    inlined = explain(torch.compile(model, backend="eager"), tokens(1, 3), use_cache=False)
    assert inlined.graphs == 1 and len(inlined.fused) == 15


def test_modules_that_torch_compile_put_in_place():
    """As accelerate's `compile_regions` does."""
    model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()) for _ in range(2)])
    for number in range(2):
        model[number] = torch.compile(model[number], backend="gaws")
    forwards = [block.forward for block in model]
    report = explain(model, torch.randn(2, 8))
    assert {entry.path: entry.status for entry in report.linears} == dict.fromkeys(
        ("0._orig_mod.0", "1._orig_mod.0"), "fused"
    )
    assert "2 regions are compiled one by one and share 1 graph(s)" in report.notes
    assert report.graphs == 1 and [block.forward for block in model] == forwards


def test_a_region_in_a_region_is_part_of_it():
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.nn.Linear(8, 8))
    model[0].compile(backend="gaws")
    model[0][0].compile(backend="gaws")
    assert list(regions(model)) == ["0"]
    report = explain(model, torch.randn(2, 8))
    assert {entry.path: entry.reason for entry in report.linears} == {"0.0": None, "1": "NOT_TRACED"}
