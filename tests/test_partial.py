"""Disabled passes and fuel: whatever part of the pipeline runs, the answer is right, and every linear has a reason."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch

from gawscompile import explain
from gawscompile.backend import STAGES
from gawscompile.ir.records import GraphRecord, Reason
from gawscompile.options import OptionError, Options
from gawscompile.passes.context import Context, verify
from gawscompile.verify import unfinished
from tests.fuzz.reference import Refused
from tests.graphs import Pair, capture, without_kernels
from tests.planted import FAULTS, Zoo


@pytest.fixture(scope="module")
def zoo():
    return capture(Zoo().eval(), torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(1)))


def cut(captured, **options) -> Context:
    """The pipeline over a copy of a graph, as the backend runs it."""
    context = Context.of(captured.graph, Options(**options), GraphRecord("test"))
    work = context.graph
    for name, stage in STAGES.items():
        context.stage = name
        if name not in context.options.disable:
            with without_kernels():
                stage.run(work, context)
            verify(context)
    unfinished.finish(context)
    verify(context)
    work.eliminate_dead_code()
    work.lint()
    return context


def right(captured, fuel: int) -> bool:
    try:
        found = captured.run(cut(captured, fuel=fuel))
    except (RuntimeError, Refused):  # so wrong that it cannot even be traced, or that the op would not take it
        return False
    pairs = zip(found, captured.outputs, strict=True)
    return all(torch.allclose(got, want, rtol=2e-4, atol=2e-4) for got, want in pairs)


def check(captured, context: Context) -> None:
    for got, want in zip(captured.run(context), captured.outputs, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
    for entry in context.record.linears:
        assert (entry.status == "fused") == (entry.group is not None) and (entry.status == "fused" or entry.reason)
    ours = [node for node in context.graph.nodes if getattr(node.target, "__module__", "").startswith("gawscompile")]
    assert not ours


@pytest.mark.parametrize("step", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_every_prefix_of_the_pipeline_is_a_right_program(zoo, step):
    whole = cut(zoo)
    assert not whole.ended and whole.record.matches == len(whole.matches) > 60
    fused = []
    for fuel in (*range(0, whole.record.matches, step), whole.record.matches):
        context = cut(zoo, fuel=fuel)
        assert context.record.matches == fuel and bool(context.ended) == (fuel < whole.record.matches)
        assert [stage for stage, _ in context.matches] == [stage for stage, _ in whole.matches[:fuel]]
        check(zoo, context)
        fused.append(sum(entry.status == "fused" for entry in context.record.linears))
    assert fused[0] == 0 and fused == sorted(fused) and fused[-1] >= 11


@pytest.mark.parametrize("name", STAGES)
def test_without_a_pass_the_answer_is_right_and_the_reason_typed(zoo, name):
    context = cut(zoo, disable=(name,))
    check(zoo, context)
    assert name not in {stage for stage, _ in context.matches}
    reasons = {entry.reason for entry in context.record.linears}
    optional = {"join_collectives", "split_streams", "unfold_convolutions", "merge_blocks", "join_banks"}
    optional |= {"hoist_weights", "fuse_epilogues", "fuse_attention", "sink_scales", "gather_summands", "turn_products"}
    optional |= {"join_gradients", "recompute_inputs"}
    assert (Reason.DISABLED.name in reasons) == (name not in optional)
    disabled = [entry for entry in context.record.linears if entry.reason == Reason.DISABLED.name]
    assert all(name in (entry.detail or "") and entry.stage == name for entry in disabled)


FAULTY = {
    "scale dropped": "recover_operators",
    "siblings swapped": "group_siblings",
    "adapters lost by a fused group": "fuse_zflora",
    "residual lost where it is taken": "fuse_epilogues",
    "gate and up swapped": "fuse_epilogues",
}
QUICK = "residual lost where it is taken"
NAMES = [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAULTY]


@pytest.mark.parametrize("name", NAMES)
def test_the_first_wrong_prefix_ends_with_the_faulty_rewrite(zoo, name, monkeypatch):
    """What `gawscompile bisect` rests on: the smallest fuel with a wrong answer names the pass at fault."""
    fault = FAULTS[name]
    module = STAGES[FAULTY[name]]
    edited = types.ModuleType(module.__name__)
    source = Path(module.__file__).read_text()
    exec(compile(source.replace(fault.old, fault.new), module.__file__, "exec"), edited.__dict__)
    monkeypatch.setitem(STAGES, FAULTY[name], edited)
    whole = cut(zoo)
    good, bad = 0, whole.record.matches
    assert right(zoo, fuel=good) and not right(zoo, fuel=bad)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if right(zoo, fuel=middle) else (good, middle)
    stage, nodes = whole.matches[bad - 1]
    assert stage == FAULTY[name] and nodes


def test_compiled_with_many_tokens_unknown():
    """Spelled out with symbolic sizes, through torch.compile: right, and no recompile."""
    model = Pair().eval()
    for options in ({"disable": ["fuse_zflora"]}, {"fuel": 12}):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="gaws", options={"strict": True, **options}, dynamic=True)
        with torch.no_grad():
            for length in (5, 9):
                x = torch.randn(1, length, 32)
                torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_what_is_spelled_out_can_be_proven():
    report = explain(Pair().eval(), torch.randn(1, 3, 32), options={"fuel": 14, "verify": True, "strict": True})
    assert any(note.startswith("verify: ") for note in report.notes) and report.passes["verify"] >= 1


def test_explain_says_what_was_disabled():
    report = explain(Pair().eval(), torch.randn(1, 3, 32), options={"disable": ["recover_operators"]})
    assert {entry.reason for entry in report.linears} == {"DISABLED"} and "DISABLED" in report.summary()
    assert {"q", "k", "o"} <= {entry.path for entry in report.linears}


def test_a_pass_that_does_not_exist_is_refused_with_those_that_do():
    from gawscompile.backend import gaws

    with pytest.raises(OptionError, match=r"no pass 'fuse_zflore'; passes are split_streams.*lower"):
        gaws(torch.fx.symbolic_trace(torch.nn.Linear(2, 2)), [torch.ones(1, 2)], options={"disable": ["fuse_zflore"]})


def test_fuel_of_a_process_is_shared_by_its_graphs(monkeypatch):
    from gawscompile.observe.store import RECORDS

    before = RECORDS.matches()
    monkeypatch.setenv("GAWS_FUEL", str(before + 8))
    spent = []
    for _ in range(2):
        mark = len(RECORDS)
        explain(Pair().eval(), torch.randn(1, 3, 32))
        spent += [record.matches for record in RECORDS.since(mark)]
    assert spent == [8, 0]
    monkeypatch.setenv("GAWS_FUEL", "many")
    with pytest.raises(Exception, match="GAWS_FUEL='many' is not a whole number"):
        explain(torch.nn.Linear(4, 4), torch.ones(1, 4))
