"""Kronecker adapters, however written, become one grouped projection; ΔW is formed nowhere; near misses stay."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from gawscompile.adapters import GAWSConfig, GAWSDConfig
from gawscompile.ir.operators import Kronecker
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.sums import operator_sum
from tests.architectures import ARCHITECTURES
from tests.graphs import capture, small_llama, tokens

K, N, S = 64, 48, 2.0


class Tensors:
    def __init__(self, dtype: torch.dtype = torch.float32, factors: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)

        def make(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, generator=generator) / sizes[-1] ** 0.5

        self.x, self.w, self.bias = (make(2, 3, K) * 8).to(dtype), make(N, K).to(dtype), make(N).to(dtype)
        self.g, self.v = make(12, 16).to(factors), make(16).to(factors)  # I_4 ⊗ G
        self.h, self.u = make(6, 8).to(factors), make(8).to(factors)  # H ⊗ I_8
        self.w1, self.w2 = make(4, 8).to(factors), make(12, 8).to(factors)
        self.w2a, self.w2b = make(12, 2).to(factors), make(2, 8).to(factors)
        self.a, self.b = make(4, K).to(factors), make(N, 4).to(factors)


def gaws(t, x=None):
    x = t.x if x is None else x
    return F.linear(x.to(t.g.dtype).unflatten(-1, (4, 16)), t.g).flatten(-2)


def gawsd(t):
    return F.linear(t.x.to(t.h.dtype).unflatten(-1, (8, 8)).mT.contiguous(), t.h).mT.flatten(-2)


SPELLINGS = {
    "gaws": lambda t: F.linear(t.x, t.w) + gaws(t),
    "gaws, view": lambda t: F.linear(t.x, t.w, t.bias) + F.linear(t.x.view(2, 3, 4, 16), t.g).reshape(2, 3, N),
    "gaws, scaled": lambda t: F.linear(t.x, t.w) - S * gaws(t),
    "gaws, diag": lambda t: F.linear(t.x, t.w) + F.linear(t.x.unflatten(-1, (4, 16)) * t.v, t.g).flatten(-2),
    "gaws, diag in the factor": lambda t: (
        F.linear(t.x, t.w) + F.linear(t.x.unflatten(-1, (4, 16)), t.g * t.v).flatten(-2)
    ),
    "gaws, matmul": lambda t: t.x @ t.w.T + (t.x.unflatten(-1, (4, 16)) @ t.g.T).flatten(-2),
    "gaws-d": lambda t: F.linear(t.x, t.w) + gawsd(t),
    "gaws-d, diag": lambda t: (
        F.linear(t.x, t.w) + F.linear(t.x.unflatten(-1, (8, 8)).mT.contiguous(), t.h * t.u).mT.flatten(-2)
    ),
    "both": lambda t: F.linear(t.x, t.w) + gaws(t) + gawsd(t),
    "kron": lambda t: F.linear(t.x, t.w) + F.linear(t.x, torch.kron(t.w1, t.w2) * S),
    "kron, scaled later": lambda t: F.linear(t.x, t.w) + S * F.linear(t.x, torch.kron(t.w1, t.w2)),
    "kron in the base": lambda t: F.linear(t.x, t.w + S * torch.kron(t.w1, t.w2), t.bias),
    "kron of factors": lambda t: F.linear(t.x, t.w) + F.linear(t.x, torch.kron(t.w1, t.w2a @ t.w2b)),
    "beside a LoRA": lambda t: F.linear(t.x, t.w) + gaws(t) + S * F.linear(F.linear(t.x, t.a), t.b),
    "two stages by hand": lambda t: (
        F.linear(t.x, t.w)
        + F.linear(F.linear(t.x.unflatten(-1, (8, 8)), t.w2b), t.w2a).mT.matmul(t.w1.T).mT.flatten(-2)
    ),
}


def call(function, tensors, **settings):
    names = list(vars(tensors))

    def run(*values):
        t = object.__new__(Tensors)
        vars(t).update(zip(names, values, strict=True))
        return function(t)

    return capture(run, *vars(tensors).values(), **settings)


def kroneckers(context):
    sums = [node.args[1].terms for node in context.graph.find_nodes(op="call_function", target=operator_sum)]
    return sum(isinstance(term, Kronecker) for terms in sums for term in terms)


def right(captured, context, loose=1e-5):
    for got, want in zip(captured.run(context), captured.outputs, strict=True):
        torch.testing.assert_close(got, want, rtol=loose, atol=loose * want.abs().max().item())


def dense_updates(context, sizes=(N, K)):
    """Nodes that hold a whole ΔW."""
    found = [node for node in context.graph.nodes if node.op == "call_function"]
    values = [node.meta["val"] for node in found if isinstance(node.meta.get("val"), torch.Tensor)]
    return [value for value in values if tuple(value.shape) in (sizes, sizes[::-1])]


ON_KERNELS = ("gaws, diag", "both", "two stages by hand")


@pytest.mark.parametrize("name", SPELLINGS)
def test_recovered_fused_and_right(name):
    captured = call(SPELLINGS[name], Tensors(), kernels=name in ON_KERNELS)
    assert kroneckers(captured.until("recover_operators")) == (2 if name == "both" else 1)
    context = captured.until()
    right(captured, context)
    (group,) = context.record.groups
    assert "kron(" in group.spec and not dense_updates(context)


@pytest.mark.parametrize("name", ["gaws", "gaws-d", "both"])
def test_fp32_factors_over_a_bf16_base(name):
    captured = call(lambda t: SPELLINGS[name](t).to(t.x.dtype), Tensors(torch.bfloat16))
    context = captured.until()
    assert "x=bf16" in context.record.groups[0].spec and " f32 s=" in context.record.groups[0].spec
    right(captured, context, 2e-2)


NEAR_MISSES = {
    "not turned back": lambda t: (
        F.linear(t.x, t.w) + F.linear(t.x.unflatten(-1, (8, 8)).mT.contiguous(), t.h).flatten(-2)
    ),
    "slices in another order": lambda t: F.linear(t.x, t.w) + gaws(t, t.x.unflatten(-1, (4, 16)).flip(-2).flatten(-2)),
    "slices averaged": lambda t: (
        F.linear(t.x, t.w) + F.linear(t.x.unflatten(-1, (4, 16)), t.g).mean(-2).repeat(1, 1, 4)
    ),
    "a G for each slice": lambda t: (
        F.linear(t.x, t.w)
        + torch.einsum("bsni,noi->bsno", t.x.unflatten(-1, (4, 16)), torch.stack([t.g, t.g + 1, t.g - 1, t.g])).flatten(
            -2
        )
    ),
    "bias on G": lambda t: F.linear(t.x, t.w) + F.linear(t.x.unflatten(-1, (4, 16)), t.g, t.g[:, 0]).flatten(-2),
    "gelu between": lambda t: F.linear(t.x, t.w) + F.gelu(F.linear(t.x.unflatten(-1, (4, 16)), t.g)).flatten(-2),
    "another activation": lambda t: F.linear(t.x, t.w) + gaws(t, t.x.sin()),
    "residual of the slices": lambda t: (
        F.linear(t.x, t.w)
        + (F.linear(t.x.unflatten(-1, (4, 16)), t.g) + t.x.unflatten(-1, (4, 16))[..., :12]).flatten(-2)
    ),
    "tokens and slices mixed": lambda t: (
        F.linear(t.x, t.w) + F.linear(t.x.unflatten(-1, (4, 16)).transpose(1, 2).reshape(2, 3, 4, 16), t.g).flatten(-2)
    ),
    "no base": gaws,
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name):
    captured = call(NEAR_MISSES[name], Tensors())
    assert kroneckers(captured.until("recover_operators")) == 0
    right(captured, captured.until())


def test_a_kron_that_costs_more_than_its_dense_matrix_is_left_alone():
    generator = torch.Generator().manual_seed(0)
    w1, w2 = (torch.randn(*sizes, generator=generator) for sizes in ((1, 1), (N, K)))
    function = lambda x, w, a, b: F.linear(x, w) + F.linear(x, torch.kron(a, b))  # noqa: E731
    captured = capture(function, torch.randn(3, K), torch.randn(N, K), w1, w2)
    context = captured.until()
    assert any("FACTOR_SHAPE" in note for note in context.record.notes)
    assert [entry.status for entry in context.record.linears] == ["fused", "rejected"]  # the base alone
    right(captured, context)


def parameters(*sizes):
    generator = torch.Generator().manual_seed(len(sizes))
    return [torch.nn.Parameter(torch.randn(*size, generator=generator) / 3, requires_grad=False) for size in sizes]


def of_module(function, x, *sizes):
    """The graph of ``function(x, *parameters)``, its weights parameters of a module."""

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = torch.nn.ParameterList(parameters(*sizes))

        def forward(self, x):
            return function(x, *self.p)

    return capture(Module(), x)


def lora_of(x, a, b):
    return F.linear(F.linear(x, a), b)


def heads_first(x, w):
    return F.linear(x, w).unflatten(-1, (6, 4)).mT


REGROUPED = {
    "split and turned": (lambda x, w: F.linear(x, w).unflatten(-1, (6, 4)).mT, [(24, 24)]),
    "split, turned and cut": (lambda x, w: heads_first(x, w)[:, :2], [(24, 24)]),
    "channels shuffled": (lambda x, w, v: F.linear(heads_first(x, w).flatten(-2), v), [(24, 24), (12, 24)]),
    "heads of pooled activations": (lambda x, w: F.linear(x, w).view(24, 6, 4).transpose(1, 2), [(24, 24)]),
    "sum of turned halves": (
        lambda x, w, g: heads_first(x, w) + F.linear(x.unflatten(-1, (6, 4)), g).mT,
        [(24, 24), (4, 4)],
    ),
    "outer product in a weight": (lambda x, w, u, v: F.linear(x, w + u * v), [(24, 24), (24, 1), (24,)]),
    "outer product as a weight": (lambda x, w, u, v: F.linear(x, w) + x @ (u * v), [(24, 24), (24, 1), (24,)]),
    "tokens taken for features": (
        lambda x, w, a, b, g: F.linear(x, w) + F.linear(lora_of(x, a, b).T.reshape(24, 4, 6), g).flatten(-2),
        [(24, 24), (3, 24), (24, 3), (6, 6)],
    ),
    "columns split": (
        lambda x, w, a, b: F.linear(x, w).T.view(4, 6, -1) + lora_of(x, a, b).T.view(4, 6, -1),
        [(24, 24), (3, 24), (24, 3)],
    ),
    "columns as a sum's layout": (
        lambda x, w, a, b: (w @ x.cos().T).T + lora_of(x.cos(), a, b),
        [(24, 24), (3, 24), (24, 3)],
    ),
    "columns, then a view": (
        lambda x, w, a, b: (F.linear(x, w).T + lora_of(x, a, b).T).T.reshape(-1),
        [(24, 24), (3, 24), (24, 3)],
    ),
    "columns of both": (lambda x, w, a, b: F.linear(x, w).T + lora_of(x, a, b).T, [(24, 24), (3, 24), (24, 3)]),
    "a sum that is given back": (
        lambda x, e, w, g: F.linear(x, e) + F.linear(F.linear(x, w).unflatten(-1, (4, 6)), g).flatten(-2),
        [(24, 24), (24, 24), (6, 6)],
    ),
    "bias on the slices": (lambda x, g, b: F.linear(x.unflatten(-1, (4, 6)), g, b), [(6, 6), (6,)]),
    "scaled by infinity": (
        lambda x, w, a, b: F.linear(x, w) + lora_of(x, a, b) * float("inf"),
        [(24, 24), (3, 24), (24, 3)],
    ),
}


@pytest.mark.parametrize("name", REGROUPED)
def test_regrouped_features_come_out_as_eagers_values_and_strides(name):
    function, sizes = REGROUPED[name]
    x = torch.randn(24, 24, generator=torch.Generator().manual_seed(9))
    captured = of_module(function, x, *sizes)
    context = captured.until()
    right(captured, context, 1e-4)
    assert [out.stride() for out in captured.run(context)] == [out.stride() for out in captured.outputs]
    assert context.record.linears  # none without a record


def test_adapters_on_slices_have_the_slices_projection_as_their_base():
    def per_head(x, g, a, c, b):
        y = x.unflatten(-1, (4, 16))
        return F.linear(y, g) + S * lora_of(y, a, c), F.linear(y, g, b) + F.linear(y, c @ a)

    captured = of_module(per_head, torch.randn(2, 5, 64), (16, 16), (2, 16), (16, 2), (16,))
    context = captured.until()
    assert [entry.adapters for entry in context.record.linears] == [1, 1]
    right(captured, context)


def adapted(model, kind):
    """`model` with a Kronecker adapter on every linear that PEFT finds, its factors random."""
    from peft import LoKrConfig, get_peft_model

    configs = {
        "gaws": lambda: GAWSConfig(input_splits=4, diag=True, target_modules="all-linear", init_weights="none"),
        "gawsd": lambda: GAWSDConfig(input_split_dim=8, output_split_dim=8, target_modules="all-linear"),
        "lokr": lambda: LoKrConfig(r=2, alpha=4, target_modules="all-linear", init_weights=False),
    }
    model = get_peft_model(copy.deepcopy(model), configs[kind]()).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@pytest.mark.parametrize("kind", ["gaws", *(pytest.param(one, marks=pytest.mark.slow) for one in ("gawsd", "lokr"))])
@pytest.mark.parametrize(
    "name", ["Llama", *(pytest.param(one, marks=pytest.mark.slow) for one in ("GPT-2", "RoBERTa", "T5"))]
)
def test_every_adapter_of_a_model_is_fused(name, kind):
    architecture = ARCHITECTURES[name]
    if (name, kind) == ("GPT-2", "lokr"):
        pytest.skip("PEFT has no LoKr for Conv1D")
    model = adapted(architecture.make().eval(), kind)
    captured = capture(model, kernels=True, **architecture.inputs(), **architecture.calls)
    context = captured.until()
    entries = [entry for entry in context.record.linears if entry.adapters]
    assert [entry.status for entry in entries] == ["fused"] * architecture.adapted
    assert sum(spec.count("kron(") for spec in (group.spec for group in context.record.groups)) == architecture.adapted
    right(captured, context, 1e-4)


@pytest.mark.slow
def test_any_number_of_tokens():
    captured = capture(adapted(small_llama(layers=1, lora=None), "gawsd"), tokens(2, 5), use_cache=False, dynamic=True)
    context = captured.until()
    specs = [KernelSpec.parse(group.spec) for group in context.record.groups]
    assert sum(bool(p.kronecker) for spec in specs for p in spec.projections) == 7
    right(captured, context, 1e-4)
