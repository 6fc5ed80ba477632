"""Quantised weights, tensors of a subclass that are made of others: watched as parameters are, and called directly."""

from __future__ import annotations

import pytest
import torch

from gawscompile.calibration.measure import graphs_compiled
from gawscompile.watch import unchanged
from gawscompile.watch.sources import is_made_of_attributes
from tests.runtime.test_direct import compiled, deciding, directly
from tests.test_quantised import CLOSE, quantised, swapped

pytestmark = pytest.mark.skipif(not unchanged.available(), reason="no watch on this Python")

__all__ = ["directly"]


def weight_of(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer().weight


class Checks:
    """How often guards were checked in full."""

    def __init__(self, monkeypatch):
        self.count = 0
        plain = unchanged.Unchanged._all_hold

        def counting(guard, scope):
            self.count += 1
            return plain(guard, scope)

        monkeypatch.setattr(unchanged.Unchanged, "_all_hold", counting)


def _codes_anew(weight):
    weight.qdata = -weight.qdata


def _codes_elsewhere(weight):
    weight.qdata.data = -weight.qdata


def _codes_in_place(weight):
    weight.qdata.neg_()


def _scales(weight):
    weight.scale = weight.scale * 2


def _scales_of_another_type(weight):
    weight.scale = weight.scale.double()


def _blocks_in_place(weight):
    weight.block_size[0] = 2


LIVE = (_codes_in_place, _codes_elsewhere)
CHANGES = {_codes_anew: 0, _scales: 0, _scales_of_another_type: 1, _blocks_in_place: 1}
"""Those after which guards are checked, and how many graphs are compiled then."""


def test_a_decode_step_on_int8_goes_directly_and_follows_every_change(directly, monkeypatch):
    model = quantised("int8", layers=1)
    checks = Checks(monkeypatch)
    _, check = deciding(model, compiled(model))
    for _ in range(6):
        check()
    before, checked = directly[0], checks.count
    assert before >= 2
    check()
    assert directly[0] == before + 1 and checks.count == checked
    for change in (*LIVE, *CHANGES):
        graphs, before, checked = graphs_compiled(), directly[0], checks.count
        change(weight_of(model))
        check()
        assert (checks.count > checked) is (change in CHANGES), change.__name__
        for _ in range(4):
            check()
        assert graphs_compiled() == graphs + CHANGES.get(change, 0), change.__name__
        assert directly[0] >= before + 2, change.__name__


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "bnb-int8", "hqq8"])
def test_other_formats_go_directly_too(kind, directly):
    """Parameters of other classes, some with a ``__torch_function__``; codes in buffers, scales in other objects."""
    model = quantised(kind, layers=1)
    run = compiled(model)
    decoder, _ = deciding(model, run)

    def logits(by):
        decoder.seek()
        decoder.run = by
        return decoder.step(5).clone()

    before = logits(run)
    for _ in range(5):
        assert torch.equal(logits(run), before)
    count = directly[0]
    assert count >= 2
    swapped(model, -1.7)
    after = logits(run)
    assert directly[0] == count + 1 and (after - before).abs().max() > 1e-2
    torch.testing.assert_close(after, logits(model), rtol=CLOSE.get(kind, 1e-4), atol=CLOSE.get(kind, 1e-4))


class Pair(torch.Tensor):
    """A tensor of a subclass that is made of two."""

    @staticmethod
    def __new__(cls, one, other, told):
        return torch.Tensor._make_wrapper_subclass(cls, one.shape, dtype=one.dtype)

    def __init__(self, one, other, told):
        self.one, self.other, self.told = one, other, told

    def __tensor_flatten__(self):
        return ["one", "other"], {"told": self.told, "dtype": self.dtype}

    @staticmethod
    def __tensor_unflatten__(inner, told, size, stride):
        return Pair(*inner.values(), told["told"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


class Telling(Pair):
    def __tensor_flatten__(self):
        return ["one", "other"], {"told": self.told, "length": len(self.told)}


class Giving(Pair):
    def __getattribute__(self, name):
        return super().__getattribute__(name)


def test_what_says_more_of_itself_than_its_attributes_is_left_to_dynamo():
    one, other = torch.randn(3), torch.randn(3)
    for told in (2.0, "text", None, [1, 2], (1, 2), torch.float16):
        assert is_made_of_attributes(Pair(one, other, told))
    for told in ({1: 2}, [[1, 2]], ([1, 2],)):
        assert not is_made_of_attributes(Pair(one, other, told))
    assert not is_made_of_attributes(Telling(one, other, "text"))
    assert not is_made_of_attributes(Giving(one, other, 2.0))
    assert not is_made_of_attributes(Pair(one, Pair(one, other, 2.0), 2.0))
    assert not is_made_of_attributes(one) and not is_made_of_attributes(torch.nn.Parameter(one))
