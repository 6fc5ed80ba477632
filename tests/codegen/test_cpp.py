"""The C++ emitter: its text, and all of its kernels against fp64, with NaNs around every tensor."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from gawscompile.codegen import build, cpp
from gawscompile.ir import banked
from gawscompile.ir.spec import KernelSpec
from tests.codegen.problems import GUARD, TORCH, Problem, guarded, weight

SNAPSHOT = Path(__file__).parent / "snapshots" / "gemv_cpp_qkv.cpp.txt"

SPECS = {
    "plain": "k=96 x=f32; n=40 w=f32 out=f32",
    "qkv": "k=64 x=f32; n=48 w=f32 out=f32 lora(r=16 f32 s=2.0); n=16 w=f32 out=f32 lora(r=16 f32 s=2.0); "
    "n=16 w=f32 out=f32 lora(r=16 f32 s=2.0)",
    "odd_everything": "k=37 x=f32; n=13 w=f32 out=f32 bias=f32 residual=f32 lora(r=3 f32 s=-0.5)",
    "one_row": "k=5 x=f32; n=1 w=f32 out=f32 lora(r=1 f32 s=1.0)",
    "ranks_17_and_64": "k=65 x=f32; n=30 w=f32 out=f32 lora(r=17 f32 s=0.25); n=66 w=f32 out=f32 lora(r=64 f32 s=1.0)",
    "two_adapters": "k=48 x=f32; n=20 w=f32 out=f32 lora(r=4 f32 s=2.0) lora(r=9 f32 s=-3.0)",
    "scale_tensors": "k=48 x=f32; n=20 w=f32 out=f32 lora(r=4 f32 s=tensor.f32) lora(r=8 f32 s=tensor.f64)",
    "half_adapted": "k=48 x=f32; n=20 w=f32 out=f32 bias=f32; n=12 w=f32 out=f32 lora(r=4 f32 s=1.5)",
    "bf16": "k=100 x=bf16; n=36 w=bf16 out=bf16 bias=bf16 residual=bf16 lora(r=16 bf16 s=2.0)",
    "bf16_f32_adapter": "k=96 x=bf16; n=50 w=bf16 out=bf16 lora(r=8 f32 s=2.0); "
    "n=7 w=bf16 out=bf16 lora(r=5 f32 s=1.0)",
    "f16": "k=70 x=f16; n=19 w=f16 out=f16 bias=f16 lora(r=6 f16 s=0.5)",
    "conv1d": "k=70 x=f32; n=1100 wt=f32 out=f32 bias=f32 residual=f32 lora(r=5 f32 s=2.0); n=24 w=f32 out=f32",
    "conv1d_bf16": "k=301 x=bf16; n=70 wt=bf16 out=bf16 bias=bf16 lora(r=8 f32 s=2.0); n=1042 wt=bf16 out=bf16",
    "conv1d_mixed": "k=9 x=f16; n=3 wt=bf16 out=f32 bias=f16",
    "gaws": "k=64 x=f32; n=48 w=f32 out=f32 kron(4*12x16*1 f32 s=1.0)",
    "gaws_odd": "k=30 x=f32; n=21 w=f32 out=f32 bias=f32 residual=f32 kron(3*7x10*1 f32 s=2.5)",
    "gaws_diag": "k=96 x=bf16; n=40 w=bf16 out=bf16 kron(8*diag12*1 8*5x12*1 f32 s=1.0)",
    "gawsd": "k=96 x=f32; n=72 w=f32 out=f32 kron(1*6x8*12 f32 s=1.0); n=48 w=f32 out=f32 kron(1*4x8*12 f32 s=-2.0)",
    "gawsd_wide": "k=300 x=bf16; n=200 w=bf16 out=bf16 bias=bf16 kron(1*diag3*100 1*2x3*100 bf16 s=tensor.f32)",
    "lokr": "k=60 x=f32; n=66 w=f32 out=f32 lora(r=3 f32 s=0.5) kron(1*6x5*12 6*4x12*1 6*11x4*1 f32 s=2.0)",
    "lokr_left": "k=40 x=f16; n=24 w=f16 out=f16 kron(1*2x5*8 1*3x2*8 3*8x8*1 f16 s=tensor.f64) "
    "kron(4*6x10*1 f32 s=1.0)",
    "gaws_conv1d": "k=64 x=f32; n=48 wt=f32 out=f32 bias=f32 kron(4*12x16*1 f32 s=1.0) kron(1*3x4*16 f32 s=1.0); "
    "n=8 w=f32 out=f32 lora(r=4 f32 s=1.0)",
    "blocks": "k=60 x=bf16; n=66 w=bf16 out=bf16 bias=f32 kron(1*6of11x10*1 f32 s=2.0); n=20 w=f32 out=f32",
    "blocks_chain": "k=64 x=f32; n=48 w=f32 out=f32 kron(1*8x64*1 1*4of12x2*1 f32 s=tensor.f32) "
    "kron(1*16of2x4*1 1*3x2*16 f32 s=0.5); n=48 wt=f32 out=f32 kron(1*4of4x16*1 1*48x16*1 bf16 s=1.0)",
    "given": "k=48 x=f32; n=20 w=f32 out=f32 bias=f32 given(r=4 f32 z=f32); n=9 w=f32 out=f32 given(r=17 f32 z=bf16)",
    "given_too": "k=70 x=bf16; n=21 w=bf16 out=bf16 lora(r=5 f32 s=2.0) given(r=8 f32 z=bf16) given(r=3 bf16 z=bf16) "
    "kron(7*3x10*1 f32 s=1.0); n=16 w=f32 out=bf16",
    "given_conv1d": "k=60 x=bf16; n=44 wt=bf16 out=bf16 bias=bf16 residual=bf16 given(r=16 f32 z=bf16)",
    "rowscale": "k=48 x=f32; n=20 w=f32 out=f32 bias=f32 residual=f32 rowscale=f32 lora(r=4 f32 s=2.0); "
    "n=9 w=f32 out=f32 rowscale=f32",
    "rowscale_kron": "k=64 x=bf16; n=48 wt=bf16 out=bf16 bias=bf16 rowscale=f32 kron(4*12x16*1 f32 s=1.0) "
    "lora(r=3 f32 s=1.0)",
    "opaque": "k=70 x=bf16; n=21 opaque=bf16 out=bf16 bias=f32 lora(r=5 f32 s=2.0) given(r=3 f32 z=bf16); "
    "n=64 opaque=bf16 out=f32 lora(r=16 f32 s=tensor.f32); n=9 w=bf16 out=bf16 lora(r=4 f32 s=1.0)",
    "opaque_kron": "k=64 x=f32; n=48 opaque=f32 out=f32 kron(4*12x16*1 f32 s=1.5); "
    "n=32 opaque=f32 out=f16 lora(r=3 f32 s=1.0) kron(1*2x4*16 2*16x16*1 f32 s=1.0)",
    "long_rows": "k=307 x=f32; n=21 w=f32 out=f32 bias=f32 lora(r=5 f32 s=2.0);"
    " n=8 w=bf16 out=f32 lora(r=3 bf16 s=1.0)",
    "long_rows_16": "k=365 x=bf16; n=22 w=bf16 out=bf16 residual=bf16 lora(r=5 f32 s=2.0); n=7 w=f16 out=bf16",
    "long_rows_even": "k=1024 x=f16; n=10 w=f16 out=f32 lora(r=4 f32 s=1.0); n=6 w=f32 out=f32",
    "bank": "k=48 x=f32; n=20 w=f32 out=f32 bias=f32 residual=f32 bank(f32); n=9 w=f32 out=f32 bank(f32)",
    "bank_16": "k=100 x=bf16; n=36 w=bf16 out=bf16 lora(r=5 f32 s=2.0) bank(bf16); "
    "n=44 wt=bf16 out=bf16 bank(f32); n=40 w=bf16 out=bf16 kron(10*4x10*1 f32 s=1.0) bank(f16)",
    "bank_panels": "k=1100 x=bf16; n=70 w=bf16 out=bf16 bank(bf16); n=44 wt=bf16 out=f32 bank(f32)",
    "bank_beside_lora": "k=64 x=f32; n=40 w=f32 out=f32 lora(r=5 f32 s=2.0) bank(f32)",
    "bank_beside_all": "k=64 x=f32; n=21 w=f32 out=f32 bias=f32 rowscale=f32 lora(r=5 f32 s=2.0) given(r=3 f32 z=f32) "
    "bank(f32); n=48 wt=f32 out=f32 bias=f32 lora(r=3 f32 s=1.0) kron(4*12x16*1 f32 s=1.0) bank(f32)",
    "bank_wide_modes": "k=840 x=bf16; n=420 w=bf16 out=bf16 bank(bf16); n=1260 w=bf16 out=f32 bank(f32)",
    "deep": "k=1100 x=f32; n=70 w=f32 out=f32 bias=f32 lora(r=5 f32 s=2.0); n=9 w=f32 out=f32 residual=f32",
    "mixed": "k=33 x=bf16; n=21 w=bf16 out=f32 bias=f32 residual=bf16 lora(r=4 f16 s=2.0)",
}
BANKS = {name: SPECS[name] for name in ("bank", "bank_panels", "bank_beside_lora")} | {
    "bank_swiglu": "k=48 x=f32 swiglu; n=36 w=f32 out=f32 bank(f32); n=36 w=f32 out=f32 bank(f32)",
    "bank_packed": "k=64 x=bf16; n=36 packed(int8 g=64 s=f32) out=bf16 bank(f32); n=20 w=bf16 out=bf16; "
    "n=24 packed(int8 g=64 s=f32) out=bf16 bank(bf16)",
}
SLOW_BANK = pytest.param("bank_packed", marks=pytest.mark.slow)  # takes long to build
TOKENS = (1, 2, 3, 5, 6, 7, 13, 40)
REPEATS = ("long_rows_16", "long_rows_even", "bank_16", "bank_wide_modes", "bank_beside_all", "conv1d_bf16")
"""What the others would show too, but for sizes: kernels that take long to build or to judge."""


def named(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in REPEATS else name for name in names]


class Libraries(dict[str, ctypes.CDLL]):
    """The kernels of `SPECS` and `BANKS`, by name; built when they are asked for, if not before."""

    def __missing__(self, name: str) -> ctypes.CDLL:
        self[name] = ctypes.CDLL(str(build.start(cpp.emit(KernelSpec.parse((SPECS | BANKS)[name]))).result()))
        return self[name]


@pytest.fixture(scope="module")
def libraries(request: pytest.FixtureRequest) -> Libraries:
    """Those that the chosen tests name are built side by side."""
    chosen = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    for name in dict.fromkeys(params["name"] for params in chosen if params.get("name") in SPECS):
        build.start(cpp.emit(KernelSpec.parse(SPECS[name])))
    return Libraries()


def run(library: ctypes.CDLL, entry: str, problem: Problem, start: list[torch.Tensor] | None) -> list[torch.Tensor]:
    """Call one kernel on outputs that lie between NaNs; `start` is what they hold before (NaN by default)."""
    m = problem.x.shape[0]
    buffers, outputs = [], []
    for i, p in enumerate(problem.spec.projections[: 1 if problem.spec.swiglu else None]):
        buffers.append(torch.full((m * p.n + 2 * GUARD,), float("nan"), dtype=TORCH[p.out]))
        outputs.append(buffers[i][GUARD:-GUARD].view(m, p.n))
        if start is not None:
            outputs[i].copy_(start[i])
    operands = [problem.operands[o.name] for o in problem.spec.operands()]
    inputs = (ctypes.c_void_p * len(operands))(*[t.data_ptr() for t in operands])
    targets = (ctypes.c_void_p * len(outputs))(*[t.data_ptr() for t in outputs])
    getattr(library, entry)(ctypes.c_int64(m), ctypes.c_void_p(problem.x.data_ptr()), inputs, targets)
    for buffer in buffers:
        assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all(), f"{entry} wrote outside its output"
    return outputs


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("name", named(SPECS))
def test_gemv(libraries, name, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for m in TOKENS:
            problem = Problem.of(SPECS[name], m, seed=m)
            problem.check(run(libraries[name], "gemv", problem, None))
    finally:
        torch.set_num_threads(before)


def of_adapters(name: str, m: int, ranks: list[tuple[int, int]], *rows: list[list[int]], seed: int = 0) -> Problem:
    """Banks of the same adapters, of so many ranks and other columns of B (one for a bias, two for DoRA), and a mode as
    the last: for each bank the numbers of those that a row of the batch has. One list of rows is for all banks."""
    spec, generator = KernelSpec.parse(BANKS[name]), torch.Generator().manual_seed(seed)
    problem = Problem.of(BANKS[name], m, seed=m + seed)
    for number, i in enumerate(i for i, p in enumerate(spec.projections) if p.banked):
        p, adapters, end = spec.projections[i], [], 0
        for rank, more in ranks:
            b = -(-(end + rank * spec.k) // banked.UNIT)
            adapters.append([banked.Use(end // banked.UNIT, b, rank, rank + more, 0.25 * rank, 1.0)])
            end = -(-(b * banked.UNIT + p.n * (rank + more)) // banked.UNIT) * banked.UNIT
        adapters.append(banked.modes_of([(end // banked.UNIT, (1, p.n, spec.k, 1))], 0.5))
        pool = torch.randn(end + p.n * spec.k, generator=generator)
        chosen = [[use for adapter in row for use in adapters[adapter]] for row in rows[number % len(rows)]]
        schedule = banked.pack(chosen, len(adapters))
        problem.operands |= {f"pool{i}": guarded(pool.to(TORCH[p.banked.dtype])), f"schedule{i}": schedule}
    return Problem.with_operands(spec, problem.x, problem.operands)


@pytest.mark.parametrize("name", ["bank", pytest.param("bank_panels", marks=pytest.mark.slow), "bank_beside_lora"])
def test_gemm_of_one_mixture(libraries, name):
    """Where all rows have the same plain adapters, ΔW is in the panels: here of more ranks than are added at once. What
    the call before has left of u may not join it."""
    for seed, rows in enumerate(([[0, 1, 2], [1, 2]], [[0, 1, 2]] * 2)):
        problem = of_adapters(name, 514, [(3, 0), (40, 0), (16, 0)], rows, seed=seed)
        problem.check(run(libraries[name], "gemm", problem, None))


@pytest.mark.parametrize(("rank", "threads"), [(3, 1), (16, 2), (40, 7)])
@pytest.mark.parametrize("name", [*(name for name in BANKS if name != "bank_packed"), SLOW_BANK])
def test_gemv_of_one_adapter(libraries, name, rank, threads):
    """Where all rows have one plain adapter, or none, rows of weights are multiplied by code of their own. It must not
    run where a row has another, none or both, nor where the adapter has a bias, is DoRA's or a mode."""
    plain, other, bias, dora, mode = range(5)
    usual = [[[plain]], [[]], [[other]] * 2]
    unusual = [[[plain], [other]], [[plain], []], [[plain, other]] * 2, [[bias]], [[dora]] * 2, [[mode]]]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for banks in [*((rows,) for rows in usual), *((rows, [[plain]]) for rows in unusual)]:
            for rows in {str(one): one for one in (banks, banks[::-1])}.values():
                m = 3 * math.lcm(*map(len, rows))
                problem = of_adapters(name, m, [(rank, 0), (5, 0), (rank, 1), (rank, 2)], *rows)
                problem.check(run(libraries[name], "gemv", problem, None))
    finally:
        torch.set_num_threads(before)


