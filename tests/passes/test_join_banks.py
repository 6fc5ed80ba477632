"""Which parts of a bank become terms of a projection's sum, and what stays an op of its own, and why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gawscompile.codegen import triton
from gawscompile.ir.banked import UNIT, Use, pack
from gawscompile.ir.records import Reason
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.sums import operator_sum
from gawscompile.ir.types import SpecError
from gawscompile.planning import devices
from gawscompile.planning.targets import TRITON
from gawscompile.runtime import ops
from gawscompile.runtime.banked import BANKED, SCHEDULE, SNAPSHOT, SOURCES, Source
from gawscompile.verify.work import account
from tests.graphs import capture, count

K, N, NUMBER = 24, 16, -1


class Model(nn.Module):
    """Two projections of one activation, and what a bank adds to them, as `forward` has it."""

    def __init__(self, forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.taken = None
        self.q, self.k = nn.Linear(K, N), nn.Linear(K, N, bias=False)
        self.a, self.b = nn.Parameter(torch.randn(3, K)), nn.Parameter(torch.randn(N, 3))
        self.turned = nn.Parameter(torch.randn(K, N) / 4)
        self.register_buffer("pool", torch.randn(64 * UNIT) / 4)
        uses = [[Use(0, 20, 5, 6, 2.0, 1.0)], [], [Use(8, 40, 3, 5, -1.0, 0.5), Use(0, 20, 5, 6, 0.5, 0.5)]]
        self.parts = torch.stack([pack(uses, 2), pack(uses[::-1], 2)])
        self.source = Source()
        self.source.snapshot = lambda rows: self.parts.clone()
        SOURCES[NUMBER] = self.source
        self.register_buffer("state", torch.tensor([NUMBER]))
        self.parts_of = forward

    def forward(self, x):
        self.taken = SCHEDULE(self.state, x.shape[0], 2, 2)
        found = self.parts_of(self, x)
        self.taken = None
        return found

    def bank(self, x, base, bias=None, which=0):
        return BANKED(x, self.pool, self.taken[which], base, bias)

    def with_bank(self, x):
        """`q` with the bank's adapters."""
        q = self.q(x)
        return q + self.bank(x, q, self.q.bias)


def both(self, x):
    k = self.k(x)
    return self.with_bank(x), self.bank(x, k, which=1) + k


def widened(self, x):
    q = self.q(x.double().float())
    return q + self.bank(x, q, self.q.bias)


def turned(self, x):
    y = torch.addmm(self.q.bias, x.view(-1, K), self.turned).view(*x.shape[:-1], N)
    return y + self.bank(x, y, self.q.bias)


TAKEN = {
    "both": both,
    "an epilogue behind it": lambda self, x: x[..., :N] + self.with_bank(x),
    "LoRA after it": lambda self, x: self.with_bank(x) + 2.0 * F.linear(F.linear(x, self.a), self.b),
    "a widened activation": widened,
    "a weight kept as [in, out]": turned,
}


OTHERS = [pytest.param(name, True, marks=pytest.mark.slow) for name in TAKEN if name != "both"]  # a kernel each


