"""Graphs that need gradients: forward and backward of adapted projections, fused, and right."""

from __future__ import annotations

import copy
import math

import peft
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from gawscompile.backend import _refusal
from gawscompile.calibration.measure import graphs_compiled
from gawscompile.ir.records import Reason
from gawscompile.observe.store import RECORDS
from gawscompile.options import Options
from gawscompile.planning import devices
from gawscompile.runtime import ops
from gawscompile.verify.work import total
from tests import peft_kinds
from tests.adapters.common import config as gaws_config
from tests.fuzz import reference
from tests.graphs import capture_joint, count, randomise, small_llama, tokens

STRICT = {"strict": True}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q", "k", "o"]}


class Block(nn.Module):
    """Siblings, what is made of them, and a residual: the smallest model that has it all."""

    def __init__(self, kind: type = nn.Linear, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(width)
        for name in "qko":
            self.add_module(name, kind(width, width))

    def forward(self, x):
        x = x + self.norm(x)
        h = self.norm(x)
        return x + self.o(self.q(h).tanh() * self.k(h).sigmoid())


def adapted(dtype=torch.float32, width=32, kind=nn.Linear, **settings):
    model = peft.get_peft_model(Block(kind, width).to(dtype), peft.LoraConfig(**{**LORA, **settings}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(False)
    return randomise(model.train())


def gradients(model, run, x, step):
    """Of the adapters and of x."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    (run(x) * step).sum().backward()
    return {"x": x.grad, **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}}


def fused(record):
    return sum(entry.status == "fused" and entry.adapters > 0 for entry in record.linears)


# ---- kernels ----------------------------------------------------------------------------------------------


SLOW = pytest.mark.slow


@pytest.mark.parametrize("way", ["float32", *(pytest.param(way, marks=SLOW) for way in ("bfloat16", "autocast"))])
def test_gradients_are_as_exact_as_those_of_eager(way):
    """The geometric mean, over seeds, of our error over eager's, both against fp64."""
    dtype = torch.bfloat16 if way == "bfloat16" else torch.float32
    model = adapted(dtype, 64)
    wide = copy.deepcopy(model).double()
    mark = len(RECORDS)
    compiled = torch.compile(model, backend="gaws", dynamic=False, options={**STRICT, "verify": True})
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    logs = []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        x, step = (torch.randn(2, 40, 64, generator=generator).to(dtype) for _ in range(2))
        with torch.no_grad():
            for name, p in model.named_parameters():
                mean, spread = start[name].float().mean(), start[name].float().std()
                p.copy_(torch.randn(p.shape, generator=generator) * spread + mean)
        wide.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
        want = gradients(wide, wide, x.double(), step.double())
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            ours, theirs = (gradients(model, run, x, step) for run in (compiled, model))
        assert ours.keys() == theirs.keys() == want.keys() and len(want) == 7
        for name in want:
            errors = [(found[name].double() - want[name]).norm().item() for found in (ours, theirs)]
            logs.append(math.log(errors[0] / errors[1]))
    (record,) = RECORDS.since(mark)
    assert record.wrapper.count("runs in C++") == 2 and "of the backward" in record.wrapper
    assert math.exp(sum(logs) / len(logs)) <= 1.25
    if way == "autocast" and not devices.multiplies_in_fp32("bf16"):
        assert fused(record) >= 2  # what reads an fp32 activation
    else:
        assert fused(record) == 6 and record.passes["verify"] >= 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Input #")
def test_gradcheck():
    """Against finite differences, as far as fp32 goes."""
    model = adapted(width=8)
    compiled = torch.compile(model, backend="gaws", dynamic=False, options=STRICT)
    factors = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(1, 3, 8, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: compiled(x), (x, *factors), eps=3e-2, atol=2e-2, rtol=2e-2)


def test_steps_follow_the_optimizer_and_nothing_recompiles():
    """Fused AdamW, accumulation, an eval between steps, and a write through ``.data``; eager is the reference."""
    model = adapted(width=64)  # whose kernels the test above has built
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="gaws", dynamic=False, options=STRICT)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 2, 40, 64, generator=generator) for _ in range(6)]
    losses = []
    for run, own in ((compiled, model), (twin, twin)):
        optimizer = torch.optim.AdamW([p for p in own.parameters() if p.requires_grad], lr=1e-2, fused=True)
        losses.append([])
        for number, batch in enumerate(batches):
            for half in batch:
                loss = run(half).square().mean()
                (loss / 2).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            own.eval()
            with torch.no_grad():
                losses[-1] += [loss.item(), run(batches[0][0]).square().mean().item()]
            own.train()
            if number == 2:
                own.base_model.model.q.lora_B["default"].weight.data *= 1.5
            if number == 1:
                graphs = graphs_compiled()
        if run is compiled:
            assert graphs_compiled() == graphs
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    assert losses[1][0] != losses[1][2]