def test_gemm_without_active_adapters_waits_for_x(libraries):
    """Where no thread computes u, each still reads what the others have widened of x, not what the call before had."""
    spec, problems, before = KernelSpec.parse(SPECS["bank_panels"]), [], torch.get_num_threads()
    for seed in range(2):
        drawn = Problem.of(SPECS["bank_panels"], 514, seed=seed)
        drawn.operands |= {f"schedule{i}": banked.pack([[]], 1) for i in range(2)}
        problems.append(Problem.with_operands(spec, drawn.x, drawn.operands))
    torch.set_num_threads(7)
    try:
        for problem in problems * 5:
            problem.check(run(libraries["bank_panels"], "gemm", problem, None))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("name", named(name for name in SPECS if cpp.takes_panels(KernelSpec.parse(SPECS[name]))))
def test_gemm(libraries, name, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for m in (0, *TOKENS, 515):  # none, to more than are kept at once
            problem = Problem.of(SPECS[name], m, seed=m)
            problem.check(run(libraries[name], "gemm", problem, None))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_gemm_of_wide_rows(threads):
    """x is too wide to lie in fp32 at once, and is widened some tokens at a time."""
    text = "k=40000 x=bf16; n=9 wt=bf16 out=f32 residual=f32 lora(r=3 f32 s=2.0)"
    library = ctypes.CDLL(str(build.start(cpp.emit(KernelSpec.parse(text))).result()))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for m in (5, 256, 257, 515):
            problem = Problem.of(text, m, seed=m)
            problem.check(run(library, "gemm", problem, None))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("name", named(name for name in SPECS if name != "plain"))
def test_accumulate(libraries, name, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for m in TOKENS:
            problem = Problem.of(SPECS[name], m, seed=m)
            x = problem.x.double()
            products = [
                x @ weight(problem.spec, i, problem.operands).T if p.dense else torch.full((m, p.n), float("nan"))
                for i, p in enumerate(problem.spec.projections)
            ]
            problem.check(run(libraries[name], "accumulate", problem, products))
    finally:
        torch.set_num_threads(before)


def test_scratch_of_a_long_call_does_not_leak_into_a_short_one(libraries):
    name = "ranks_17_and_64"
    for m in (40, 1, 13, 2):
        problem = Problem.of(SPECS[name], m, seed=m)
        problem.check(run(libraries[name], "gemv", problem, None))


def test_infinities_and_nans_stay_where_they_are(libraries):
    problem = Problem.of(SPECS["qkv"], 3)
    problem.x[1, 5] = float("inf")
    problem.operands["w0"][7, 3] = float("nan")
    q, k, _ = run(libraries["qkv"], "gemv", problem, None)
    assert not q[1].isfinite().any() and q[:, 7].isnan().all()
    others = torch.arange(48) != 7
    assert q[0, others].isfinite().all() and q[2, others].isfinite().all() and k[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_numbers_are_rounded_to_the_nearest(dtype):
    """Of what a kernel writes: ties to even, NaNs stay, too much is infinite. (Subnormal numbers may become zeros.)"""
    text = f"k=16 x=f32; n=77 opaque=f32 out={dtype} lora(r=1 f32 s=1.0)"
    library = ctypes.CDLL(str(build.start(cpp.emit(KernelSpec.parse(text))).result()))
    problem = Problem.of(text, 9)
    problem.operands["b0_0"].zero_()
    bits = torch.randint(-(2**31), 2**31, (9, 77), generator=torch.Generator().manual_seed(0)).int()
    bits[:4] = bits[:4] & ~0xFFFF | 0x8000  # halfway between two numbers of bf16
    bits[4:6] = bits[4:6] & ~0x1FFF | 0x1000  # and of fp16
    numbers = bits.view(torch.float32)
    numbers = torch.where(numbers.abs() < torch.finfo(torch.float32).tiny, 0.0, numbers)
    numbers[6:] = numbers[6:].frexp()[0] * 2.0 ** torch.randint(-13, 16, (3, 77))
    problem.operands["base0"].copy_(numbers)
    for entry in ("gemv", "accumulate"):
        (got,) = run(library, entry, problem, None)
        torch.testing.assert_close(got, numbers.to(TORCH[dtype]), rtol=0, atol=0, equal_nan=True)


def test_everyone_waits_between_a_stage_and_what_reads_it():
    for name, stages in {"plain": 0, "given": 0, "qkv": 1, "gaws": 1, "lokr": 3, "rowscale_kron": 1, "bank": 2}.items():
        text = cpp.emit(KernelSpec.parse(SPECS[name]))
        for entry in text.split('extern "C" void ')[1:]:
            assert entry.count("#pragma omp barrier") == stages, name


def test_source_is_deterministic_and_says_what_it_computes():
    spec = KernelSpec.parse(SPECS["qkv"])
    text = cpp.emit(spec)
    assert text == cpp.emit(KernelSpec.parse(str(spec)))
    assert text.startswith("// gawscompile: plan gemv_cpp")
    assert f"// spec: {spec}\n" in text
    assert all(f"// {formula}\n" in text for formula in spec.formulas())


def test_plain_projections_have_no_dead_code():
    text = cpp.emit(KernelSpec.parse(SPECS["plain"]))
    own = text.replace(cpp.PRELUDE, "")
    for word in ("LDU", "scratch", "barrier", "void accumulate", "bias", "res0"):
        assert word not in own


def test_snapshot():
    """The generated part of one kernel, as committed: a change of the emitter shows in review."""
    text = cpp.emit(KernelSpec.parse(SPECS["qkv"])).replace(cpp.PRELUDE + "\n", "// (prelude.cpp)\n")
    text = text.replace(cpp.PANELS + "\n", "// (panels.cpp)\n")
    if os.environ.get("GAWS_UPDATE_SNAPSHOTS"):
        SNAPSHOT.write_text(text)
    assert text == SNAPSHOT.read_text(), "run with GAWS_UPDATE_SNAPSHOTS=1 and read the difference"


@pytest.mark.skipif("AVX" not in torch.backends.cpu.get_cpu_capability(), reason="vectors are ATen's")
def test_only_kernels_with_exp_are_linked_with_torch(tmp_path):
    """Where one that needs torch is not, it cannot be loaded: tests that run it show that."""
    both = {"qkv": SPECS["qkv"], "swiglu": "k=64 x=f32 swiglu; n=48 w=f32 out=f32; n=48 w=f32 out=f32"}
    linked = {}
    for name, text in both.items():
        source = tmp_path / f"{name}.cpp"
        source.write_text(cpp.emit(KernelSpec.parse(text)))
        linked[name] = [word for word in build._command(source, tmp_path / "out.so") if word.startswith("-ltorch")]
    assert not linked["qkv"] and "-ltorch_cpu" in linked["swiglu"]
