"""Timing in turns, tables, and models that share their weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gawscompile.calibration import measure


def test_timing_summarises_and_refuses_nothing():
    timing = measure.Timing.of([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (timing.median, timing.low, timing.high) == (3.0, 2.0, 4.0)
    assert (timing.minimum, timing.maximum, timing.count) == (1.0, 5.0, 5)
    assert measure.Timing.of([7.0]).median == measure.Timing.of([7.0]).high == 7.0
    with pytest.raises(ValueError, match="no samples"):
        measure.Timing.of([])


def test_table_aligns_in_text_and_markdown():
    rows = [["a", "1.0"], ["longer", "12.5"]]
    assert measure.table(["", "ms"], rows) == "          ms\n------------\na        1.0\nlonger  12.5"
    lines = measure.table(["", "ms"], rows, markdown=True).splitlines()
    assert lines[1:3] == ["|--------|-----:|", "| a      |  1.0 |"]


def test_machine_names_what_the_numbers_were_taken_on():
    facts = measure.machine()
    assert facts["torch"] == torch.__version__
    assert facts["cpu"] in measure.describe(facts)
    assert "busy" in measure.describe({**facts, "load": "1.5"})
    assert "busy" not in measure.describe({**facts, "load": "0.1"})


def test_variants_take_turns_and_the_first_step_of_a_turn_is_not_counted():
    calls: list[str] = []

    def variant(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    samples, bare = measure.interleave({"a": lambda: variant("a"), "b": lambda: variant("b")}, 8, 2, ["b"])
    turns = ["".join(calls[at : at + 9]) for at in range(0, 72, 9)]
    assert set(turns) == {"aaabbbbbb", "bbbbbbaaa"}
    assert {name: len(values) for name, values in samples.items()} == {"a": 16, "b": 16}
    assert list(bare) == ["b"] and len(bare["b"]) == 16
    first = calls.index("a") + 1
    assert samples["a"][:2] == [first + 1, first + 2]


def test_a_sharing_copy_has_modules_of_its_own_and_the_same_weights():
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.register_buffer("scale", torch.ones(3))

    model = Tied()
    twin = measure.sharing_copy(model)
    assert twin.first is not model.first
    assert twin.first.weight is model.first.weight is twin.second.weight
    assert twin.scale is model.scale
    twin.first = torch.nn.Identity()
    assert isinstance(model.first, torch.nn.Linear)


def test_groups_with_a_bank_are_timed_with_one_adapter():
    spec = "k=40 x=f32; n=24 w=f32 out=f32 bank(f32); n=9 w=f32 out=f32 lora(r=3 f32 s=2.0)"
    group = SimpleNamespace(program=f"gemv_cpp | {spec}", tokens="1", measured=None)
    measure.measure_groups([group], rounds=3)
    assert group.measured > 0


def test_eager_stays_as_it_is_and_compiling_counts_graphs():
    module = torch.nn.Linear(3, 3)
    assert measure.compiled(module, "eager") is module
    before = measure.graphs_compiled()
    run = measure.compiled(module, "aot_eager", dynamic=False)
    run(torch.ones(1, 3))
    run(torch.ones(1, 3))
    assert measure.graphs_compiled() == before + 1
