"""Triton kernels compiled ahead of time, for four targets and without a GPU: resources, loads, memory ordering."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gawscompile.codegen import triton as emitter
from gawscompile.codegen import triton_aot as ahead
from gawscompile.codegen.triton import Plan
from gawscompile.codegen.triton_aot import TARGETS, Compiled
from gawscompile.ir.spec import KernelSpec
from tests.codegen.triton_specs import (
    BACKWARD,
    BACKWARD_NARROW,
    BANK,
    BANK_MODES,
    CONV1D,
    CROSSING,
    DORA,
    F32,
    F32_ADAPTERS,
    GAWS,
    GAWSD,
    GIVEN,
    GIVEN_SWIGLU,
    INT8,
    KRONECKER,
    LOKR,
    LONG,
    MIXED,
    NF4,
    QKV,
    SWIGLU,
    llama,
)

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter replaces the compiler")

NVIDIA = [target for target in TARGETS if target.startswith("cuda")]
SHARED_MEMORY = {"cuda": 99 << 10, "hip": 64 << 10}  # an sm_86 has 99 KiB
LLAMA = llama(*["lora(r=16 bf16 s=2.0)"] * 3)
LLAMA_WIDE = llama(*["lora(r=64 bf16 s=2.0)"] * 3)
SINGLE, REDUNDANT, TWO = (Plan(name, 8) for name in ("single_launch", "redundant_shrink", "two_launch"))
KRON = Plan("kron_epilogue", 8)
SHORT = KernelSpec.parse("k=512 x=bf16; n=256 packed(nf4 g=64 s=f32) out=bf16 residual=bf16 lora(r=16 f32 s=2.0)")
SHORT_GAWS = KernelSpec.parse(
    "k=512 x=bf16; n=512 w=bf16 out=bf16 residual=bf16 lora(r=16 bf16 s=2.0) kron(4*128x128*1 f32 s=1.0)"
)
STREAM = Plan("stream", 8)
TILE, GEMM = Plan("fused_tile"), Plan("gemm_accumulate")


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing comes from an earlier run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GAWS_CACHE_DIR", "TRITON_CACHE_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        emitter.load.cache_clear()
        yield
        emitter.load.cache_clear()


def _checked(compiled: Compiled, registers: int | None, spills: int = 0) -> None:
    assert compiled.spills <= spills, "spills, or arrays in local memory"
    assert compiled.shared <= SHARED_MEMORY[compiled.target.partition(":")[0]]
    assert registers is None or compiled.registers <= registers


FAST = ("cuda:90", "hip:gfx942")
ON_ALL = [(LLAMA, SINGLE), (LLAMA, TILE)]
ON_ONE = [(GAWS, KRON), (LOKR, SINGLE), (DORA, SINGLE), (GIVEN, TILE), (BANK, SINGLE)]
ON_ONE += [(BANK_MODES, SINGLE)]
"""Kernels that the fast tests compile for NVIDIA and for AMD, and for NVIDIA alone."""
OTHERS = [(LLAMA, GEMM), (GAWSD, KRON), (LOKR, TILE), (SWIGLU, SINGLE), (GIVEN, STREAM), (BANK, TWO), (BANK, GEMM)]
OTHERS += [(BANK_MODES, plan) for plan in (TWO, TILE, GEMM)]
OTHERS += [(SWIGLU, TILE), (BANK, TILE), (BACKWARD, TILE), (BACKWARD, GEMM), (BACKWARD_NARROW, STREAM)]


def _targeted(spec: KernelSpec, plan: Plan, target: str) -> Any:
    fast = target in FAST[: 2 if (spec, plan) in ON_ALL else 1 if (spec, plan) in ON_ONE else 0]
    return pytest.param(spec, plan, target, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(
    ("spec", "plan", "target"),
    [_targeted(*one, target) for one in (*ON_ALL, *ON_ONE, *OTHERS, (GIVEN_SWIGLU, STREAM)) for target in TARGETS],
    ids=lambda value: str(value)[:14],
)
def test_every_target(spec: KernelSpec, plan: Plan, target: str):
    for compiled in ahead.compile_plan(spec, plan, target):
        # A tile of gate and up keeps both its sums in registers; one of a bank's modes keeps two sums, and spills up to
        # 16 bytes outside of the loops.
        modes = spec is BANK_MODES and plan in (TILE, GEMM)
        wide = modes or (spec is SWIGLU and plan is TILE)
        _checked(compiled, None if target.startswith("hip") or wide else 128, 16 if modes else 0)
        widths = compiled.loads.get("w", {16: 1})
        assert set(widths) == {16}, f"{compiled.name} loads W by {widths}"


@pytest.mark.parametrize(
    "target", [one if one == FAST[0] else pytest.param(one, marks=pytest.mark.slow) for one in TARGETS]
)
@pytest.mark.parametrize(
    ("spec", "plan"),
    [(NF4, SINGLE), (NF4, TILE), (INT8, SINGLE), pytest.param(INT8, TILE, marks=pytest.mark.slow)],
    ids=["nf4-single", "nf4-tile", "int8-single", "int8-tile"],
)
def test_packed_weights_on_every_target(spec: KernelSpec, plan: Plan, target: str):
    """A step has as many codes as it has weights of 16 bits elsewhere, so loads are narrower: a tile's lies within a
    group, and a wave of AMD's has twice the lanes."""
    hip = target.startswith("hip")
    least = (16 if plan is SINGLE else 8) // (2 if hip and spec is NF4 else 1)
    for compiled in ahead.compile_plan(spec, plan, target):
        _checked(compiled, None if hip else 128)
        widths = compiled.loads.get("w", {16: 1})
        assert min(widths) >= least, f"{compiled.name} loads codes by {widths}"


