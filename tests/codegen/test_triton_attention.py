"""Attention's Triton kernels compiled ahead of time: keys and values in loads of 16 bytes, nothing spilled.

Their numbers in the interpreter: `test_triton_numbers.py`; on a device, or its stand-in: `tests/gpu/test_attention.py`.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from gawscompile.codegen import triton_aot, triton_attention

KERNELS = [
    ("attend d=64 x=bf16 cap=50.0", 3),
    ("attend d=64 x=bf16", 3),
    ("attend d=256 x=f16", 64),
    ("attend d=64 x=f32", 3),
    ("attend d=128 x=bf16", 64),
]
"""With the queries of all heads of a group. What has a soft cap has sinks."""


@pytest.mark.parametrize("target", triton_aot.TARGETS)
@pytest.mark.parametrize(
    ("kernel", "rows"), [KERNELS[0], *(pytest.param(*one, marks=pytest.mark.slow) for one in KERNELS[1:])]
)
def test_every_target(kernel, rows, target):
    part, join = triton_attention.variants(kernel, rows, sinks="cap" in kernel)
    for variant in (part, join):
        compiled = triton_aot.compile_variant(getattr(triton_attention, variant.kernel), variant, target)
        assert compiled.spills == 0 and compiled.looped_spills == 0, compiled
        if variant is part:
            assert set(compiled.loads["at_k"]) == set(compiled.loads["at_v"]) == {16}, compiled
