"""The fuzzer's second level (`tests.fuzz.kernels`): what it generates, and that its judge sees what is wrong."""

from __future__ import annotations

from random import Random

import pytest
import torch

from gawscompile.codegen import cpp, triton
from gawscompile.ir.spec import KernelSpec
from tests.fuzz import kernels
from tests.fuzz.calls import NUMBERS, Call, guards_hold, tensors
from tests.fuzz.coverage import Coverage
from tests.fuzz.kernel_answers import answers, naive
from tests.fuzz.specs import FEATURES, random_spec

EVERYTHING = (
    "k=60 x={0}; n=66 w={0} out={0} bias={0} residual={0} rowscale=f32 lora(r=3 {0} s=0.5) given(r=5 {0} z={0})"
    " kron(1*6x5*12 6*4x12*1 6*11x4*1 f32 s=2.0); n=33 opaque={0} out={0} lora(r=17 f32 s=tensor.f64)"
)


def test_specs_are_legal_and_have_everything_in_turn():
    missing = set(FEATURES)
    for seed in range(300):
        spec = random_spec(Random(seed))
        assert KernelSpec.parse(str(spec)) == spec and cpp.emit(spec)
        missing -= {name for name in missing if FEATURES[name](spec)}
    assert not missing
    assert all(triton.plans(random_spec(Random(seed), triton=True)) for seed in range(100))


def test_a_seed_is_a_case_and_five_thousand_reach_everything():
    coverage = Coverage()
    for seed in range(5000):
        assert kernels.call(seed) == kernels.call(seed)
        kernels.reached(kernels.call(seed), coverage)
    assert not coverage.missing(kernels.MUST_REACH)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("numbers", NUMBERS)
def test_the_judge_accepts_segments_in_fp32_and_no_less(dtype, numbers):
    spec = EVERYTHING.format(dtype)
    x, operands = tensors(Call(spec, "gemv", 7, numbers=numbers))
    wide = {name: t.float() for name, t in operands.items()}
    outputs = naive(KernelSpec.parse(EVERYTHING.format("f32")), x.float(), wide)
    wanted = answers(KernelSpec.parse(spec), x, operands)
    for answer, y in zip(wanted, outputs, strict=True):
        got = y.to(answer.low.dtype)
        assert answer.fault(got) is None
        if numbers == "normal":
            spaced = torch.finfo(got.dtype).eps * (1 if dtype != "f32" else 200)
            assert "is" in (answer.fault(got * (1 + 2 * spaced)) or "")
    if numbers == "not finite":
        assert any(not answer.exact.isfinite().all() for answer in wanted)


@pytest.mark.parametrize(
    "lost", ["bias0", "res0", "rowscale0", "a0_0", "b0_0", "c0_0", "g0_0_0", "g0_0_2", "b1_0", "scale1_0"]
)
def test_the_judge_sees_one_number_that_is_not_read(lost):
    spec = KernelSpec.parse(EVERYTHING.format("f32"))
    x, operands = tensors(Call(str(spec), "gemv", 3, seed=5))
    wanted = answers(spec, x, operands)
    operands[lost].view(-1)[-1] = 0
    outputs = naive(spec, x, operands)
    faults = [answer.fault(y) for answer, y in zip(wanted, outputs, strict=True)]
    assert sum(fault is not None for fault in faults) == 1


def test_what_becomes_of_nans_and_infinities_is_judged():
    spec = KernelSpec.parse("k=3 x=f32; n=2 w=f32 out=f32")
    x, operands = tensors(Call(str(spec), "gemv", 2))
    operands["w0"][0, 0], operands["w0"][1, 0], x[:, 0] = torch.inf, torch.nan, 1.0
    (answer,) = answers(spec, x, operands)
    right = torch.tensor([[torch.inf, torch.nan]] * 2)
    assert answer.fault(right) is None and answer.fault(torch.full((2, 2), torch.nan)) is None
    for n, wrong in ((0, -torch.inf), (0, 1.0), (1, torch.inf), (1, 0.0)):
        got = right.clone()
        got[1, n] = wrong
        assert f"[1, {n}]" in (answer.fault(got) or "")


def test_a_write_beyond_an_end_is_seen():
    x, _ = tensors(Call("k=3 x=f32; n=2 w=f32 out=f32", "gemv", 2, seed=9))
    assert guards_hold(x)
    x.as_strided((1,), (1,), x.storage_offset() + x.numel())[0] = 0
    assert not guards_hold(x)


def test_a_failure_is_shrunk_to_what_still_fails(monkeypatch):
    """Where more than three tokens meet an opaque base."""

    def fault(case: Call) -> tuple[str, str] | None:
        bad = case.m > 3 and any(p.opaque for p in case.kernel.projections)
        return ("wrong", "opaque") if bad else None

    monkeypatch.setattr(kernels, "_fault", fault)
    monkeypatch.setattr(kernels, "TRIALS", 500)
    case = Call(EVERYTHING.format("bf16"), "gemv", 50, threads=3, numbers="huge", seed=3)
    smallest, found = kernels.shrunk(case, ("wrong", "opaque"))
    assert found == ("wrong", "opaque")
    assert (smallest.m, smallest.threads, smallest.numbers) == (4, 1, "normal")
    assert smallest.spec == "k=60 x=bf16; n=33 opaque=bf16 out=bf16 lora(r=17 f32 s=tensor.f64)"
