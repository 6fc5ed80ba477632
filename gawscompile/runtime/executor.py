"""Inductor's wrapper run without Python: the code that it prints around its kernels, as steps that C++ runs.

For a decode step Inductor prints a thousand lines of Python: allocate, view, call a kernel, call an op, delete. They
take their time in every token. `wrapper.py` writes them down as steps over registers, and `executor.cpp` runs these,
``gaws::project`` included, without the interpreter.

Nothing is built for that, and nothing is kept: a graph from a warm cache is read again, in milliseconds. Where a line
has something that is not known, the graph runs Inductor's Python as before (`wrapper.Unreadable` says why). Inputs are
handed over in every call, so parameters are as live as they were.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch._inductor.output_code import CompiledFxGraph

from gawscompile.runtime import ops
from gawscompile.runtime.wrapper import Code, Unreadable

log = logging.getLogger("gawscompile")


class Executor:
    """The steps of one compiled graph; called as Inductor's wrapper is, with the list of the graph's inputs."""

    def __init__(self, code: Code, wrapper: Any) -> None:
        texts, words = code.texts(), code.words()
        integers = code.integers
        make = _library().gaws_executor
        handle = make(
            ctypes.c_int64(len(code.tensors)),
            ctypes.c_int64(code.registers),
            ctypes.c_int64(len(code.steps)),
            (ctypes.c_int64 * len(words))(*words),
            (ctypes.c_char_p * len(texts))(*[text.encode() for text in texts]),
            ctypes.c_int64(len(integers)),
            (ctypes.c_int64 * len(integers))(*integers),
            ctypes.c_int64(len(code.given)),
        )
        weakref.finalize(self, _library().gaws_executor_free, ctypes.c_void_p(handle))
        self.steps = len(code.steps)
        self.wrapper = wrapper  # holds the kernels
        self._handle = handle
        self._tensors, self._given, self._tensors_alone = code.tensors, code.given, code.tensors_alone
        self._run = torch.ops.gaws.execute.default

    def __call__(self, inputs: list[Any]) -> Any:
        """The graph's results. Empties `inputs`, as the wrapper does."""
        if not self._tensors_alone:
            tensors, integers = [inputs[i] for i in self._tensors], [inputs[i] for i in self._given]
        else:
            tensors, integers = inputs, []
        results = self._run(tensors, integers, self._handle)
        if not results:
            return self.wrapper(inputs)  # an input does not fit: the error is Inductor's
        inputs.clear()
        return results


@functools.cache
def _library() -> ctypes.CDLL:
    library = ops.ensure_loaded()
    library.gaws_executor.restype = ctypes.c_void_p
    return library


_reading: ContextVar[list[str] | None] = ContextVar("_reading", default=None)


@contextlib.contextmanager
def reading(wanted: bool) -> Iterator[list[str]]:
    """Within, if `wanted`, graphs that Inductor compiles or has in its caches get an executor where they can have one.
    A line is added for each: of what it has, or why it runs in Python."""
    said: list[str] = []
    if not wanted:
        yield said
        return
    _install()
    token = _reading.set(said)
    try:
        yield said
    finally:
        _reading.reset(token)


@functools.cache
def _install() -> None:
    after = CompiledFxGraph.post_compile

    @functools.wraps(after)
    def post_compile(self: CompiledFxGraph, examples: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        result = after(self, examples, *args, **kwargs)
        if (said := _reading.get()) is not None:
            said.append(_read(self, examples))
        return result

    CompiledFxGraph.post_compile = post_compile  # type: ignore[method-assign, assignment]


def _read(graph: CompiledFxGraph, examples: Sequence[Any]) -> str:
    try:
        wrapper: Any = graph.current_callable
        if graph.device_types - {"cpu"} or "torch.ops.gaws." not in graph.source_code:
            raise Unreadable("it calls no kernel of ours")
        code = Code(graph.source_code, getattr(wrapper, "__func__", wrapper).__globals__, examples)
        executor = Executor(code, wrapper)
    except Unreadable as error:
        return f"Inductor's wrapper runs in Python: {error}"
    except Exception as error:  # another Inductor than we know
        log.warning("gaws: Inductor's wrapper cannot be read, and runs in Python: %r", error)
        return f"Inductor's wrapper runs in Python: {error!r}"
    graph.current_callable = executor
    return f"Inductor's wrapper runs in C++, as {executor.steps} steps"