@pytest.mark.parametrize(
    ("spec", "plan"),
    [
        (SHORT, REDUNDANT),
        (SHORT_GAWS, REDUNDANT),
        *(pytest.param(spec, plan, marks=pytest.mark.slow) for spec in (NF4, INT8) for plan in (REDUNDANT, TWO)),
    ],
    ids=lambda value: str(value)[:30],
)
def test_no_loop_has_a_name_of_another(spec: KernelSpec, plan: Plan):
    """Where one step is all of W's columns, or G's, and half of A's, names of that step are seen in A's loop."""
    for compiled in ahead.compile_plan(spec, plan, "cuda:90"):
        _checked(compiled, None)


@pytest.mark.parametrize(
    ("spec", "plan"),
    [
        *((LLAMA, plan) for plan in (SINGLE, REDUNDANT, TWO)),
        *(pytest.param(QKV, plan, marks=pytest.mark.slow) for plan in (SINGLE, REDUNDANT, TWO)),
        *(pytest.param(LLAMA_WIDE, plan, marks=pytest.mark.slow) for plan in (SINGLE, REDUNDANT, TWO)),
        *((spec, SINGLE) for spec in (F32, MIXED, LONG)),
        *(pytest.param(spec, TILE, marks=pytest.mark.slow) for spec in (F32, MIXED, LONG, *KRONECKER.values())),
        (CONV1D, SINGLE),
        (CROSSING, SINGLE),
        (SWIGLU, REDUNDANT),
        pytest.param(SWIGLU, GEMM, marks=pytest.mark.slow),
        (QKV, Plan("single_launch", 4)),
        (QKV, Plan("single_launch", 32)),
    ],
    ids=lambda value: str(value)[:30],
)
def test_sm_90(spec: KernelSpec, plan: Plan):
    for compiled in ahead.compile_plan(spec, plan, "cuda:90"):
        _checked(compiled, None if spec in (CROSSING, MIXED) else 128)


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("k=64 x=bf16; n=64 w=bf16 out=bf16 lora(r=8 bf16 s=2.0); n=64 w=bf16 out=bf16 lora(r=8 f16 s=2.0)", SINGLE),
        ("k=64 x=bf16; n=64 w=bf16 out=bf16 lora(r=8 bf16 s=2.0); n=64 w=bf16 out=bf16 lora(r=8 f16 s=2.0)", REDUNDANT),
        ("k=64 x=bf16; n=64 w=bf16 out=bf16 bias=bf16; n=64 w=bf16 out=bf16 bias=f16", TILE),
        ("k=64 x=f32; n=64 w=bf16 out=f32; n=64 w=f16 out=f32", Plan("stream", 8)),
        ("k=64 x=f32 swiglu; n=64 w=bf16 out=f32; n=64 w=f16 out=f32", Plan("stream", 8)),
    ],
)
def test_siblings_of_two_half_precisions(text: str, plan: Plan):
    """They read alike in the source; a pointer chosen in a branch has one type, which the interpreter cannot see."""
    for compiled in ahead.compile_plan(KernelSpec.parse(text), plan, "cuda:90"):
        _checked(compiled, None)


