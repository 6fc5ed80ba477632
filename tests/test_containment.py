"""A rewrite that raises, or that breaks the graph, is undone; its linear says so, and all other rewrites stand."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from gawscompile import backend
from gawscompile.backend import STAGES, GawsPass
from gawscompile.ir.records import GraphRecord
from gawscompile.options import Options
from gawscompile.passes import recover_operators
from gawscompile.passes.context import Context, Rewrite
from gawscompile.verify import containment
from tests.graphs import Captured, capture, without_kernels
from tests.planted import Zoo

LINEARS = {"q", "k", "o"}
STAGES_OF_GROUPS = {"group_siblings", "fuse_zflora", "choose_plan", "lower"}


class Adapted(torch.nn.Linear):
    """W x + 2 B (A x)"""

    def __init__(self) -> None:
        super().__init__(64, 64)
        self.a, self.b = torch.nn.Linear(64, 4, bias=False), torch.nn.Linear(4, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 2.0 * self.b(self.a(x))


class Named(torch.nn.Module):
    """The zoo, in which nearly every pass finds something, a convolution with an adapter, and linears that are modules:
    q and k of one activation, and o."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.zoo = Zoo()
        self.q, self.k, self.o = (Adapted() for _ in range(3))
        self.c, self.d, self.e = (torch.nn.Conv1d(*sizes, 1, bias=False) for sizes in ((64, 64), (64, 4), (4, 64)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.asinh()
        image = x.mT
        return *self.zoo(x), x + self.o(self.q(y).tanh() * self.k(y)), self.c(image) + 2.0 * self.e(self.d(image))


@pytest.fixture(scope="module")
def zoo() -> Captured:
    return capture(Named().eval(), torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(1)))


def run(captured: Captured, **options: Any) -> GawsPass:
    """The backend's pass over a captured graph; the answers of what it makes of that are right."""
    module = torch.fx.GraphModule(captured.module, torch.fx.Graph())
    module.graph.output(module.graph.graph_copy(captured.graph, {}))
    hook = GawsPass(Options(**options), "key", "cpu", False, captured.stored)
    with without_kernels():
        hook(module.graph)
    module.graph.lint()
    found = captured.run_graph(module.graph)
    for got, want in zip(found, captured.outputs, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
    for entry in record_of(hook).linears:
        assert (entry.status == "fused") == (entry.group is not None) and (entry.status == "fused" or entry.reason)
    return hook


def record_of(hook: GawsPass) -> GraphRecord:
    assert hook.record is not None
    return hook.record


def fused(hook: GawsPass) -> set[str]:
    return {entry.path for entry in record_of(hook).linears if entry.status == "fused"}


def failed(hook: GawsPass) -> set[str]:
    return {entry.path for entry in record_of(hook).linears if entry.reason == "INTERNAL_ERROR"}


def left(hook: GawsPass) -> set[str]:
    """Of q, k and o those that failed, as a whole, and those whose own matmul stays, while the adapter is fused."""
    kept = {entry.path for entry in record_of(hook).linears if entry.operators.startswith("Opaque")}
    return {path.partition(".")[0] for path in failed(hook) | kept} & LINEARS


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "gawscompile" and r.levelno >= logging.WARNING]


@pytest.fixture(scope="module")
def clean(zoo) -> tuple[set[str], list[tuple[Rewrite, set[str]]]]:
    """What is fused where nothing fails, and every rewrite with the modules that it is of."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        real = Context.allows

        def noted(self: Context, *nodes: torch.fx.Node) -> bool:
            allowed = real(self, *nodes)
            origins = [next(n for n in zoo.graph.nodes if n.name == name) for name in self.under_way.names]
            paths = {self.module_path(origin) for origin in origins}
            grouped = {"q", "k"} if "q" in paths and self.stage in STAGES_OF_GROUPS else set()
            found.append((self.under_way, paths | grouped))
            return allowed

        patch.setattr(Context, "allows", noted)
        return fused(run(zoo)), found


def plant(monkeypatch, wanted: Rewrite, fault: Any) -> None:
    """`fault(context)` is called in the midst of a rewrite: when it erases what it replaced, or is done."""
    for name in ("erase", "matched"):
        real = getattr(Context, name)

        def planted(self: Context, *args: Any, real: Any = real) -> None:
            if self.under_way == wanted:
                fault(self)
            real(self, *args)

        monkeypatch.setattr(Context, name, planted)


def raises(context: Context) -> None:
    raise KeyError("planted")


def breaks(context: Context) -> None:
    """The graph, so that `verify` finds it."""
    mine = [node for node, rewrite in context.touched.items() if rewrite == context.under_way]
    first = next(node for node in mine if node.op == "call_function")
    context.graph.output_node().prepend(first)


GRADIENTS = {"sink_scales", "gather_summands", "turn_products", "join_gradients", "recompute_inputs"}
ELSEWHERE = {"join_collectives", *GRADIENTS}
"""Passes that match nothing in the zoo."""


@pytest.mark.parametrize("stage", [name for name in STAGES if name not in ELSEWHERE])
def test_a_rewrite_that_raises_is_undone(zoo, clean, stage, monkeypatch, caplog):
    all_fused, rewrites = clean
    mine = [(rewrite, paths) for rewrite, paths in rewrites if rewrite.stage == stage]
    wanted, paths = next(((r, p) for r, p in mine if p <= LINEARS), mine[len(mine) // 2])
    plant(monkeypatch, wanted, raises)
    hook = run(zoo)
    (said,) = warnings(caplog)
    assert f"{stage}, at " in said and "planted" in said and "GAWS_STRICT=1" in said
    assert any(note.startswith(f"undone: {stage}, at ") for note in record_of(hook).notes)
    if paths <= LINEARS:
        assert any(f"{stage}, at {path}" in said for path in paths)
        if stage != "fuse_epilogues":  # the linear is fused without
            assert left(hook) == paths and fused(hook) >= all_fused - paths
    assert len(fused(hook) & all_fused) >= len(all_fused) - 2
    assert record_of(hook).groups


@pytest.mark.parametrize("stage", ["canonicalize", "recover_operators", "group_siblings", "fuse_zflora"])
def test_a_rewrite_that_breaks_the_graph_is_undone(zoo, clean, stage, monkeypatch, caplog):
    all_fused, rewrites = clean
    wanted, paths = [(r, p) for r, p in rewrites if r.stage == stage and p <= LINEARS][-1]
    plant(monkeypatch, wanted, breaks)
    hook = run(zoo)
    (said,) = warnings(caplog)
    assert f"{stage}, at " in said and "VerifierError" in said
    assert left(hook) == paths and fused(hook) >= all_fused - paths


@pytest.mark.parametrize("function", ["form_of", "refusal"])
def test_what_cannot_be_looked_at_is_left(zoo, clean, function, monkeypatch, caplog):
    all_fused, _ = clean
    real = getattr(recover_operators, function)

    def broken(*given: Any) -> Any:
        node = next(one for one in given[::-1] if isinstance(one, torch.fx.Node))
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if stack and stack[-1][0].endswith(".o"):
            raise KeyError("planted")
        return real(*given)

    monkeypatch.setattr(recover_operators, function, broken)
    hook = run(zoo)
    (said,) = warnings(caplog)
    assert "recover_operators, at o: KeyError: 'planted'" in said
    assert "o" in failed(hook) and fused(hook) >= all_fused - {"o"}


def test_several_that_fail_are_undone_and_said_in_one_warning(zoo, clean, monkeypatch, caplog):
    _, rewrites = clean
    for stage in ("canonicalize", "recover_operators", "fuse_zflora"):
        plant(monkeypatch, next(r for r, paths in rewrites if r.stage == stage and paths == {"o"}), raises)
    plant(monkeypatch, next(r for r, paths in rewrites if r.stage == "group_siblings" and "q" in paths), raises)
    hook = run(zoo)
    (said,) = warnings(caplog)
    assert said.count("planted") >= 2
    assert left(hook) == LINEARS and record_of(hook).groups


def test_where_too_many_fail_the_graph_is_left(zoo, monkeypatch, caplog):
    rounds = []

    def broken(context: Context, *_: Any) -> None:
        rounds.append(context)
        raise KeyError("planted")

    monkeypatch.setattr(recover_operators, "_replaced", broken)
    monkeypatch.setattr(containment, "ROUNDS", 3)
    hook = run(zoo)
    (said,) = warnings(caplog)
    assert "This graph is left to Inductor" in said and len(rounds) == 4
    assert not fused(hook) and not record_of(hook).groups


@pytest.mark.parametrize("stage", ["split_streams", "recover_operators", "lower"])
def test_where_nothing_can_be_named_the_graph_is_left(zoo, stage, monkeypatch, caplog):
    def broken(graph: torch.fx.Graph, context: Context) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(STAGES[stage], "run", broken)
    hook = run(zoo)
    (said,) = warnings(caplog)
    assert f"{stage}, at no node in particular: KeyError" in said and "This graph is left to Inductor" in said
    assert not fused(hook)


def test_strict_raises(zoo, clean, monkeypatch):
    _, rewrites = clean
    plant(monkeypatch, rewrites[-1][0], raises)
    with pytest.raises(KeyError, match="planted"):
        run(zoo, strict=True)


def test_beside_fuel_and_disabled_passes(zoo, clean, monkeypatch):
    _, rewrites = clean
    plant(monkeypatch, next(r for r, paths in rewrites if r.stage == "recover_operators" and paths == {"o"}), raises)
    for options in ({"fuel": len(rewrites) - 5}, {"disable": ("group_siblings",)}):
        hook = run(zoo, **options)
        reasons = {entry.path: entry.reason for entry in record_of(hook).linears}
        assert reasons["o"] == "INTERNAL_ERROR"
        assert {"fuel": "FUEL", "disable": "DISABLED"}[next(iter(options))] in reasons.values()


def test_nothing_runs_twice_where_nothing_fails(zoo, monkeypatch, caplog):
    runs = []
    real = backend.GawsPass.rewrite
    monkeypatch.setattr(GawsPass, "rewrite", lambda self, *given: (runs.append(1), real(self, *given))[1])
    hook = run(zoo)
    assert len(runs) == 1 and not warnings(caplog) and not failed(hook)
    assert not any("undone" in note for note in record_of(hook).notes)
