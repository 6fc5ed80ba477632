"""Sums of all-reduces become one, proven over simulated ranks in fp64; what is not linear, or not alone, stays."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_reduce, reduce_scatter_tensor

from gawscompile.analysis.collectives import all_reduces, reduce_scatters, reduction, waits
from gawscompile.analysis.reading import CASTS, aten, is_call
from gawscompile.ir.records import Reason
from gawscompile.passes import join_collectives
from gawscompile.verify.proof import verify_rewrites
from tests import test_containment as containment
from tests.graphs import capture

RANKS, K, N, R = 3, 12, 10, 4
SHARDED = {"weight", "a", "other_a"}
OTHERS: dict[str, Any] = {}


@pytest.fixture(scope="module", autouse=True)
def group():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    OTHERS["group"] = dist.new_group([0, 1])
    yield
    OTHERS.clear()
    dist.destroy_process_group()


def reduced(x, how="sum"):
    return all_reduce(x, how, dist.group.WORLD)


def in_place(x):
    dist.all_reduce(x)
    return x


class Rows(nn.Module):
    """A row-parallel projection of one rank, and what an adapter needs."""

    def __init__(self, forward: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        sizes = {"weight": (N, K), "a": (R, K), "b": (N, R), "other_a": (R, K), "other_b": (N, R), "bias": (N,)}
        for name, size in sizes.items():
            kept = dtype if name in ("weight", "bias") else torch.float32
            self.register_parameter(name, nn.Parameter(torch.randn(size, dtype=kept) / 3))
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


def base(m, x):
    return reduced(nn.functional.linear(x, m.weight))


def lora(m, x, scale=0.5, how="sum"):
    return nn.functional.linear(reduced(nn.functional.linear(x, m.a), how), m.b) * scale


def other(m, x):
    return nn.functional.linear(reduced(nn.functional.linear(x, m.other_a)), m.other_b) / 3


def cast(m, x):
    y = in_place(nn.functional.linear(x, m.weight))
    u = in_place(nn.functional.linear(x.float(), m.a))
    return y + (nn.functional.linear(u, m.b) * 2.0).to(y.dtype)


def mixed(m, x):
    """As PEFT has it by default: fp32 factors beside a bf16 base, and the sum is of fp32."""
    y = in_place(nn.functional.linear(x, m.weight))
    u = in_place(nn.functional.linear(x.float(), m.a))
    return (y + nn.functional.linear(u, m.b) * 2.0).to(y.dtype)


def scattered(m, x, dim=1):
    """As sequence parallelism: each rank gets a part of the tokens."""
    y = reduce_scatter_tensor(nn.functional.linear(x, m.weight), "sum", dim, dist.group.WORLD)
    u = reduce_scatter_tensor(nn.functional.linear(x, m.a), "sum", dim, dist.group.WORLD)
    return y + nn.functional.linear(u, m.b) * 0.5


JOINED = {
    "lora": lambda m, x: base(m, x) + lora(m, x),
    "two adapters": lambda m, x: base(m, x) + lora(m, x) + other(m, x),
    "a bias and a residual": lambda m, x: x[..., :N] + (base(m, x) + m.bias + lora(m, x)),
    "in place": lambda m, x: in_place(nn.functional.linear(x, m.weight)) + lora(m, x),
    "casts": cast,
    "a wider sum": mixed,
    "scattered tokens": scattered,
    "scattered rows": lambda m, x: scattered(m, x.transpose(0, 1), 0),
    "a term twice": lambda m, x: (lambda y: y + y)(base(m, x)) + lora(m, x),
}
HALVES = ("casts", "a wider sum")
"""Of a bf16 base: no wider sum goes to other ranks."""

APART = {
    "an activation in between": lambda m, x: base(m, x) + nn.functional.linear(reduced(x @ m.a.T).relu(), m.b),
    "a bias in between": lambda m, x: base(m, x)
    + nn.functional.linear(nn.functional.linear(reduced(x @ m.a.T), m.b, m.bias), m.b @ m.a[:, :N]),
    "another group": lambda m, x: base(m, x)
    + nn.functional.linear(all_reduce(x @ m.a.T, "sum", OTHERS["group"]), m.b),
    "another operation": lambda m, x: base(m, x) + lora(m, x, how="max"),
    "read by others": lambda m, x: (lambda u: base(m, x) + u @ m.b.T + u.sum())(reduced(x @ m.a.T)),
    "times an activation": lambda m, x: base(m, x) + reduced(x @ m.a.T) @ m.b.T * x[..., :N],
    "only one is reduced": lambda m, x: base(m, x) + x @ m.a.T @ m.b.T,
    "two column-parallel factors": lambda m, x: lora(m, x) + other(m, x),
    "times what is computed": lambda m, x: base(m, x) + reduced(x @ m.a.T) @ m.b.T * torch.ones(2, 6, N).cumsum(0),
    "scattered beside reduced": lambda m, x: reduce_scatter_tensor(base(m, x), "sum", 1, dist.group.WORLD)
    + lora(m, x[:, :2]),
    "a difference": lambda m, x: base(m, x) - lora(m, x),
}


SILENT = ("only one is reduced", "a difference", "two column-parallel factors")
"""Of which nobody would expect one all-reduce, or whose linears say what became of them."""


class Rank(torch.fx.Interpreter):
    """One of several that run the same graph side by side, in fp64."""

    def __init__(self, module: torch.fx.GraphModule, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(module)
        self.rank, self.slots, self.barrier = rank, slots, barrier

    def call_function(self, target: Any, given: Any, kwargs: Any) -> Any:
        if target in (waits(), *CASTS):
            return given[0]
        if target not in (all_reduces(), reduce_scatters()):
            return super().call_function(target, given, kwargs)
        self.slots[self.rank] = given[0]
        self.barrier.wait()
        parts = torch.stack(self.slots)
        self.barrier.wait()
        whole = parts.sum(0) if given[1] == "sum" else parts.amax(0)
        return whole if target is all_reduces() else whole.chunk(RANKS)[self.rank]


def on_ranks(graph: torch.fx.Graph, holder: Any, names: list[str | None]) -> list[Any]:
    """What every rank's graph makes of its own shards."""
    module = torch.fx.GraphModule(holder, graph)
    slots: list[Any] = [None] * RANKS
    barrier = threading.Barrier(RANKS)
    answers: list[Any] = [None] * RANKS

    def one(rank: int) -> None:
        inputs = []
        for at, node in enumerate(graph.find_nodes(op="placeholder")):
            own = rank if names[at] in (*SHARDED, None) else RANKS
            generator = torch.Generator().manual_seed(100 * at + own)
            inputs.append(torch.randn(node.meta["val"].shape, generator=generator, dtype=torch.float64))
        with torch.no_grad():
            answers[rank] = Rank(module, rank, slots, barrier).run(*inputs)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return answers


