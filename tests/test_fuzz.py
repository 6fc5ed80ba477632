"""The fuzzer: some hundred cases of it, and that it would notice."""

from __future__ import annotations

import ast

import pytest
import torch

from gawscompile.passes import fuse_epilogues, recover_operators
from tests.fuzz import data, graphs, judge, passes
from tests.fuzz.__main__ import main
from tests.fuzz.coverage import Coverage
from tests.fuzz.programs import Program
from tests.fuzz.reference import Ran
from tests.fuzz.structure import generate
from tests.graphs import capture

SEED, CASES, MOST = 0, 250, 1000


@pytest.mark.slow  # `.ci/run` fuzzes for half a minute
def test_some_hundred_cases_are_right_and_reach_everything():
    coverage = Coverage()
    for seed in range(SEED, SEED + MOST):  # more than `CASES` where something is still to be reached
        if seed >= SEED + CASES and not coverage.missing(passes.MUST_REACH):
            break
        failure = passes.run(seed, coverage)
        assert failure is None, str(failure)
    assert not coverage.missing(passes.MUST_REACH), coverage.table(passes.MUST_REACH)


def test_a_seed_is_a_program():
    for seed in range(20):
        assert generate(seed) == generate(seed)
        assert repr(passes.Config.of(seed, generate(seed))) == repr(passes.Config.of(seed, generate(seed)))


# ---- it would notice --------------------------------------------------------------------------------------


def first_failure(coverage: Coverage):
    return next(failure for seed in range(100) if (failure := passes.run(seed, coverage)))


def test_a_wrong_pass_is_caught_shrunk_and_shown(monkeypatch):
    scale = recover_operators._scale

    def turned(context, found):
        return scale(context, found._replace(number=-found.number)) if found.number != 1.0 else 1.0

    monkeypatch.setattr(recover_operators, "_scale", turned)
    failure = first_failure(Coverage())
    assert failure.kind == "wrong" and "after recover_operators" in failure.message, str(failure)
    (function,) = [node for node in ast.parse(failure.program).body if isinstance(node, ast.FunctionDef)]
    assert len(function.body) <= 8, failure.program  # a base, perhaps dequantised, A, B, scale, sum, return
    assert f"--level 1 --seed {failure.seed} --cases 1" in str(failure)
    said: list[passes.Outcome] = []
    exec(failure.program, {"print": said.append})
    assert [outcome.kind for outcome in said] == ["wrong"]


def test_a_pass_that_raises_is_a_crash(monkeypatch, capsys):
    def run(graph, context):
        raise KeyError("torch.int64")

    monkeypatch.setattr(passes, "STAGES", {**passes.STAGES, "fuse_epilogues": fuse_epilogues})
    monkeypatch.setattr(fuse_epilogues, "run", run)
    assert main(["--level", "1", "--cases", "3", "--failures", "1"]) == 1
    said = capsys.readouterr().out
    assert "crash: KeyError (test_fuzz.py, run)" in said and "0 wrong, 1 crashes" in said


def test_cases_without_failures_end_well(capsys):
    assert main(["--level", "1", "--cases", "2", "--seed", "1"]) == 0
    said = capsys.readouterr().out
    assert "level 1: 2 cases" in said and "seeds 1 to 2: 0 wrong, 0 crashes" in said and "not reached: plan:" in said


# ---- the judgement ----------------------------------------------------------------------------------------


def ran(*outputs: torch.Tensor, inputs: tuple[torch.Tensor, ...] = ()) -> Ran:
    return Ran(list(outputs), list(inputs))


Y = torch.arange(6.0).view(2, 3)
DIFFERENT = {
    "a copy that is no copy": (ran(Y, Y), ran(Y, Y.clone())),
    "a view that is a copy": (ran(Y, Y[0].clone()), ran(Y, Y[0])),
    "a view of another place": (ran(Y, Y[1]), ran(Y, Y[0])),
    "an input returned": (ran(Y, inputs=(Y,)), ran(Y.clone(), inputs=(Y,))),
    "strides": (ran(Y.T.contiguous().T), ran(Y)),
    "dtype": (ran(Y.double()), ran(Y)),
    "shape": (ran(Y.view(3, 2)), ran(Y)),
    "number of outputs": (ran(Y, Y), ran(Y)),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_structure_is_judged(name):
    ours, theirs = DIFFERENT[name]
    assert judge.structure(ours, theirs) and judge.structure(theirs, ours)
    assert judge.structure(ours, ours) is judge.structure(theirs, theirs) is None


def judged(got: torch.Tensor, want: torch.Tensor, exact: torch.Tensor) -> str | None:
    judgement = judge.Judgement()
    return judgement.add(ran(got), ran(want), ran(exact.double())) or judgement.doubt()


def test_numbers_are_judged():
    exact = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = exact.float()
    assert judged(want, want, exact) is None
    assert judged(want * (1 + 2e-7), want, exact) is None
    assert judged(want * (1 + 1e-4), want, exact)
    assert judged(exact.to(torch.bfloat16), exact.to(torch.bfloat16) * 1.01, exact) is None  # no worse than it was
    nan = want.clone()
    nan[0, 0] = float("nan")
    assert judged(nan, want, exact) and judged(want, nan, nan) and judged(nan, nan, nan) is None
    assert judged(torch.tensor([1]), torch.tensor([2]), torch.tensor([2]))


# ---- the graphs -------------------------------------------------------------------------------------------


def listing(graph: torch.fx.Graph) -> list[str]:
    """A graph's operations with what they make, in no order: functionalisation has one of its own."""
    made = [(node.target, node.meta.get("val")) for node in graph.nodes if node.op == "call_function"]
    return sorted(f"{target} {tuple(v.shape)} {v.dtype}" for target, v in made if isinstance(v, torch.Tensor))


def function_of(program: Program):
    scope: dict = {}
    exec(program.source(), scope)
    return scope["program"]


def test_graphs_are_what_aot_autograd_makes():
    """Of programs that write to nothing; what is functionalised has views made anew in other places."""
    seeds = [seed for seed in range(40) if generate(seed).functional][:12]
    for seed in seeds:
        program = generate(seed)
        captured = capture(function_of(program), *data.tensors(program, 0))
        assert listing(graphs.trace(program).graph) == listing(captured.graph), program.source()


def test_symbols_are_symbols():
    programs = [program for program in map(generate, range(60)) if graphs.may_be_symbolic(program)][:3]
    for program in programs:
        names = graphs.may_be_symbolic(program)
        traced = graphs.trace(program, symbolic=names)
        inputs = list(traced.graph.find_nodes(op="placeholder"))
        symbols = {str(node.meta["val"]) for node in inputs if isinstance(node.meta["val"], torch.SymInt)}
        assert sorted(traced.symbols) == sorted(names) and len(symbols) == len(set(traced.symbols.values()))
        assert symbols <= {str(size) for node in inputs for size in _shape(node)}


def _shape(node: torch.fx.Node) -> tuple:
    found = node.meta["val"]
    return tuple(found.shape) if isinstance(found, torch.Tensor) else ()
