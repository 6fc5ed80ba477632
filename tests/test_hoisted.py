"""What is hoisted follows its sources, whatever is done to them; nothing recompiles where torch need not."""

from __future__ import annotations

import threading

import peft
import pytest
import torch

from gawscompile.calibration.measure import graphs_compiled
from gawscompile.ir.recipe import hoisted
from gawscompile.observe.store import RECORDS
from gawscompile.runtime import ops
from tests.changes import (
    assigned_data,
    assigned_data_of_all,
    factors,
    foreach_sgd,
    from_inference_mode,
    fused_adamw,
    in_place,
    loaded,
    moved,
    through_data,
)
from tests.graphs import small_llama, tokens
from tests.peft_kinds import adapted

IDS = tokens(1, 3)
TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


@pytest.fixture(scope="module", params=["LORA dora", "LOHA"])
def pair(request):
    """A model and its compiled form, shared by all changes: they add up."""
    torch._dynamo.reset()
    model = adapted(request.param, small_llama(layers=1, lora=None), TARGETS)
    compiled = torch.compile(model, backend="gaws", options={"strict": True, "verify": True})
    mark = len(RECORDS)
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-4)
    linears = [entry for record in RECORDS.since(mark) for entry in record.linears]
    assert sum(entry.hoisted for entry in linears) >= len(TARGETS)
    assert not [entry for entry in linears if entry.reason == "UNPROVEN"]
    return model, compiled


@pytest.fixture(autouse=True)
def forgetful_dynamo():
    """Not here: what is compiled once must serve every test."""


def bases(model):
    return [p for name, p in model.named_parameters() if "base_layer" in name]


def no_grad(change):
    def changed(model):
        with torch.no_grad():
            change(model)

    changed.__name__ = change.__name__
    return changed


@no_grad
def one_number(model):
    for p in factors(model):
        p.view(-1)[p.numel() // 3] += 2.0


def one_number_through_data(model):
    for p in factors(model):
        p.data.view(-1)[-1] += 2.0


def through_numpy(model):
    for p in factors(model):
        p.detach().numpy()[...] *= 1.1


def magnitude_or_first(model):
    chosen = [p for name, p in model.named_parameters() if "magnitude" in name or "w1_a" in name]
    for p in chosen:
        p.data.add_(0.1)


@no_grad
def zeroed(model):
    factors(model)[1].zero_()


@no_grad
def refilled(model):
    for p in factors(model)[1:2]:
        p.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))


@no_grad
def base_in_place(model):
    for p in bases(model):
        p.mul_(1.05)


@no_grad
def one_number_of_the_base(model):
    for p in bases(model):
        p[5, 7] += 3.0


def base_through_data(model):
    for p in bases(model):
        p.data.mul_(0.95)


def base_copied(model):
    for p in bases(model):
        p.data.copy_(p.data.flip(0))


def one_number_of_the_base_through_data(model):
    for p in bases(model):
        p.data[9, 11] += 30.0


def one_number_of_the_base_through_numpy(model):
    for p in bases(model):
        p.detach().numpy()[17, 5] += 30.0


def a_row_of_the_base_through_data(model):
    for p in bases(model):
        p.data[3] *= 40


def a_row_of_the_base_through_numpy(model):
    for p in bases(model):
        p.detach().numpy()[7] *= 20


def two_rows_of_the_base_swapped(model):
    for p in bases(model):
        p.data[[1, 2]] = p.data[[2, 1]]


def signs_of_a_row_of_the_base(model):
    for p in bases(model):
        p.data[13].neg_()


def a_row_of_the_base_by_another_thread(model):
    def write():
        for p in bases(model):
            p.data[21] *= 10

    other = threading.Thread(target=write)
    other.start()
    other.join()


def base_assigned(model):
    for p in bases(model):
        p.data = p.data.flip(1).contiguous()


