"""Every plan on the device against fp64: small and odd shapes between NaNs, and real ones over and over."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gawscompile.calibration import fit_gpu
from gawscompile.codegen import triton
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import DTYPES
from tests.codegen import triton_interpret_cases as cases
from tests.codegen import triton_specs
from tests.codegen.interpreted_specs import CASES
from tests.codegen.triton_interpret_cases import GUARD
from tests.gpu.conftest import rehearsable

EPSILON = torch.finfo(torch.float32).eps
CHOSEN = [
    *("qkv-m1", "rank_3-m5", "qkv-m70", "bias_and_residual_odd-m1", "bias_and_residual_odd-m70", "f16_odd-m5"),
    *("two_adapters-m1", "tensor_scale_f64-m5", "five_kinds_of_work-m5", "everything-m1", "everything-m17"),
    *("gaws_odd-m1", "lokr_low-m70", "swiglu_odd-m1", "swiglu-m70", "given_beside-m5", "given_swiglu-m1"),
    *("transposed_odd-m17", "many_rows-m5"),
]
"""Every plan and every kind of term; the other cases are slow, as each is compiled for the device."""
REAL = ["QKV", "SWIGLU", "GAWS", "LOKR", "CONV1D", "GIVEN"]


def guarded(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """On `device`, in the middle of a buffer that is NaN elsewhere."""
    buffer = torch.full((tensor.numel() + 2 * GUARD,), torch.nan, dtype=tensor.dtype, device=device)
    return buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape).copy_(tensor)


def check(text: str, m: int, device: str) -> None:
    spec = KernelSpec.parse(text)
    exact, theirs = (answers(cases.problem(spec, m)) for answers in (cases.references, cases.rounded))
    for plan in cases.plans_for(spec, m):
        p = cases.problem(spec, m)
        p = dataclasses.replace(
            p, x=guarded(p.x, device), arguments={o: guarded(t, device) for o, t in p.arguments.items()}
        )
        outs = [guarded(torch.full((m, n), torch.nan, dtype=DTYPES[dtype]), device) for n, dtype in spec.outputs]
        module, flags = triton.load(spec, plan), {}
        if plan.style.keeps_state:
            flags = {"flags": torch.zeros((m, module.FLAGS.value), dtype=torch.int32, device=device)}
        module.launch(p.x, list(p.arguments.values()), outs, **flags)
        for out, want, segment in zip(outs, exact, theirs, strict=True):
            assert cases.guards_hold(out), f"{plan} wrote beyond an end"
            error, allowed = cases.distance(out.cpu(), want), 1.5 * cases.distance(segment, want) + EPSILON
            assert error <= allowed, f"{plan}: error {error:.3g}, allowed {allowed:.3g}"
        assert not any(bool(flag.any()) for flag in flags.values()), f"{plan} left a counter"


@pytest.mark.parametrize("case", rehearsable(CHOSEN, 2))
def test_every_plan(case: str, device: str):
    check(*CASES[case], device)


@pytest.mark.slow
@pytest.mark.device_only
@pytest.mark.parametrize("case", [case for case in CASES if case not in CHOSEN])
def test_every_other_case(case: str, device: str):
    check(*CASES[case], device)


def test_the_chosen_cases_run_every_plan():
    ran = set()
    for text, m in map(CASES.__getitem__, CHOSEN):
        ran |= {plan.name for plan in cases.plans_for(KernelSpec.parse(text), m)}
    assert ran == {*triton.PLANS}


def shapes() -> dict[str, KernelSpec]:
    """Groups of real models, and one of them without adapters."""
    found = {name: getattr(triton_specs, name) for name in REAL}
    found["LLAMA"] = triton_specs.llama(*["lora(r=16 bf16 s=2.0)"] * 3)
    return found | {"BARE": triton_specs.llama("", "", "")}


@pytest.mark.device_only
@pytest.mark.parametrize("m", [1, 2, 64])
@pytest.mark.parametrize("name", shapes())
def test_real_shapes(name: str, m: int, device: str):
    """Many programs at once: a barrier that is missing, or a counter that is read too early, shows only here."""
    spec = shapes()[name]
    torch.manual_seed(0)
    x, operands = fit_gpu.tensors(spec, m, device)
    exact = answers(spec, x, operands)
    for plan in triton.plans(spec):
        if plan.rows not in (None, 16, 4) or (plan.rows and m > 2):
            continue
        first = torch.ops.gaws.project(x, operands, f"triton {plan} | {spec}")
        for y, want in zip(first, exact, strict=True):
            error = float((y.double() - want).norm() / want.norm())
            assert error < 3 * torch.finfo(y.dtype).eps, f"{plan}: error {error:.3g}"
        for turn in range(50):
            again = torch.ops.gaws.project(x, operands, f"triton {plan} | {spec}")
            same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            assert same, f"{plan}: call {turn + 2} gives other numbers than the first"


def answers(spec: KernelSpec, x: torch.Tensor, operands: list[torch.Tensor]) -> list[torch.Tensor]:
    """Every output in fp64, on the device."""
    wide = {o: t.double() for o, t in zip(spec.operands(), operands, strict=True)}
    return cases.references(cases.Problem(spec, x.double(), wide))


def test_the_reference_on_a_device_is_that_of_the_cases():
    spec = KernelSpec.parse("k=32 x=bf16; n=24 w=bf16 out=bf16 bias=f32 lora(r=4 bf16 s=0.5)")
    x, operands = fit_gpu.tensors(spec, 2, "cpu")
    w, bias, a, b = (t.double() for t in operands)
    torch.testing.assert_close(answers(spec, x, operands)[0], x.double() @ (w + 0.5 * b @ a).T + bias)
