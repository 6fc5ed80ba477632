"""Inductor's wrapper without the checks that our op makes itself.

Before it first uses an input, and after every call of an op, Inductor's wrapper compares the tensor's sizes and strides
with those that were traced. With LoRA on every linear most of these are of weights and factors that only
`gaws::project` reads, and of what it returns. The op compares each operand's dtype, shape and device with its kernel's
in every call, copies what is laid out otherwise, and lays out its outputs itself (`runtime/dispatch.cpp`), so those are
left out. All others stay.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch._inductor.codegen.wrapper import PythonWrapperCodegen

from gawscompile.runtime import ops

INPUT = "input"  # what Inductor gives as the name of an op, for the graph's inputs
RETURNED = tuple(f"torch.ops.{op}" for op in ops.OPS)
HOOK = "write_assert_size_stride"


class _Compiling(threading.local):
    """Inputs that only our op reads, of the graph that this thread compiles; None where it compiles none of ours."""

    operands: Collection[str] | None = None


_compiling = _Compiling()


@contextlib.contextmanager
def without_ours(operands: Collection[str]) -> Iterator[None]:
    """While Inductor compiles in this thread: what only our op reads, inputs of these names (the set may fill
    meanwhile), and what it returns are not checked."""
    _install()
    before, _compiling.operands = _compiling.operands, operands
    try:
        yield
    finally:
        _compiling.operands = before


@functools.cache
def _install() -> None:
    """Once in a process. Does nothing where Inductor's wrapper has another shape than the one that we know."""
    write = getattr(PythonWrapperCodegen, HOOK, None)
    if write is None:
        return

    @functools.wraps(write)
    def ours_left_out(wrapper: Any, name: str, size: str, stride: str, op_name: str) -> Any:
        operands = _compiling.operands
        if operands is None or not (name in operands if op_name == INPUT else op_name in RETURNED):
            write(wrapper, name, size, stride, op_name)

    setattr(PythonWrapperCodegen, HOOK, ours_left_out)


def only_operands(graph: torch.fx.Graph) -> set[str]:
    """Names of a graph's inputs on a CPU that are operands of our op as they are, and nothing else.

    The op's activation is none: the shape of what is returned, which others rely on, is the activation's.
    """
    return {str(node.target) for node in graph.find_nodes(op="placeholder") if _only_operand(node)}


def _only_operand(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    on_cpu = isinstance(value, torch.Tensor) and value.device.type == "cpu"
    return on_cpu and all(user.target in ops.OPS and user.args[0] is not node for user in node.users)
