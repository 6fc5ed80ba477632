"""GAWS, GAWS-D and LoKr under the compiler: eager's answers, live factors, no ΔW in memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from gawscompile.observe.store import RECORDS
from tests.adapters.common import KINDS, NAMES, Net, adapted, config, randomise, run
from tests.architectures import ARCHITECTURES
from tests.numerics import error_ratio

OPTIONS = {"strict": True, "verify": True}


@pytest.mark.slow  # `test_fuse_kronecker.py` has every adapter of a Llama, and single linears are compiled below
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("diag", [False, True])
def test_compiled_equals_eager_and_a_base_with_the_dense_product(kind, diag):
    model = adapted(kind, diag=diag)
    dense = copy.deepcopy(model).merge_and_unload()
    mark = len(RECORDS)
    compiled = torch.compile(model, backend="gaws", options=OPTIONS)
    got = run(compiled)
    torch.testing.assert_close(got, run(model), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, run(dense), rtol=1e-4, atol=1e-4)
    specs = [group.spec for record in RECORDS.since(mark) for group in record.groups]
    assert sum(spec.count("kron(") for spec in specs) == ARCHITECTURES["Llama"].adapted


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_new_numbers_and_other_adapters_show_in_the_next_call(kind):
    model = adapted(kind)
    model.add_adapter("other", config(kind, diag=True))
    randomise(model, seed=5, only="other")
    compiled = torch.compile(model, backend="gaws", options={"strict": True})
    mark = len(RECORDS)
    seen = [run(compiled)]
    assert any("kron(" in group.spec for record in RECORDS.since(mark) for group in record.groups)
    randomise(model, seed=9, only="default")
    seen.append(run(compiled))
    torch.testing.assert_close(seen[1], run(model), rtol=1e-4, atol=1e-4)
    model.set_adapter("other")
    seen.append(run(compiled))
    torch.testing.assert_close(seen[2], run(model), rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        seen.append(run(compiled))
        torch.testing.assert_close(seen[3], run(model), rtol=1e-4, atol=1e-4)
    assert not any(torch.allclose(a, b) for i, a in enumerate(seen) for b in seen[:i])


def largest_allocation(call, x):
    """Bytes of the largest tensor that ``call(x)`` allocates."""
    with torch.no_grad():
        call(x)  # compiles
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            call(x)
    return max(event.self_cpu_memory_usage for event in found.events())


@pytest.mark.parametrize("kind", ["gaws", "gawsd", "lokr"])
def test_the_dense_product_is_never_in_memory(kind):
    from peft import LoKrConfig, get_peft_model

    size = 512
    own = {"gaws": {"input_splits": 4}, "gawsd": {"input_split_dim": 4}}
    if kind == "lokr":
        wanted = LoKrConfig(r=64, alpha=64, target_modules=["proj"], init_weights=False)
    else:
        wanted = KINDS[kind](target_modules=["proj"], init_weights="none", **own[kind])
    model = get_peft_model(Net(torch.nn.Linear(size, size)), wanted).eval()
    compiled = torch.compile(model, backend="gaws", options=OPTIONS)
    x, mark = torch.randn(3, size), len(RECORDS)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert any("kron(" in group.spec for record in RECORDS.since(mark) for group in record.groups)
    assert largest_allocation(compiled, x) < size * size  # a quarter of ΔW
    if kind == "lokr":  # so that the measure is known to see one
        assert largest_allocation(model, x) >= 4 * size * size


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_errors_are_no_larger_than_the_better_known(name, kind, dtype, record_testsuite_property):
    from peft import get_peft_model

    architecture = ARCHITECTURES[name]

    def build(dtype):
        torch.manual_seed(0)
        return randomise(get_peft_model(architecture.make().to(dtype).eval(), config(kind, diag=True)).eval())

    ratio = error_ratio(build(dtype), build(torch.float32), architecture.inputs(), architecture.calls)
    record_testsuite_property(f"{name}, {kind}, {dtype}", f"{ratio:.2f}")
    assert ratio <= 1.25