def collectives(graph: torch.fx.Graph) -> int:
    return sum(reduction(node) is not None for node in graph.nodes)


def captured_of(function: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, list[str | None]]:
    torch.manual_seed(0)
    model = Rows(function, dtype).eval()
    captured = capture(model, torch.randn(2, 6, K, dtype=dtype))
    known = {p.data_ptr(): name for name, p in model.named_parameters()}
    return captured, [known.get(one.data_ptr()) for one in captured.inputs]


@pytest.mark.parametrize("name", JOINED)
def test_one_collective_for_a_sum(name):
    captured, names = captured_of(JOINED[name], torch.bfloat16 if name in HALVES else torch.float32)
    context = captured.until("join_collectives")
    (made,) = (reduction(node) for node in context.graph.nodes if reduction(node))
    sent = {one.meta["val"].dtype for one in (made, made.args[0])}
    assert sent == {torch.bfloat16 if name in HALVES else torch.float32}
    assert collectives(captured.graph) > 1 and collectives(context.graph) == 1
    before = on_ranks(captured.graph, captured.module, names)
    after = on_ranks(context.graph, captured.module, names)
    for one, two in zip(before, after, strict=True):
        torch.testing.assert_close(one[0], two[0], rtol=1e-11, atol=1e-11)
    if name != "a bias and a residual" and "scattered" not in name:  # x is each rank's own, and parts are
        assert all(torch.equal(one[0], after[0][0]) for one in after)


@pytest.mark.parametrize("name", [name for name in JOINED if name != "a term twice"])  # a base that is scaled is left
def test_the_adapter_is_fused_then_and_proven_without_talking_to_others(name, monkeypatch):
    captured, _ = captured_of(JOINED[name], torch.bfloat16 if name in HALVES else torch.float32)
    context = captured.until()
    (entry,) = [one for one in context.record.linears if one.adapters]
    assert entry.status == "fused" and entry.adapters == (2 if name == "two adapters" else 1)
    verify_rewrites(context)
    assert collectives(context.graph) == 1 and not [n for n in context.record.notes if "differ" in n]


def test_a_sum_with_a_symbolic_number_is_no_sum_of_terms(caplog):
    """transformers' positions in a cache are."""

    def forward(m, x):
        return base(m, x) + lora(m, x) + (torch.arange(x.shape[1]) + x.shape[0])[:, None]

    torch.manual_seed(0)
    x = torch.randn(2, 6, K)
    torch._dynamo.mark_dynamic(x, 0)
    captured = capture(Rows(forward).eval(), x, dynamic=None)
    hook = containment.run(captured)
    assert hook.record.passes["join_collectives"] == 1 and not containment.warnings(caplog)


@pytest.mark.parametrize("name", APART)
def test_what_does_not_go_through_a_sum_stays(name):
    captured, _ = captured_of(APART[name])
    context = captured.until("join_collectives")
    assert collectives(context.graph) == collectives(captured.graph)
    said = [note for note in context.record.notes if Reason.COLLECTIVE.value in note]
    assert bool(said) == (name not in SILENT), said


def test_a_join_that_raises_is_undone(monkeypatch, caplog):
    captured, _ = captured_of(JOINED["lora"])

    def broken(context, parts):
        raise RuntimeError("planted")

    monkeypatch.setattr(join_collectives, "_unreduced", broken)
    hook = containment.run(captured)
    assert any(note.startswith("undone: join_collectives, at ") for note in hook.record.notes), hook.record.notes
    assert "join_collectives" not in hook.record.passes and "planted" in caplog.text


def test_a_wrong_join_is_found(monkeypatch, caplog):
    """A bias that moves through the sum would be added once for each rank; an activation is not linear."""
    linear_in = join_collectives._linear_in

    def careless(context, node):
        return 0 if is_call(node, aten.relu.default) else linear_in(context, node)

    monkeypatch.setattr(join_collectives, "_linear_in", careless)
    captured, _ = captured_of(APART["an activation in between"])
    context = captured.until("join_collectives")
    assert collectives(context.graph) == 1
    verify_rewrites(context)
    assert collectives(context.graph) == 2, context.record.notes
    assert any("verify refused the rewrite of" in said for said in containment.warnings(caplog))
