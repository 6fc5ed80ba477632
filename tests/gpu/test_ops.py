"""The op on the device: torch's own checks of it, streams, the counters that outlive a call, the order of programs."""

from __future__ import annotations

import pytest
import torch

from gawscompile.calibration import fit_gpu
from gawscompile.ir.spec import KernelSpec
from gawscompile.runtime import gpu
from tests.gpu.conftest import rehearsable
from tests.gpu.test_numerics import answers

LORA = "lora(r=8 bf16 s=2.0)"
SPEC = f"k=64 x=bf16; n=48 w=bf16 out=bf16 residual=bf16 {LORA}; n=16 w=bf16 out=f32 bias=bf16 {LORA}"


def close(outputs: list[torch.Tensor], x: torch.Tensor, operands: list[torch.Tensor], spec: str = SPEC) -> None:
    for y, want in zip(outputs, answers(KernelSpec.parse(spec), x, operands), strict=True):
        torch.testing.assert_close(y.double(), want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "plans", rehearsable(["single_launch[4]<=2, fused_tile", "single_launch[4]", "two_launch[8]", "stream[4]"], 1)
)
def test_torch_approves_of_the_op(plans: str, device: str):
    spec = SPEC.replace(f" {LORA}", "") if plans.startswith("stream") else SPEC
    for tokens in (3,) if device == "cpu" else (1, 3):
        x, operands = fit_gpu.tensors(KernelSpec.parse(spec), tokens, device)
        torch.library.opcheck(torch.ops.gaws.project.default, (x, operands, f"triton {plans} | {spec}"))


@pytest.mark.device_only
@pytest.mark.parametrize("plan", ["two_launch[8]", "redundant_shrink[4]", "fused_tile", "gemm_accumulate"])
def test_torch_approves_of_the_transparent_op(plan: str, device: str):
    spec = SPEC.replace("out=f32", "out=bf16")
    x, operands = fit_gpu.tensors(KernelSpec.parse(spec), 3, device)
    arguments = (x, operands, f"triton {plan} | {spec}")
    torch.library.opcheck(torch.ops.gaws.project_traced.default, arguments)
    close(torch.ops.gaws.project_traced(*arguments), x, operands, spec)


def test_two_streams_at_once(device: str):
    """Each has counters of its own, or one would see the other's programs arrive."""
    program = f"triton single_launch[4] | {SPEC}"
    problems = [fit_gpu.tensors(KernelSpec.parse(SPEC), 1, device) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in problems]
    found: list[list[torch.Tensor]] = [[], []]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(2 if device == "cpu" else 500):
        for i, (x, operands) in enumerate(problems):
            with torch.cuda.stream(streams[i]):
                found[i] = torch.ops.gaws.project(x, operands, program)
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    for outputs, (x, operands) in zip(found, problems, strict=True):
        close(outputs, x, operands)
    kept = [gpu._flags[0, stream.cuda_stream] for stream in streams]
    assert kept[0][-1].data_ptr() != kept[1][-1].data_ptr()


def test_counters_are_zeros_after_few_and_many_tokens(device: str):
    """One workspace serves launches of other shapes, larger and smaller, one after the other."""
    spec = KernelSpec.parse(SPEC)
    other = KernelSpec.parse(SPEC.replace("r=8", "r=24").replace("k=64", "k=96"))
    for tokens, one in ((1, spec), (5, other), (2, spec)):
        x, operands = fit_gpu.tensors(one, tokens, device)
        close(torch.ops.gaws.project(x, operands, f"triton single_launch[4] | {one}"), x, operands, str(one))
        torch.cuda.synchronize()
        kept = gpu._flags[0, torch.cuda.current_stream().cuda_stream]
        assert not any(bool(buffer.any()) for buffer in kept)


def test_programs_start_in_the_order_of_their_ids(device: str):
    """As far as `single_launch` needs it: see `benchmarks.start_order`."""
    from benchmarks.start_order import lateness, seats

    for tokens, blocks in ((1, 3), (2, 5)) if device == "cpu" else ((1, 16384), (8, 4096), (1, 65535)):
        assert lateness(tokens, blocks, 2) < seats()


def test_a_scale_on_the_cpu_is_refused_in_a_capture(device: str, monkeypatch: pytest.MonkeyPatch):
    text = "k=64 x=bf16; n=48 w=bf16 out=bf16 lora(r=8 bf16 s=tensor.f64)"
    x, operands = fit_gpu.tensors(KernelSpec.parse(text), 1, device)
    operands[3] = operands[3].to("meta" if device == "cpu" else "cpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"scale0_0 of .* on the CPU.*dynamic=False"):
        gpu.project(x, operands, f"triton two_launch[8] | {text}")


@pytest.mark.device_only
def test_the_device_of_the_tensors_is_the_one_that_runs():
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} GPU here, and this takes two")
    x, operands = fit_gpu.tensors(KernelSpec.parse(SPEC), 1, "cuda:1")
    with torch.cuda.device(0):
        outputs = torch.ops.gaws.project(x, operands, f"triton single_launch[4] | {SPEC}")
        assert torch.cuda.current_device() == 0
    assert {y.device.index for y in outputs} == {1}
    close(outputs, x, operands)
