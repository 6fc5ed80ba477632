"""unfold_convolutions: adapters of convolutions are projections of channels."""

from __future__ import annotations

import functools

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gawscompile
from gawscompile.analysis.reading import args
from gawscompile.calibration.measure import graphs_compiled
from gawscompile.ir.records import Reason
from gawscompile.observe.store import RECORDS
from tests.graphs import capture, count, randomise

PROJECT = torch.ops.gaws.project.default
CONVOLUTION = torch.ops.aten.convolution.default
LAST = torch.channels_last


class Net(nn.Module):
    """A normalised image through one convolution, then a nonlinearity and another."""

    def __init__(self, first: nn.Module, second: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = first, second or nn.Identity()

    def forward(self, x):
        return self.second(F.silu(self.first(x.tanh())))


def adapted(model, *, adapters=("default",), **config):
    torch.manual_seed(0)
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, **config)
    model = peft.get_peft_model(model.eval(), settings)
    for name in adapters[1:]:
        model.add_adapter(name, settings)
    model.base_model.set_adapter(list(adapters))
    return randomise(model).eval()


def image(*sizes, seed=0):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def check(model, x, kernels=False):
    """The context after the whole pipeline, whose answers are right, with their strides."""
    captured = capture(model, x, kernels=kernels)
    context = captured.until()
    for got, want in zip(captured.run(context), captured.outputs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert got.stride() == want.stride()
    return context


def operators(context):
    return [entry.operators for entry in context.record.linears if entry.status == "fused"]


def dense(n, k, tail):
    return f"Dense[{n}x{k}] + {tail}"


@pytest.mark.parametrize("memory", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("kernels", [False, True])
def test_one_position_is_a_projection_in_any_memory(memory, kernels):
    model = adapted(Net(nn.Conv2d(16, 24, 1), nn.Conv2d(24, 12, 1, bias=False))).to(memory_format=memory)
    context = check(model, image(2, 16, 6, 5).to(memory_format=memory), kernels)
    assert len(operators(context)) == 2 and all("LowRank(r=4)" in text for text in operators(context))
    assert count(context, CONVOLUTION) == 0
    assert [entry.path.rpartition(".")[2] for entry in context.record.linears] == ["first", "second"]


@pytest.mark.parametrize("kernels", [False, True])
def test_a_base_of_several_positions_is_the_residual(kernels):
    model = adapted(Net(nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 12, 3, stride=2))).to(memory_format=LAST)
    context = check(model, image(2, 16, 9, 9).to(memory_format=LAST), kernels)
    assert len(operators(context)) == 2 and count(context, torch.ops.aten.add.Tensor) == 1  # silu's
    assert all("residual=" in args(node)[2] for node in context.graph.find_nodes(op="call_function", target=PROJECT))
    assert count(context, CONVOLUTION) == 4  # W and A of both


def test_other_memory_and_several_positions_stay_as_they_were():
    model = adapted(Net(nn.Conv2d(16, 24, 3, padding=1)))
    context = check(model, image(2, 16, 6, 6))
    assert not operators(context) and count(context, CONVOLUTION) == 3
    (note,) = context.record.notes
    assert f"first: {Reason.CONVOLUTION.value}: " in note and "channels do not come last in memory" in note


@pytest.mark.parametrize(("kind", "sizes"), [(nn.Conv1d, (7,)), (nn.Conv3d, (3, 2, 4))])
def test_other_dimensions(kind, sizes):
    context = check(adapted(Net(kind(8, 12, 1))), image(2, 8, *sizes))
    assert len(operators(context)) == 1 and count(context, CONVOLUTION) == 0


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}], ids=str)
def test_kinds(config):
    """DoRA's scale of a convolution is a norm over channels and positions."""
    context = check(adapted(Net(nn.Conv2d(48, 64, 1)), **config), image(2, 48, 6, 5), kernels=True)
    assert len(operators(context)) == 1, (context.record.notes, context.record.linears)


