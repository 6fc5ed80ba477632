"""split_streams: what is put together only to be taken apart again stays apart."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gawscompile.analysis.reading import aten
from gawscompile.ir.spec import KernelSpec
from gawscompile.verify import proof
from tests.adapters.test_zflora import adapted
from tests.graphs import capture, count, tokens


def test_a_widened_stream_becomes_two():
    captured = capture(adapted("Llama"), tokens(2, 5), use_cache=False)
    context = captured.until("split_streams")
    assert not count(context, aten.split_with_sizes.default) and not count(context, aten.alias.default)
    # two rotary embeddings a layer turn their halves; the streams' concatenations are gone
    assert count(context, aten.cat.default) <= 4 + 1
    torch.testing.assert_close(captured.run(context), captured.outputs)


@pytest.mark.slow  # a deep model, which takes long to trace
def test_a_deep_stream_needs_no_deep_stack():
    def function(h, z):
        stream = torch.cat([h, z], -1)
        for _ in range(400):
            stream = stream + torch.cat([h * 0.01, z * 0.02], -1)
        h, z = stream.split([6, 2], -1)
        return h * 2, z * 3

    captured = capture(function, torch.randn(3, 6), torch.randn(3, 2))
    context = captured.until("split_streams")
    assert not count(context, aten.cat.default)
    torch.testing.assert_close(captured.run(context), captured.outputs)


def test_a_sum_that_two_split_is_made_once():
    def function(h, z):
        stream = torch.cat([h, z], -1) + torch.cat([h.sin(), z.cos()], -1)
        (a, b), (c, d) = stream.split([6, 2], -1), stream.split([6, 2], -1)
        return a * c, b * d

    context = capture(function, torch.randn(3, 6), torch.randn(3, 2)).until("split_streams")
    assert count(context, aten.add.Tensor) == 2


def other_sizes(h, z):
    return [part * 2 for part in torch.cat([h, z], -1).split([4, 4], -1)]


def other_axis(h, z):
    return [part * 2 for part in torch.cat([h, h], 0).split([2, 4], 0)]


def a_sum_with_something_whole(h, z):
    return [part * 2 for part in (torch.cat([h, z], -1) + torch.cat([z, h], -1)).split([6, 2], -1)]


def a_sum_that_broadcasts(h, z):
    return [part * 2 for part in (torch.cat([h, z], -1) + torch.cat([h[:1], z[:1]], -1)).split([6, 2], -1)]


def weighted(h, z):
    return [part * 2 for part in torch.add(torch.cat([h, z], -1), torch.cat([h, z], -1), alpha=3).split([6, 2], -1)]


def mixed_dtypes(h, z):
    return [part * 2 for part in torch.cat([h, z.bfloat16()], -1).split([6, 2], -1)]


def views_that_are_returned(h, z):
    return torch.cat([h, z], -1).split([6, 2], -1)


def a_view_that_is_returned(h, z):
    first, second = torch.cat([h, z], -1).split([6, 2], -1)
    return first.unsqueeze(0), second * 2


def a_slice_that_is_returned(h, z):
    first, second = (torch.cat([h, z], -1) + torch.cat([h.sin(), z], -1)).split([6, 2], -1)
    return first[:, 2:4].transpose(0, 1), second * 2


def a_part_that_is_read_by_strides(h, z):
    first, second = torch.cat([h, z], -1).split([6, 2], -1)
    return torch.as_strided(first, (3, 8), (8, 1)) * 2, second * 2


@pytest.mark.parametrize(
    "function",
    [
        a_view_that_is_returned,
        a_slice_that_is_returned,
        a_part_that_is_read_by_strides,
        other_sizes,
        other_axis,
        a_sum_with_something_whole,
        a_sum_that_broadcasts,
        weighted,
        mixed_dtypes,
        views_that_are_returned,
    ],
)
def test_near_misses_stay(function):
    captured = capture(function, torch.randn(3, 6), torch.randn(3, 2))
    before = [node.target for node in captured.graph.nodes if node.op == "call_function"]
    context = captured.until("split_streams")
    assert [node.target for node in context.graph.nodes if node.op == "call_function"] == before
    got = captured.run(context)
    torch.testing.assert_close(got, captured.outputs)
    assert [out.stride() for out in got] == [out.stride() for out in captured.outputs]


class Beside(nn.Module):
    """W x + s B z"""

    def __init__(self, k: int = 64, r: int = 4, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> None:
        super().__init__()
        self.wide, self.narrow, self.scale = nn.Linear(k, 32).to(dtype), nn.Linear(r, 32, bias=False), scale

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        beside = F.linear(z.to(self.narrow.weight.dtype), self.narrow.weight)
        return self.wide(x) + (beside if self.scale == 1 else self.scale * beside).to(x.dtype)


@pytest.mark.parametrize(
    ("module", "z", "together"),
    [
        (Beside(), (2, 5, 4), True),
        (Beside(dtype=torch.bfloat16), (2, 5, 4), True),
        (Beside(r=16), (2, 5, 16), True),
        (Beside(r=17), (2, 5, 17), False),  # no narrow one beside 64
        (Beside(scale=2.0), (2, 5, 4), True),
        (Beside(), (1, 5, 4), False),  # broadcasts
    ],
)
def test_a_narrow_activations_product_joins_a_wide_ones(module, z, together):
    x = torch.randn(2, 5, 64).to(module.wide.weight.dtype)
    captured = capture(module, x, torch.randn(z).to(x.dtype))
    context = captured.until("fuse_zflora")
    specs = [str(KernelSpec.of(*node.args[:3])) for node in context.graph.nodes if node.name.startswith("project")]
    assert any("given(" in spec for spec in specs) == together, specs
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if x.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(captured.run(context), captured.outputs, **tolerance)


class Parts(nn.Module):
    """Projections of what is taken apart, by `source`, of x."""

    def __init__(self, source):
        super().__init__()
        self.w, self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)
        self.source = source

    def forward(self, x):
        p, q = self.source(x)
        return self.w(p) + 2 * self.b(self.a(p)), q.sum()


@torch.library.custom_op("gaws_tests::only_fp32", mutates_args=())
def only_fp32(x: torch.Tensor) -> torch.Tensor:
    assert x.dtype == torch.float32
    return x.cos()


@only_fp32.register_fake
def _(x):
    return torch.empty_like(x)


SOURCES = {
    "sizes that are symbols": lambda x: x.split([x.shape[1] // 2, x.shape[1] - x.shape[1] // 2], 1),
    "what runs in fp32 alone": lambda x: only_fp32(torch.cat([x, x], -1)).split([64, 64], -1),
}


@pytest.mark.parametrize("name", SOURCES)
def test_what_reads_a_part_is_proven(name):
    """The other part is computed, or drawn where it cannot be."""
    dynamic = name == "sizes that are symbols"
    x = torch.randn(2, 7, 64)
    torch._dynamo.mark_dynamic(x, 1)
    context = capture(Parts(SOURCES[name]), x, dynamic=dynamic or None, kernels=True).until()
    context.complain = pytest.fail
    proof.verify_rewrites(context)
    assert context.record.passes["verify"] >= 1