@pytest.mark.parametrize(("name", "kernels"), [*((name, False) for name in TAKEN), ("both", True), *OTHERS])
def test_taken(name, kernels):
    model = Model(TAKEN[name])  # it keeps the bank
    captured = capture(model, torch.randn(3, 4, K), kernels=kernels)
    context = captured.until()
    for one, other in zip(captured.run(context), captured.outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not count(context, BANKED)
    assert context.record.passes["join_banks"] == (3 if name == "both" else 2)
    assert count(context, SNAPSHOT) == 1 and not count(context, SCHEDULE)


def test_siblings_group_though_their_parts_of_the_schedule_come_later():
    context = capture(Model(both), torch.randn(3, 4, K)).until()
    (group,) = context.record.groups
    assert len(group.members) == 2 and group.spec.count("bank(f32)") == 2
    assert all(linear.adapters == 1 and "Banked" in linear.operators for linear in context.record.linears)


def read_twice(self, x):
    q = self.q(x)
    return q.exp() + (q + self.bank(x, q, self.q.bias))


def beside_lora(self, x):
    q = self.q(x) + 2.0 * F.linear(F.linear(x, self.a), self.b)
    return q + self.bank(x, q, self.q.bias)


def another_activation(self, x):
    q = self.q(x)
    return q + self.bank(x + 1, q, self.q.bias)


def another_product(self, x):
    q, k = self.q(x), self.k(x)
    return q + self.bank(x, k), k


def another_bias(self, x):
    q = self.q(x)
    return q + self.bank(x, q, self.q.bias + 1)


def scaled(self, x):
    q = self.q(x)
    return torch.add(q, self.bank(x, q, self.q.bias), alpha=2)


LEFT = {
    "another activation": (another_activation, "another activation"),
    "another product": (another_product, "not told what this projection makes"),
    "another bias": (another_bias, "another bias"),
    "a bias untold": (lambda self, x: (q := self.q(x)) + self.bank(x, q), "another bias"),
    "others read the projection": (read_twice, "others read the projection"),
    "beside LoRA": (beside_lora, "other adapters"),
    "no projection": (lambda self, x: self.bank(x, self.k(x)).exp(), "not added to one projection"),
    "scaled": (scaled, "not added to one projection"),
    "broadcast": (lambda self, x: (q := self.q(x))[:1] + self.bank(x, q), "no projection of a generated kernel"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left(name):
    function, why = LEFT[name]
    model = Model(function)
    captured = capture(model, torch.randn(3, 4, K))
    context = captured.until()
    for one, other in zip(captured.run(context), captured.outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert count(context, BANKED) == 1
    assert any(Reason.BANK.value in note and why in note for note in context.record.notes)


def test_rows_that_are_scaled_keep_the_bank_apart():
    def forward(self, x):
        q = self.q.bias * F.linear(x, self.q.weight)
        return q + self.bank(x, q)

    model = Model(forward)
    captured = capture(model, torch.randn(3, 4, K))
    context = captured.until()
    assert count(context, BANKED) == 1 and any("rows are scaled" in note for note in context.record.notes)
    torch.testing.assert_close(captured.run(context)[0], captured.outputs[0], rtol=1e-4, atol=1e-5)


def test_planned_for_a_gpu():
    """Kernels know how many entries a row has, and the schedule stays the op that reads a table."""
    model = Model(both)
    captured = capture(model, torch.randn(3, 4, K))
    with devices.planning_for(devices.GPUS["H100"]):
        context = captured.until("join_banks")
    assert count(context, BANKED) == 0 and count(context, SCHEDULE) == 1 and count(context, SNAPSHOT) == 0
    sums = [node.args[1] for node in context.graph.find_nodes(op="call_function", target=operator_sum)]
    assert [total.banked.width for total in sums] == [2, 2]
    assert TRITON.plans(KernelSpec.parse("k=64 x=bf16; n=32 w=bf16 out=bf16 bank(bf16 x2)"))
    with pytest.raises(SpecError, match="how wide"):
        TRITON.plans(KernelSpec.parse("k=64 x=bf16; n=32 w=bf16 out=bf16 bank(bf16)"))


def test_of_the_pool_a_call_reads_what_adapters_take():
    model = Model(both)
    model.pool = torch.zeros(1 << 20)
    context = capture(model, torch.randn(3, 4, K), kernels=True).until()
    account(context)
    (group,) = context.record.groups
    assert 0 < int(group.after.bytes) < int(group.before.bytes) < model.pool.nbytes


def test_tokens_that_are_no_whole_rows_are_refused():
    model = Model(both)
    context = capture(model, torch.randn(3, 4, K), kernels=True).until()
    (call,) = context.graph.find_nodes(op="call_function", target=ops.OPS[0])
    right = pack([[]] * 3, 2)
    wrong = ((2, right), (3, torch.zeros_like(right)), (3, right[:, :1]), (3, right[..., :4].contiguous()))
    for rows, schedule in wrong:
        operands = [torch.randn(N, K), torch.randn(N), torch.randn(64), schedule]
        operands += [torch.randn(N, K), torch.randn(64), right]
        with pytest.raises(RuntimeError, match="schedule0 does not fit: a bank's adapters are given by row"):
            call.target(torch.randn(rows, 2, K), operands, call.args[2])
    empty = [torch.randn(N, K), torch.randn(N), torch.randn(64), right[:1]]
    empty += [torch.randn(N, K), torch.randn(64), right[:1]]
    assert [y.shape for y in call.target(torch.randn(0, 2, K), empty, call.args[2])] == [(0, 2, N)] * 2
    assert not context.graph.find_nodes(op="call_function", target=operator_sum)


@pytest.mark.parametrize(("tokens", "width"), [(5, 2), (1, 2), (4, 3)])
def test_a_gpu_refuses_them_too(tokens, width):
    spec = KernelSpec.parse(f"k={K} x=f32; n={N} w=f32 out=f32 bank(f32 x2)")
    operands = [torch.randn(N, K), torch.randn(64), pack([[]] * 2, width)]
    with pytest.raises(ValueError, match=r"schedule0 is .* whole rows of the batch"):
        triton.launch(spec, triton.Plan("fused_tile"), torch.randn(tokens, K), operands)