@pytest.mark.parametrize("kernel", [1, 3])
def test_lokr(kernel):
    """Of one position it is a chain of mode products; of several both convolutions are the library's."""
    torch.manual_seed(0)
    config = peft.LoKrConfig(r=2, alpha=4, target_modules=["first"])
    net = Net(nn.Conv2d(16, 24, kernel, padding=kernel // 2))
    context = check(randomise(peft.get_peft_model(net.eval(), config)).eval(), image(2, 16, 6, 5), kernels=True)
    assert count(context, CONVOLUTION) == (0 if kernel == 1 else 2)
    assert [text.count("Kronecker") for text in operators(context)] == ([1] if kernel == 1 else [])


def test_several_adapters_and_siblings_are_one_group():
    class Siblings(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Conv2d(16, 24, 1), nn.Conv2d(16, 8, 1)

        def forward(self, x):
            x = x.tanh()
            return self.q(x).tanh(), self.k(x).tanh()

    context = check(adapted(Siblings(), adapters=("default", "other")), image(2, 16, 6, 5))
    assert len(operators(context)) == 2 and all(text.count("LowRank") == 2 for text in operators(context))
    assert len({entry.group for entry in context.record.linears}) == 1


X = image(1, 8, 5, 5)
W, A, B = image(6, 8, 1, 1), image(2, 8, 1, 1, seed=1), image(6, 2, 1, 1, seed=2)
WIDE, HALF, EACH = image(6, 8, 3, 3), image(6, 4, 1, 1), image(6, 1, 1, 1)
TURNED, BACK = image(8, 6, 1, 1), image(2, 6, 1, 1)


def made(x):
    return x[0, :6, 0, :2][..., None, None]


NEAR = {
    "no adapter": lambda x: F.conv2d(x, W) + F.conv2d(x.tanh(), WIDE, padding=1),
    "between the factors": lambda x: F.conv2d(x, W) + F.conv2d(F.conv2d(x, A).relu(), B),
    "padded": lambda x: F.conv2d(x, W, padding=1) + F.conv2d(F.conv2d(x, A), B, padding=1),
    "strided": lambda x: F.conv2d(x, W, stride=2) + F.conv2d(F.conv2d(x, A), B, stride=2),
    "groups": lambda x: F.conv2d(x, HALF, groups=2) + F.conv2d(F.conv2d(x, A), EACH, groups=2),
    "transposed": lambda x: F.conv_transpose2d(x, TURNED) + F.conv_transpose2d(F.conv2d(x, A), BACK),
    "u is read": lambda x: (F.conv2d(x, W) + F.conv2d(u := F.conv2d(x, A), B), u.tanh()),
    "an activation as a weight": lambda x: F.conv2d(x, W) + F.conv2d(F.conv2d(x, A), made(x)),
    "by positions": lambda x: F.conv2d(x, W) * x[:, :1] + F.conv2d(F.conv2d(x, A), B),
    "turned": lambda x: F.conv2d(x, W).transpose(2, 3) + F.conv2d(F.conv2d(x, A), B),
    "the base less the adapter": lambda x: F.conv2d(x, W) - 3 * F.conv2d(F.conv2d(x, A), B),
    "the adapter less the base": lambda x: F.conv2d(F.conv2d(x, A), B) / 3 - F.conv2d(x, W),
    "a vector for both": lambda x: F.conv2d(F.conv2d(x, A), B) * EACH[:, 0] + F.conv2d(x, W) * EACH[:, 0],
    "turned by the model too": lambda x: (
        F.conv2d(y := x.sin(), W) + F.conv2d(F.conv2d(y, A), B),
        y.permute(0, 2, 3, 1) * 2,
    ),
    "in bf16": lambda x: F.conv2d(x.bfloat16(), W.bfloat16()).float() + F.conv2d(F.conv2d(x, A), B),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_are_right(name):
    check(NEAR[name], X)


def test_a_scale_that_widens_stays_where_it_is():
    """A tensor of one dimension promotes its dtype; a projection of mixed dtypes there is none."""
    w, a, b, s = WIDE.bfloat16(), image(2, 8, 3, 3).bfloat16(), B.bfloat16(), torch.full((1,), 3.0)

    def function(x):
        x = x.bfloat16()
        base = F.conv2d(x, w, padding=1).float()
        return base + F.conv2d(F.conv2d(x, a, padding=1), b) * s

    captured = capture(function, X.to(memory_format=LAST))
    context = captured.until()
    assert context.record.passes["unfold_convolutions"] == 1
    (got,) = captured.run(context)
    torch.testing.assert_close(got, captured.outputs[0], rtol=2e-2, atol=2e-1)


def test_images_of_any_size():
    model = adapted(Net(nn.Conv2d(16, 24, 1), nn.Conv2d(24, 12, 1, bias=False)))
    captured = capture(model, image(2, 16, 6, 5), dynamic=True)
    context = captured.until()
    assert len(operators(context)) == 2 and count(context, CONVOLUTION) == 0
    for got, want in zip(captured.run(context), captured.outputs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_what_each_image_shares_is_added_later():
    """A time embedding, of one number for each image and channel, as in a UNet's blocks."""
    model = adapted(Net(nn.Conv2d(16, 24, 1)))
    e = image(2, 24, seed=3)
    captured = capture(lambda x: model.base_model.model.first(x) + e.tanh()[:, :, None, None], image(2, 16, 6, 5))
    context = captured.until()
    assert len(operators(context)) == 1 and count(context, CONVOLUTION) == 0
    torch.testing.assert_close(captured.run(context)[0], captured.outputs[0], rtol=1e-4, atol=1e-4)


def test_one_image_without_a_batch_is_the_library_s():
    """torch gives each convolution a batch of one, and takes it away again."""
    context = check(adapted(Net(nn.Conv2d(16, 24, 1))), image(16, 6, 5))
    assert not operators(context) and count(context, CONVOLUTION) == 3


def test_what_is_no_adapter_is_left_alone():
    """A block of ResNet: its shortcut is a convolution of one position, its third one follows a nonlinearity."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 24, 1)
            self.shortcut = nn.Conv2d(16, 24, 1)

        def forward(self, x):
            return self.c(self.b(self.a(x).relu()).relu()) + self.shortcut(x)

    context = check(Block().eval(), image(2, 16, 6, 5))
    assert count(context, CONVOLUTION) == 4 and "unfold_convolutions" not in context.record.passes


def in_place(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.mul_(-1.7)


def by_data(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = parameter.data * 3


def base_in_place(model):
    model.base_model.model.first.base_layer.weight.add_(0.5)


def replaced(model):
    for layer in (model.base_model.model.first, model.base_model.model.second):
        factor = layer.lora_B["default"]
        factor.weight = nn.Parameter(factor.weight * 0.3 + 0.1)


def other_memory(model):
    model.to(memory_format=torch.contiguous_format)


@pytest.mark.parametrize("way", [functools.partial(torch.compile, backend="gaws"), gawscompile.compile])
@torch.no_grad()
def test_what_changes_between_calls_shows(way):
    """Views of weights are made in every call, and what they are views of may be anywhere then."""
    model = adapted(Net(nn.Conv2d(16, 24, 1), nn.Conv2d(24, 12, 3, padding=1))).to(memory_format=LAST)
    x = image(2, 16, 6, 5).to(memory_format=LAST)
    mark, compiled = len(RECORDS), way(model)
    before, graphs = compiled(x), graphs_compiled()
    (record,) = RECORDS.since(mark)
    assert record.passes["unfold_convolutions"] == 2
    for change in (in_place, by_data, base_in_place, replaced):
        change(model)
        now = compiled(x)
        torch.testing.assert_close(now, model(x), rtol=1e-4, atol=1e-4)
        assert (now - before).norm() > 1e-2 * before.norm(), change
        before = now
    assert graphs_compiled() == graphs
    other_memory(model)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
