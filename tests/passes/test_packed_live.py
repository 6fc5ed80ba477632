"""Packed weights that change between calls."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gawscompile.calibration.measure import graphs_compiled
from gawscompile.observe.store import RECORDS
from tests.passes.test_opaque_bases import delta
from tests.passes.test_packed import FACTORS, K, N, Q, R, S, X, codes, numbers, scales


class Quantised(nn.Module):
    """A packed weight as buffers, its LoRA, and where `dora` a magnitude for each of its rows."""

    def __init__(self, dora=False):
        super().__init__()
        self.register_buffer("q", Q.clone())
        self.register_buffer("s", S.clone())
        self.a, self.b = (nn.Parameter(factor.clone()) for factor in FACTORS)
        self.magnitude = nn.Parameter(numbers(N).abs() + 0.5) if dora else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.q.to(x.dtype) * self.s) + delta(x, self.a, self.b)
        if self.magnitude is None:
            return y
        return self.magnitude / (self.q.to(x.dtype) * self.s + self.b @ self.a).norm(dim=1) * y


def codes_in_place(model):
    model.q.copy_(codes(N, K, seed=11))


def one_code_in_place(model):
    model.q[3, 7] = 1 if model.q[3, 7] > 60 else 127


def codes_by_data(model):
    model.q.data = codes(N, K, seed=12)


def codes_replaced(model):
    model.q = codes(N, K, seed=13)


def scales_in_place(model):
    model.s.mul_(1.5)


def scales_replaced(model):
    model.s = model.s * 0.5


def codes_through_numpy(model):
    model.q.numpy()[:] = codes(N, K, seed=14).numpy()


CHANGES = (codes_in_place, one_code_in_place, codes_by_data, codes_replaced, scales_in_place, scales_replaced,
           codes_through_numpy)  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["LoRA", "DoRA"])
def live(request):
    """A model and its compiled form, for all changes: they add up."""
    torch._dynamo.reset()
    model = Quantised(request.param).eval()
    compiled = torch.compile(model, backend="gaws", options={"strict": True})
    with torch.no_grad():
        compiled(X)
    (entry,) = RECORDS.since(len(RECORDS) - 1)[0].linears
    assert entry.status == "fused" and "Packed[int8" in entry.operators and "LowRank" in entry.operators
    assert entry.hoisted == request.param  # DoRA's scale
    return model, compiled


class TestLive:
    @pytest.fixture(autouse=True)
    def forgetful_dynamo(self):
        """Not here: what is compiled once must serve every test."""

    @pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
    @torch.no_grad()
    def test_the_next_call_shows_it(self, live, change):
        model, compiled = live
        before, graphs = compiled(X), graphs_compiled()
        change(model)
        now = compiled(X)
        torch.testing.assert_close(now, model(X), rtol=1e-4, atol=1e-4)
        assert (now - before).abs().max() > 1e-3
        assert graphs_compiled() == graphs


@torch.no_grad()
@pytest.mark.parametrize("way", ["replaced", "by data"])
def test_a_tensor_of_another_shape_is_never_a_wrong_answer(way):
    """Of as many numbers, too: a kernel takes codes of any shape."""
    model = Quantised().eval()
    compiled = torch.compile(model, backend="gaws", options={"strict": True})
    compiled(X)
    for dtype in (torch.uint8, torch.int8):
        shaped = codes(N, K, dtype=dtype, seed=15)
        if way == "replaced":
            model.q = shaped
        else:
            model.q.data = shaped
        torch.testing.assert_close(compiled(X), model(X), rtol=1e-4, atol=1e-4)
    for factors in ((K, N), (N, 2 * K)):  # eager cannot multiply those
        shaped = codes(*factors, seed=16)
        if way == "replaced":
            model.q = shaped
        else:
            model.q.data = shaped
        with pytest.raises(Exception, match=r"(?i)size|shape|must match"):
            compiled(X)
    for name, value in (("q", codes(2 * N, K)), ("s", scales(2 * N, 1)), ("b", nn.Parameter(numbers(2 * N, R)))):
        if way == "replaced" or name == "b":
            setattr(model, name, value)
        else:
            getattr(model, name).data = value
    torch.testing.assert_close(compiled(X), model(X), rtol=1e-4, atol=1e-4)
