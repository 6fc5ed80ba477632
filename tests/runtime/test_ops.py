"""gaws::project as an op: shapes, plans, strides, errors, threads, and its fake."""

from __future__ import annotations

import re
import subprocess
import sys
import threading

import pytest
import torch
from torch._subclasses import FakeTensorMode

from gawscompile.codegen import cpp
from gawscompile.runtime import ops
from tests.codegen.problems import Problem

SPEC = "k=37 x=f32; n=13 w=f32 out=f32 bias=f32 residual=f32 lora(r=3 f32 s=tensor.f32); n=8 w=f32 out=f32"
PLANS = ("gemv_cpp", "gemm_accumulate", "gemv_cpp<=4, gemm_accumulate", "gemv_cpp<=1, gemm_cpp<=5, gemm_accumulate")
ONE_LIBRARY = (
    "gemv_cpp<=40, gemm_cpp<=41, gemm_accumulate",
    "gemv_cpp<=0, gemm_cpp<=40, gemm_accumulate",
    "gemv_cpp<=0, gemm_accumulate<=40, gemm_cpp",
    "gemv_cpp<=4, gemm_cpp<=12, gemm_accumulate",
)
"""For every m below 41 each plan, and all, by tables whose kernels are one library."""


@pytest.fixture(scope="module", autouse=True)
def loaded():
    ops.ensure_loaded()


def call(problem: Problem, plan: str = "gemv_cpp") -> list[torch.Tensor]:
    if not cpp.takes_panels(problem.spec):
        plan = re.sub(r", gemm_cpp<=\d+|, gemm_cpp$", "", plan).replace("accumulate<=40", "accumulate")
    return torch.ops.gaws.project(problem.x, list(problem.operands.values()), f"{plan} | {problem.spec}")


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("leading", [(1,), (5,), (2, 3), (1, 1, 7), (), (0,), (3, 0)])
def test_any_leading_dimensions_and_either_plan(plan, leading):
    m = int(torch.tensor(leading).prod()) if leading else 1
    problem = Problem.of(SPEC, m, leading=leading)
    outputs = call(problem, plan)
    assert [tuple(out.shape) for out in outputs] == [(*leading, 13), (*leading, 8)]
    problem.check(outputs)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("plan", ONE_LIBRARY)
def test_half_precision(dtype, plan):
    problem = Problem.of(f"k=64 x={dtype}; n=24 w={dtype} out={dtype} bias={dtype} lora(r=8 f32 s=2.0)", 6)
    problem.check(call(problem, plan))


@pytest.mark.parametrize("m", [1, 6, 13, 40])
@pytest.mark.parametrize("plan", ONE_LIBRARY)
@pytest.mark.parametrize(
    "text",
    [
        "k=64 x=f32 swiglu; n=50 w=f32 out=f32; n=50 w=f32 out=f32",
        "k=37 x=f32 swiglu; n=13 w=f32 out=f32 bias=f32 lora(r=3 f32 s=0.5); n=13 w=f32 out=f32 lora(r=5 f32 s=2.0)",
        "k=64 x=bf16 swiglu; n=96 w=bf16 out=bf16 lora(r=8 f32 s=2.0); n=96 w=bf16 out=bf16 bias=bf16",
        "k=48 x=f32 swiglu; n=20 w=f32 out=f32 given(r=4 f32 z=f32); n=20 w=f32 out=f32 bias=f32 given(r=3 f32 z=bf16)",
        "k=70 x=bf16 swiglu; n=50 w=bf16 out=bf16 rowscale=bf16 lora(r=5 f32 s=1.0); n=50 w=bf16 out=bf16 bias=bf16",
        "k=60 x=f32 swiglu; n=66 w=f32 out=f32 kron(3*22x20*1 f32 s=0.5);"
        " n=66 w=f32 out=f32 lora(r=2 f32 s=1.0) kron(1*6x5*12 6*11x12*1 f32 s=0.1)",
    ],
)
def test_swiglu_leaves_one_output(text, plan, m):
    problem = Problem.of(text, m)
    (out,) = outputs = call(problem, plan)
    assert out.shape == (m, problem.spec.outputs[0][0])
    problem.check(outputs)


