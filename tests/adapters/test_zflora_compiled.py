"""zFLoRA under the compiler: eager's answers, as many launches as the base has, live factors."""

from __future__ import annotations

import peft
import pytest
import torch

from gawscompile.adapters import ZFLoRAConfig
from gawscompile.observe.store import RECORDS
from tests.adapters.common import base, run
from tests.adapters.test_zflora import NAMES, adapted, randomise
from tests.graphs import rewriting, tokens

OPTIONS = {"strict": True, "verify": True}


def groups_of(model, name):
    """The groups that one call of the compiled `model` runs, and its output."""
    mark = len(RECORDS)
    out = run(torch.compile(model, backend="gaws", options=OPTIONS), name)
    return [group for record in RECORDS.since(mark) for group in record.groups], out


def rewritten(model, name):
    """The same without Inductor and kernels, which take most of the time: slow tests run both, with `OPTIONS`."""
    torch._dynamo.reset()
    records = []
    with torch.no_grad():
        out = run(torch.compile(model, backend=rewriting(records, kernels=False)), name)
    return [group for record in records for group in record.groups], out


QUICK = [pytest.param(name, marks=pytest.mark.slow) if name != "Llama" else name for name in NAMES]


@pytest.mark.parametrize("name", QUICK)
def test_as_many_launches_as_the_base(name):
    bare, _ = rewritten(base(name), name)
    model = adapted(name)
    groups, got = rewritten(model, name)
    assert len(groups) == len(bare)
    assert sum(group.spec.count("given(") for group in groups) == sum("zflora_B" in n for n in model.state_dict())
    torch.testing.assert_close(got, run(model, name), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_one_direction_alone(direction):
    """M is a group of its own, and so is E, whose product the first block is given."""
    model = adapted(direction=direction)
    groups, got = groups_of(model, "Llama")
    assert len(groups) == 4 * 2 + 1 + 1
    assert sum(group.spec.count("given(") for group in groups) == sum("zflora_B" in n for n in model.state_dict())
    torch.testing.assert_close(got, run(model), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_factors_in_fp32_beside_a_base_in_bf16():
    model = randomise(peft.get_peft_model(base().bfloat16(), ZFLoRAConfig(r=4)).eval())
    groups, got = groups_of(model, "Llama")
    assert len(groups) == 4 * 2 + 1
    torch.testing.assert_close(got, run(model), rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_switching_disabling_fusing_and_new_numbers_show_in_the_next_call():
    model = adapted()
    model.add_adapter("other", ZFLoRAConfig(r=6))
    randomise(model, 5, "other")
    compiled = torch.compile(model, backend="gaws", options={"strict": True})
    seen = [run(compiled)]
    for step in (
        lambda: randomise(model, 9, "default"),
        lambda: model.set_adapter("other"),
        lambda: model.base_model.set_adapter(["default", "other"]),
        lambda: model.base_model.disable_adapter_layers(),
    ):
        step()
        seen.append(run(compiled))
        torch.testing.assert_close(seen[-1], run(model), rtol=1e-4, atol=1e-4)
    assert not any(torch.allclose(a, b) for i, a in enumerate(seen) for b in seen[:i])
    model.base_model.enable_adapter_layers()
    model.merge_adapter()
    torch.testing.assert_close(run(compiled), seen[3], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_cache_that_grows():
    model = adapted()
    compiled = torch.compile(model, backend="gaws", options={"strict": True}, dynamic=True)
    ids = tokens(1, 12)
    with torch.no_grad():
        whole, past = model(input_ids=ids).logits, None
        for at, length in ((0, 8), (8, 1), (9, 1), (10, 2)):
            out = compiled(input_ids=ids[:, at : at + length], past_key_values=past, use_cache=True)
            past = out.past_key_values
            torch.testing.assert_close(out.logits, whole[:, at : at + length], rtol=1e-4, atol=1e-4)