def swapped(model):
    for p in factors(model)[:1]:
        other = torch.nn.Parameter(p.detach() * 1.5)
        p.data, other.data = other.data, p.data


CHANGES = [
    in_place,
    one_number,
    one_number_through_data,
    through_data,
    through_numpy,
    magnitude_or_first,
    assigned_data,
    assigned_data_of_all,
    fused_adamw,
    foreach_sgd,
    loaded,
    moved,
    from_inference_mode,
    zeroed,
    refilled,
    base_in_place,
    one_number_of_the_base,
    base_through_data,
    base_copied,
    base_assigned,
    swapped,
    one_number_of_the_base_through_data,
    one_number_of_the_base_through_numpy,
    a_row_of_the_base_through_data,
    a_row_of_the_base_through_numpy,
    two_rows_of_the_base_swapped,
    signs_of_a_row_of_the_base,
    a_row_of_the_base_by_another_thread,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_next_call_shows_it(pair, change):
    model, compiled = pair
    before, graphs = logits(compiled), graphs_compiled()
    change(model)
    want = logits(model)
    assert (want - before).abs().max() > 1e-4, "the change shows nowhere: this test proves nothing"
    torch.testing.assert_close(logits(compiled), want, rtol=1e-4, atol=1e-4)
    assert graphs_compiled() == graphs


def test_it_is_computed_once_for_each_state(pair, monkeypatch):
    model, compiled = pair
    logits(compiled)
    derived = []
    monkeypatch.setattr(ops, "hoisted", lambda *given: derived.append(given) or hoisted(*given))
    logits(compiled)
    assert not derived
    in_place(model)
    logits(compiled)
    logits(compiled)
    assert len(derived) == len(TARGETS)


def test_replaced_objects_and_disabled_adapters(pair):
    model, compiled = pair
    model.load_state_dict({name: value * 1.05 for name, value in model.state_dict().items()}, assign=True)
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-4)
    adapted_logits = logits(compiled)
    with model.disable_adapter():
        torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits(compiled), adapted_logits, rtol=1e-2)
    torch.testing.assert_close(logits(compiled), adapted_logits)


def test_large_factors_and_tensors_of_inference_mode():
    """Factors as large as the weight, and tensors that have no version: every plain write shows."""
    torch._dynamo.reset()
    with torch.inference_mode():
        config = peft.LoraConfig(r=64, lora_alpha=16, use_dora=True, target_modules=["o_proj"])
        model = peft.get_peft_model(small_llama(layers=1, lora=None), config).eval()
        compiled = torch.compile(model, backend="gaws", options={"strict": True})
        parameters = {name.split(".o_proj.")[-1]: p for name, p in model.named_parameters() if ".o_proj." in name}
        assert all(p.is_inference() for p in parameters.values())
        down, up = parameters["lora_A.default.weight"], parameters["lora_B.default.weight"]
        up.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
        base = parameters["base_layer.weight"]
        for p, at in [(base, (3,)), (down, (5,)), (down, (2, 7)), (up, (11,)), (up, (60, 1))]:
            before = logits(compiled)
            p[at] *= 40
            want = model(IDS, use_cache=False).logits
            assert (want - before).abs().max() > 1e-4, "the change shows nowhere: this test proves nothing"
            torch.testing.assert_close(logits(compiled), want, rtol=1e-4, atol=1e-4)


def test_two_adapters_on_one_base_do_not_share_what_is_hoisted():
    from gawscompile.calibration.measure import sharing_copy

    torch._dynamo.reset()
    base = small_llama(layers=1, lora=None)
    models = [adapted("LORA dora", sharing_copy(base), TARGETS) for _ in range(2)]
    with torch.no_grad():
        for p in factors(models[1]):
            p.mul_(-1.5)
    ours = [torch.compile(model, backend="gaws", options={"strict": True}) for model in models]
    for _ in range(2):
        for model, compiled in zip(models, ours, strict=True):
            torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(ours[0]), logits(ours[1]), rtol=1e-2)