@pytest.mark.slow  # compiles forward and backward twice; test_warm_start has a forward from the cache
def test_a_backward_from_the_cache_runs_without_python_too():
    """There it comes with the forward, and with the forward's inputs."""
    model, x = adapted(width=64), torch.randn(2, 40, 64)
    options = {**STRICT, "disable": ("sink_scales",)}  # which no other test compiles this model with
    for hits in (0, 1):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        mark = len(RECORDS)
        compiled = torch.compile(model, backend="gaws", dynamic=False, options=options)
        got, want = (gradients(model, run, x, torch.ones_like(x)) for run in (compiled, model))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        (record,) = RECORDS.since(mark)
        assert record.wrapper.count("runs in C++") == 2
        assert torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"] == hits


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gaws", "gawsd", "zflora", "dora"])
def test_fifty_steps_go_as_in_eager(kind):
    """The same batches: losses fall alike, and the factors end up alike."""
    from gawscompile.adapters import ZFLoRAConfig

    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    configs = {
        "zflora": lambda: ZFLoRAConfig(r=4),
        "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=linears),
    }
    config = configs[kind]() if kind in configs else gaws_config(kind, target_modules=linears)
    losses, factors = [], []
    for backend in ("eager", "gaws"):
        torch.manual_seed(0)
        model = peft.get_peft_model(small_llama(layers=1, lora=None), config).train()
        options = {"options": STRICT} if backend == "gaws" else {}
        mark = len(RECORDS)
        run = torch.compile(model, backend=backend, dynamic=False, **options)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
        start = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        losses.append([])
        for step in range(50):
            ids = tokens(2, 12, seed=step % 5)
            loss = run(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses[-1].append(loss.item())
        factors.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    (record,) = RECORDS.since(mark)
    assert sum(entry.status == "fused" for entry in record.linears) >= 7
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0)
    assert sum(losses[0][-5:]) < sum(losses[0][:5])  # of the same batches
    assert (factors[1] - factors[0]).norm() < 0.05 * (factors[0] - start).norm() > 0


def test_switched_off():
    captured = joint(adapted())
    taken_on = {("cpu", None): True, ("cuda", None): False, ("cpu", False): False, ("cuda", True): True}
    for (kind, training), taken in taken_on.items():
        refusal = _refusal(captured.graph, None, Options(training=training), kind)
        assert refusal is None if taken else refusal[0] is Reason.GRADIENTS, (kind, training)


# ---- graphs -----------------------------------------------------------------------------------------------


def exact(captured, context):
    """Every output and every gradient, before and after, in fp64."""
    inputs = [t.double() if t.is_floating_point() else t for t in captured.inputs]
    found = []
    for graph in (captured.graph, context.graph):
        torch.manual_seed(0)
        outputs = reference.run(graph, captured.module, list(inputs), exact=True).outputs
        found.append([out for out in tree_leaves(outputs) if isinstance(out, torch.Tensor)])
    assert len(found[0]) == len(found[1]) > 1
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-9, atol=1e-9)


def joint(model, *shape):
    return capture_joint(model, torch.randn(*(shape or (2, 5, 32)), requires_grad=True))


KINDS = {
    "lora": {},
    "dropout": {"lora_dropout": 0.3},
    "rslora": {"use_rslora": True, "lora_bias": True, "bias": "lora_only"},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("name", KINDS)
def test_kinds(name, kind):
    captured = joint(adapted(kind=kind, fan_in_fan_out=kind is Conv1D, **KINDS[name]))
    context = captured.until()
    exact(captured, context)
    count_ = fused(context.record)
    assert count_ == {"lora": 6, "rslora": 6, "dropout": 3}.get(name, count_) and context.record.groups


def test_two_adapters():
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(**{**LORA, "r": 2}))
    model.base_model.set_adapter(["default", "other"])
    randomise(model)
    captured = joint(model)
    context = captured.until()
    exact(captured, context)
    assert {entry.adapters for entry in context.record.linears if "lora_" not in entry.path} == {2}


