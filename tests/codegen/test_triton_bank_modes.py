"""A bank's chains of mode products in Triton. Numbers: `test_triton_numbers.py`, cases ``bank_modes``."""

from __future__ import annotations

import re

from gawscompile.codegen import triton as emitter
from gawscompile.ir.spec import KernelSpec


def test_each_stage_of_a_bank_s_chains_waits_for_the_one_before():
    """The interpreter runs programs one after the other, in their order, so no number shows it."""
    spec = KernelSpec.parse("k=64 x=bf16; n=48 w=bf16 out=bf16 lora(r=4 f32 s=2.0) bank(bf16 x6 modes=4)")
    text = emitter.emit(spec, emitter.Plan("single_launch", 8))
    works = re.split(r"\n@triton.jit\n", text)
    waits = [re.findall(r"wait\(flags, (\d), ", work) for work in works if "def project_gemv_" in work]
    assert waits == [[], [], [], ["0"], ["1"], ["2"]]
