"""Parts of an adapter, one for each rank, make what the whole makes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gawscompile.banks.checkpoints import Adapter, Factors
from gawscompile.banks.dora import Scaled
from gawscompile.banks.kronecker import Chain
from gawscompile.banks.opening import BankError
from gawscompile.banks.sharding import Split, part_of, splits
from tests.graphs import Pair

K, N, R = 12, 10, 3


def factors() -> Factors:
    torch.manual_seed(0)
    return Factors(torch.randn(R, K), torch.randn(N, R), 0.5, torch.randn(N))


def made(f: Factors, x: torch.Tensor) -> torch.Tensor:
    y = x @ f.a.T @ f.b.T * f.scale
    return y if f.bias is None else y + f.bias


@pytest.mark.parametrize("cut", [5, 7])
def test_rows_are_summed_and_columns_stand_side_by_side(cut):
    whole, x = factors(), torch.randn(4, K)
    rows = [Split(True, *ends, ends[0] == 0, None) for ends in ((0, cut), (cut, K))]
    parts = [part_of(Adapter({"o": whole}, {}), {"o": one}).factors["o"] for one in rows]
    summed = sum(made(part, x[:, one.start : one.end]) for part, one in zip(parts, rows, strict=True))
    torch.testing.assert_close(summed, made(whole, x))
    columns = [Split(False, *ends, ends[0] == 0, None) for ends in ((0, cut), (cut, N))]
    parts = [part_of(Adapter({"q": whole}, {}), {"q": one}).factors["q"] for one in columns]
    torch.testing.assert_close(torch.cat([made(part, x) for part in parts], -1), made(whole, x))
    assert rows[1].sizes((N, K)) == (N, K - cut) and columns[0].sizes((N, K)) == (cut, K)


def test_what_needs_the_whole_weight_is_refused():
    split, lora = {"o": Split(True, 0, 6, True, None)}, factors()
    dora = dataclasses.replace(lora, scaled=Scaled(torch.ones(N), torch.ones(N)))
    for one, word in ((dora, "DoRA"), (Chain((), (), 1.0, None), "Kronecker")):
        with pytest.raises(BankError, match=f"o is sharded over ranks, .* {word}"):
            part_of(Adapter({"o": one}, {}), split)
    assert part_of(Adapter({"q": dora}, {}), split).factors["q"] is dora  # a linear that every rank has whole


def test_a_model_of_one_process_has_no_parts():
    model = Pair()
    assert splits(model, {"q": model.q}) == {}
