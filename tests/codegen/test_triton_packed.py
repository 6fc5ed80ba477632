"""Packed weights in the Triton emitter: what is refused, what is read once. Numbers: `test_triton_numbers.py`."""

from __future__ import annotations

import re

import pytest
import torch

from gawscompile.codegen import triton as emitter
from gawscompile.codegen.triton_checks import check_arguments
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import SpecError
from tests.codegen.test_triton import emit
from tests.codegen.triton_specs import NF4


@pytest.mark.parametrize("coding", ["uint4_halves g=64 s=f32 z=f32", "table4_blocks g=64 s=f32"])
def test_codes_that_no_kernel_reads_are_refused_by_name(coding: str):
    with pytest.raises(SpecError, match=f"reads weights of the coding {coding.partition(' ')[0]}"):
        emit(f"k=64 x=bf16; n=64 packed({coding}) out=bf16 lora(r=4 bf16 s=2.0)")


def test_the_library_multiplies_no_codes():
    names = {plan.name for plan in emitter.plans(NF4)}
    assert names == {"single_launch", "two_launch", "redundant_shrink", "fused_tile"}


def test_a_byte_of_codes_is_loaded_once():
    for text in (emit(str(NF4), "two_launch"), emit(str(NF4), "fused_tile")):
        assert len(re.findall(r"codes = tl\.load", text)) == 1 and text.count("tl.load(w ") == 1


def test_parts_of_packed_weights_may_have_any_shape():
    spec = KernelSpec.parse("k=64 x=f32; n=4 packed(nf4 g=32 s=f32) out=f32")
    codes, scales = torch.zeros(128, 1, dtype=torch.uint8), torch.zeros(4, 2)
    check_arguments(spec, torch.zeros(1, 64), [codes, scales])
    with pytest.raises(ValueError, match=r"w0 is \[127\] torch.uint8, not \[128\]"):
        check_arguments(spec, torch.zeros(1, 64), [codes[1:, 0], scales])