@pytest.mark.parametrize("kind", ["gaws", "gawsd"])
def test_gaws(kind):
    from tests.adapters.common import randomise as randomised

    model = randomised(peft.get_peft_model(Block(), gaws_config(kind, target_modules=["q", "k", "o"])).train())
    captured = joint(model)
    context = captured.until()
    exact(captured, context)
    assert fused(context.record) >= 3


OTHERS = {"ADAPTION_PROMPT", "SHADOW", "TRAINABLE_TOKENS"}
"""Kinds that adapt no linears."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in peft_kinds.rows() if name not in OTHERS])
def test_every_kind_of_peft(name):
    model = peft_kinds.adapted(name, Block(), ["q", "k", "o"]).train()
    if not any(p.requires_grad for p in model.parameters()):
        pytest.skip("nothing to train")
    try:
        captured = joint(model)
    except ValueError:
        pytest.skip("Dynamo makes several graphs of it")
    exact(captured, captured.until())


def test_zflora():
    from gawscompile.adapters import ZFLoRAConfig

    model = peft.get_peft_model(small_llama(layers=1, lora=None), ZFLoRAConfig(r=4)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    captured = capture_joint(model, tokens(1, 6), use_cache=False)
    exact(captured, captured.until())


def test_checkpoints_are_computed_again_and_nothing_else_is():
    """A region's tags hold: the backward runs its projections anew, and keeps only what goes into it."""
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch.utils.checkpoint import checkpoint

    model = adapted()
    calls = {}
    for checkpointed in (False, True):

        def run(x, own=checkpointed):
            return checkpoint(model, x, use_reentrant=False) if own else model(x)

        captured = capture_joint(run, torch.randn(2, 5, 32, requires_grad=True))
        context = captured.until("lower")
        exact(captured, context)
        module = torch.fx.GraphModule(captured.module, context.graph)
        forward, back = min_cut_rematerialization_partition(module, captured.inputs, num_fwd_outputs=1)
        calls[checkpointed] = [sum(n.target in ops.OPS for n in part.graph.nodes) for part in (forward, back)]
        saved = [n.meta["val"] for n in forward.graph.output_node().args[0][1:]]
        kept = [v for v in saved if v.shape[:-1].numel() == 10 and v.shape[-1] == 32]
        assert len(kept) <= (1 if checkpointed else 6)
    assert calls[True][0] == calls[False][0] and calls[True][1] > calls[False][1] >= 3


def test_what_is_written_and_launched():
    """Bytes and launches of adapted projections, forward and backward, as traced and as rewritten."""

    class Siblings(nn.Module):
        def __init__(self):
            super().__init__()
            for name in "qkv":
                self.add_module(name, nn.Linear(512, 512, bias=False))

        def forward(self, x):
            return torch.stack([layer(x) for layer in (self.q, self.k, self.v)])

    model = randomise(peft.get_peft_model(Siblings(), peft.LoraConfig(r=16, target_modules=["q", "k", "v"])))
    captured = capture_joint(model, torch.randn(256, 512, requires_grad=True))
    context = captured.until("lower")
    assert count(context, torch.ops.aten.mul.Tensor) == 6  # u and v of three
    before, after = total(captured.graph), total(context.graph)
    assert after.launches < 0.8 * before.launches and int(after.bytes) < 0.7 * int(before.bytes)


def test_inputs_are_no_weights():
    """Where a projection reads a model's input of two dimensions, gradients are products of graph inputs, and still no
    projections."""
    config = peft.LoraConfig(r=4, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(32, 48)), config)
    torch.nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    captured = joint(model, 5, 32)
    context = captured.until()
    exact(captured, context)
    assert len(context.record.linears) == 4  # base and u, in both directions


def test_symbolic_sizes():
    model = adapted()
    captured = capture_joint(model, torch.randn(2, 5, 32, requires_grad=True), dynamic=True)
    assert fused(captured.until().record) >= 3


def test_explain_shows_the_backward():
    from gawscompile.debug.explain import assemble

    context = joint(adapted()).until()
    report = assemble([context.record])
    named = [entry.name for entry in report.linears if entry.adapters]
    assert sorted(named) == sorted(f"base_model.model.{name}{end}" for name in "qko" for end in ("", " (backward)"))
    assert "base_model.model.q (backward)" in str(report) and "base_model.model.q (backward)" in report.to_html()
    assert any(group.members == ["base_model.model.q (backward)"] for group in report.groups)