def test_decode_streams_weights():
    (_, expand) = ahead.compile_plan(QKV, Plan("two_launch", 4), "cuda:90")
    assert expand.loads["w"] == expand.loads["x"] and set(expand.loads["w"]) == {16}, "one load of each in a step"
    assert "bar.sync" not in str(expand.files["ptx"]), "a barrier would keep loads of later steps from starting"


@pytest.mark.parametrize(
    ("spec", "plan"), [(GAWS, KRON), (GAWSD, KRON), (CONV1D, TWO)], ids=["gaws", "gawsd", "conv1d"]
)
def test_decode_reads_weights_and_factors_in_16_byte_loads(spec: KernelSpec, plan: Plan):
    compiled = ahead.compile_plan(spec, plan, "cuda:90")[-1]
    assert set(compiled.loads["w"]) == {16}
    if spec is GAWS:
        assert set(compiled.loads["g0_0"]) == {16}


@pytest.mark.parametrize(
    "target", [one if one in FAST else pytest.param(one, marks=pytest.mark.slow) for one in NVIDIA]
)
def test_fp32_is_never_tf32(target: str):
    for compiled in ahead.compile_plan(F32_ADAPTERS, TILE, target):
        if compiled.kernel == "shrink_tile":
            assert "tf32" not in str(compiled.files["ptx"])


# --- Ordering of memory between the programs of a single launch ----------------------------------------------

RELEASE = {"cuda": "MEMBAR.ALL.GPU", "hip": "buffer_wbl2 sc1"}
ACQUIRE = {"cuda": "CCTL.IVALL", "hip": "buffer_inv sc1"}


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
@pytest.mark.parametrize("relaxed", [None, "release", "acquire"])
def test_a_single_launch_releases_and_acquires(target: str, relaxed: str | None, tmp_path: Path):
    """The interpreter runs programs one after the other and cannot see this. Relaxing either must show here."""
    text = emitter.emit(QKV, SINGLE)
    assert text.count('sem="release"') == text.count('sem="acquire"') == 1
    path = tmp_path / f"relaxed_{relaxed}_{target.partition(':')[0]}.py"
    path.write_text(text.replace(f'sem="{relaxed}"', 'sem="relaxed"'))
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[path.stem] = module
    found.loader.exec_module(module)
    (variant,) = emitter.variants(QKV, SINGLE)
    compiled = ahead.compile_variant(module.project_gemv, variant, target)
    kind = target.partition(":")[0]
    assert (RELEASE[kind] in compiled.ordering) == (relaxed != "release")
    assert (ACQUIRE[kind] in compiled.ordering) == (relaxed != "acquire")


@pytest.mark.parametrize("spec", [LLAMA, SWIGLU], ids=["qkv", "swiglu"])
def test_weights_stream_before_the_wait_and_u_is_read_after_it(spec: KernelSpec):
    (compiled,) = ahead.compile_plan(spec, SINGLE, "cuda:90")
    ptx = str(compiled.files["ptx"])
    (wait,) = (match.start() for match in re.finditer(r"ld\.global\.gpu\.acquire", ptx))
    assert "ld.global.v4.b32" in ptx[:wait] and "ld.global.v4.b32" not in ptx[wait:], "weights come before the wait"
    assert re.search(r"ld\.global\.b", ptx[wait:]), "and u after it"


@pytest.mark.parametrize(("target", "barrier"), [("cuda:90", "bar.sync"), ("hip:gfx942", "s_barrier")])
def test_all_threads_wait_before_u_is_told_and_before_it_is_read(target: str, barrier: str):
    """In what is printed, whatever Triton adds of itself; and in what it becomes."""
    functions = {f.name: f.body[1:] for f in ast.parse(emitter.emit(LLAMA, SINGLE)).body if hasattr(f, "args")}
    told, waited = (list(map(ast.unparse, functions[name])) for name in ("publish", "wait"))
    assert told[0] == "tl.debug_barrier()" and "sem='release'" in told[1]
    assert "sem='acquire'" in waited[0] and waited[0].startswith("while") and waited[1] == "tl.debug_barrier()"
    (compiled,) = ahead.compile_plan(LLAMA, SINGLE, target)
    if target == "cuda:90":
        ptx = str(compiled.files["ptx"])
        told_at, waited_at = ptx.index("red.global.gpu.release"), ptx.index("ld.global.gpu.acquire")
        written, read = ptx.rindex("st.global.b32", 0, told_at), ptx.index("ld.global.b32", waited_at)
        assert barrier in ptx[written:told_at] and barrier in ptx[waited_at:read]
    else:
        assert str(compiled.files["amdgcn"]).count(barrier) >= 2
