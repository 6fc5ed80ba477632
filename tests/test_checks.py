"""Inductor's wrapper checks what our op does not check itself, and no more."""

from __future__ import annotations

import re

import pytest
import torch
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.utils import run_and_get_code

from gawscompile.runtime.operand_checks import HOOK


class Block(torch.nn.Module):
    """A norm whose weight Inductor reads, a LoRA, and a weight that is read by the op and by others."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(48)
        self.base = torch.nn.Linear(48, 40)
        self.a = torch.nn.Parameter(torch.randn(4, 48))
        self.b = torch.nn.Parameter(torch.randn(40, 4))
        self.shared = torch.nn.Parameter(torch.randn(40, 40))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        y = self.base(x) + 0.5 * (x @ self.a.T) @ self.b.T
        return torch.nn.functional.linear(torch.relu(y), self.shared) + self.shared.sum()


@pytest.fixture(scope="module")
def block() -> Block:
    torch.manual_seed(0)
    return Block().eval()


def checked(code: str) -> list[tuple[str, str]]:
    """(sizes, name of the op) of every check in Inductor's wrapper."""
    return re.findall(r"assert_size_stride\(\w+, \((.*?),? ?\), \(.*?\), '(.*?)'\)", code)


@torch.no_grad()
def compiled(block: Block, backend: str) -> tuple[torch.Tensor, list[tuple[str, str]]]:
    torch.compiler.reset()
    x = torch.randn(3, 48)
    run = torch.compile(block, backend=backend, options={"fx_graph_cache": False})
    result, (code,) = run_and_get_code(run, x)
    torch.testing.assert_close(result, block(x), rtol=1e-4, atol=1e-4)
    return result, checked(code)


def test_what_only_our_op_reads_is_left_to_it(block: Block) -> None:
    _, ours = compiled(block, "gaws")
    if not hasattr(PythonWrapperCodegen, HOOK):  # another Inductor: nothing is left out, and nothing may be lost
        assert len(ours) >= len(compiled(block, "inductor")[1])
        return
    assert sorted(ours) == [("3, 48", "input"), ("40, 40", "input"), ("48", "input")]
    _, theirs = compiled(block, "inductor")
    assert len(theirs) > len(ours)
    assert compiled(block, "inductor")[1] == theirs, "nothing is left out for others"


@torch.no_grad()
def test_whoever_checks_a_wrong_shape_is_refused(block: Block) -> None:
    torch.compiler.reset()
    x = torch.randn(3, 48)
    options = {"guard_filter_fn": lambda entries: [False] * len(entries)}  # nothing makes Dynamo compile anew
    run = torch.compile(block, backend="gaws", options=options)
    expected = run(x)
    a, norm = block.a, block.norm.weight
    try:
        block.a = torch.nn.Parameter(torch.randn(4, 47))
        with pytest.raises(RuntimeError, match="operand a0_0 no longer has the dtype, shape or device"):
            run(x)
        block.a = a
        block.norm.weight = torch.nn.Parameter(torch.randn(47))
        with pytest.raises(AssertionError):
            run(x)
        block.norm.weight = norm
        with pytest.raises(AssertionError):
            run(torch.randn(2, 48))
        block.a = torch.nn.Parameter(a.T.contiguous().T)  # other strides are no error
        torch.testing.assert_close(run(x), expected)
    finally:
        block.a, block.norm.weight = a, norm
