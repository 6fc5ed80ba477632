"""triton_text: what is printed of ranges and blocks."""

from __future__ import annotations

from gawscompile.codegen.triton_text import Cut


def test_what_makes_no_whole_blocks_is_masked():
    assert Cut(37, 64).masked and Cut(101, 64).masked and not Cut(128, 64).masked
