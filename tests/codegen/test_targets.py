"""Names of GPUs to compile for: LLVM ends the process over one that it does not know, so we ask first."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gawscompile import ahead
from gawscompile.cli import main
from gawscompile.codegen import triton_aot
from gawscompile.codegen.triton import Plan
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import SpecError

BAD = {
    "cuda:12": "cuda:120",
    "cuda": "cuda:90",
    "cuda:": "cuda:90",
    "cuda:9": "cuda:90",
    "cuda:90a": "cuda:90",
    "cuda:9.0": "cuda:90",
    "cuda:12.0": "cuda:120",
    "CUDA:90": "cuda:90",
    " cuda:90": "cuda:90",
    "cuda:９０": "cuda:90",
    "cuda:90\n": "cuda:90",
    "cuda90": "cuda:90",
    "cuda:091": "cuda:90",
    "90": "cuda:90",
    "sm_90": "cuda:90",
    "sm_100a": "cuda:100",
    "compute_80": "cuda:80",
    "hip": "hip:gfx942",
    "hip:gfx9": "hip:gfx942",
    "hip:gfx942:sramecc+": "hip:gfx942",
    "gfx950": "hip:gfx950",
    "gfx90a": "hip:gfx90a",
    "rocm:gfx942": "hip:gfx942",
    "rocm": "hip:gfx942",
    "cuda:abc": None,
    "cuda:-90": "cuda:90",
    "cuda:999999999999999999999": None,
    "hip:90": "hip:gfx950",
    "metal:1": None,
    "": None,
    "ünïcødé:\udcff\x00": None,
}


@pytest.mark.parametrize(("target", "meant"), BAD.items(), ids=map(ascii, BAD))
def test_a_bad_target_is_refused_before_llvm_sees_it(target: str, meant: str | None):
    spec = KernelSpec.parse("k=64 x=bf16; n=64 w=bf16 out=bf16")
    for refuses in (
        lambda: triton_aot.parse_target(target),
        lambda: ahead.gpu_for(target),
        lambda: triton_aot.compile_plan(spec, Plan("stream", 8), target),
    ):
        with pytest.raises(SpecError) as raised:
            refuses()
        said = str(raised.value)
        assert said.startswith(f"not a target: {target!r}") and "There are cuda:75, cuda:80" in said
        assert f"did you mean {meant}?" in said if meant else "did you mean" not in said


def test_the_command_says_it_in_one_line_before_it_loads_anything(tmp_path, capsys):
    command = ["emit", "--model", str(tmp_path), "--target", "cuda:12", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "did you mean cuda:120?" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", triton_aot.KNOWN)
def test_every_known_target_has_a_gpu_for_the_cost_model(target: str):
    pytest.importorskip("triton")
    made = triton_aot.parse_target(target)
    assert f"{made.backend}:{made.arch}" == target and made.warp_size == (32 if made.backend == "cuda" else 64)
    assert ahead.gpu_for(target).target.partition(":")[0] == made.backend


@pytest.mark.slow
def test_every_known_target_compiles():
    """In a process of its own: it would die of one that LLVM does not know."""
    pytest.importorskip("triton")
    program = """
import sys
from gawscompile.codegen import triton, triton_aot
from gawscompile.ir.spec import KernelSpec
spec = KernelSpec.parse("k=64 x=bf16; n=64 w=bf16 out=bf16 lora(r=8 bf16 s=2.0)")
for target in triton_aot.KNOWN:
    for plan in ("single_launch[8]", "fused_tile"):
        assert triton_aot.compile_plan(spec, triton.Plan.parse(plan), target), (target, plan)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