def test_each_plan_runs_up_to_its_last_m():
    """In bf16, 1 + 1/256 is 1: the library's product loses what gemv, which rounds once, brings over to 1 + 1/128."""
    problem = Problem.of("k=2 x=bf16; n=8 w=bf16 out=bf16 bias=bf16", 1)
    weight, bias = torch.tensor([1.0, 1 / 256]).expand(8, 2).bfloat16(), torch.full((8,), 1 / 256).bfloat16()
    found = {}
    for m in (1, 3, 4, 5, 6, 40):
        x = torch.ones(m, 2, dtype=torch.bfloat16)
        (y,) = torch.ops.gaws.project(x, [weight, bias], f"gemv_cpp<=4, gemm_accumulate | {problem.spec}")
        (found[m],) = set(y.flatten().tolist())
    assert found == {m: 1 + 1 / 128 if m <= 4 else 1.0 for m in found}


def test_strided_inputs_are_read_right():
    problem = Problem.of(SPEC, 6)
    problem.x = problem.x.T.contiguous().T
    for name in ("w0", "a0_0", "b0_0", "res0"):
        problem.operands[name] = problem.operands[name].T.contiguous().T
    doubled = torch.stack([problem.operands["bias0"]] * 2, dim=1)
    problem.operands["bias0"] = doubled[:, 0]
    for plan in PLANS:
        problem.check(call(problem, plan))


def test_inputs_are_not_written_and_outputs_are_new():
    problem = Problem.of(SPEC, 6)
    before = [t.clone() for t in problem.operands.values()]
    for plan in PLANS:
        first, second = call(problem, plan), call(problem, plan)
        assert len({out.data_ptr() for out in first + second}) == 4
    assert all(torch.equal(a, b) for a, b in zip(before, problem.operands.values(), strict=True))


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("w0", lambda t: t.double(), "operand w0 no longer has the dtype, shape or device"),
        ("a0_0", lambda t: t[:2], "operand a0_0"),
        ("b0_0", lambda t: t[:, :2], "operand b0_0"),
        ("bias0", lambda t: t[None], "operand bias0"),
        ("res0", lambda t: t[:5], "operand res0"),
        ("scale0_0", lambda t: t.double(), "operand scale0_0"),
    ],
)
def test_an_operand_that_no_longer_fits_is_named(name, change, says):
    problem = Problem.of(SPEC, 6)
    problem.operands[name] = change(problem.operands[name])
    with pytest.raises(RuntimeError, match=says):
        call(problem)


def test_a_wrong_x_or_a_missing_operand_is_an_error():
    problem = Problem.of(SPEC, 6)
    with pytest.raises(RuntimeError, match="wanted 37 features"):
        torch.ops.gaws.project(problem.x[:, :36], list(problem.operands.values()), f"gemv_cpp | {problem.spec}")
    with pytest.raises(RuntimeError, match="5 operands, the kernel takes 7"):
        torch.ops.gaws.project(problem.x, list(problem.operands.values())[:5], f"gemv_cpp | {problem.spec}")


@pytest.mark.parametrize("program", ["", "gemv_cpp | ", "warp | k=1 x=f32; n=1 w=f32 out=f32", "gemv_cpp | k=1"])
def test_a_program_that_is_none_is_an_error(program):
    with pytest.raises(RuntimeError, match="SpecError"):
        torch.ops.gaws.project(torch.ones(1, 1), [torch.ones(1, 1)], program)


def test_the_fake_agrees_with_the_kernel():
    problem = Problem.of(SPEC, 6, leading=(2, 3))
    real = call(problem)
    with FakeTensorMode() as mode:
        fakes = torch.ops.gaws.project(
            mode.from_tensor(problem.x), [mode.from_tensor(t) for t in problem.operands.values()],
            f"gemv_cpp | {problem.spec}",
        )
    assert [(f.shape, f.dtype, f.stride()) for f in fakes] == [(r.shape, r.dtype, r.stride()) for r in real]


def test_many_threads_share_a_program_that_none_has_built():
    spec = "k=41 x=f32; n=11 w=f32 out=f32 lora(r=2 f32 s=2.0)"
    problems = [Problem.of(spec, m) for m in range(1, 9)]
    failures = []

    def work(problem: Problem) -> None:
        try:
            for _ in range(50):
                problem.check(call(problem))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(problem,)) for problem in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.slow
def test_a_process_that_ran_no_pass_rebuilds_kernels_from_the_program():
    code = """
import torch, gawscompile.backend
from gawscompile.runtime import ops
ops.ensure_loaded()
y, = torch.ops.gaws.project(torch.eye(3), [torch.arange(6.).view(2, 3)], "gemv_cpp | k=3 x=f32; n=2 w=f32 out=f32")
assert torch.equal(y.T, torch.arange(6.).view(2, 3)), y
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
