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
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch._inductor.output_code import CompiledFxGraph

from gawscompile.ir.records import GraphRecord
from gawscompile.runtime import ops
from gawscompile.runtime.wrapper import Code, Unreadable

log = logging.getLogger("gawscompile")


class Wrappers:
    """What is said of the wrappers of one graph, whose record has it. A backward is compiled when it first runs."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._record: GraphRecord | None = None

    def add(self, line: str) -> None:
        self.lines.append(line)
        self.tell(self._record)

    def tell(self, record: GraphRecord | None) -> None:
        self._record = record
        if record is not None:
            record.wrapper = "; ".join(self.lines)


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
        self._frees, self._told = code.frees, False
        self._untold = 3  # calls until it is said why it is not replayed
        self._run, self._lend = torch.ops.gaws.execute.default, torch.ops.gaws.lend.default
        self.handle = ctypes.c_void_p(handle)

    def __call__(self, inputs: list[Any]) -> Any:
        """The graph's results. Empties `inputs`, as the wrapper does."""
        if torch._C._len_torch_dispatch_stack():  # a mode (FlopCounterMode) is to see every op
            return self.wrapper(inputs)
        if self._frees:
            return self._run_and_free(inputs)
        if not self._tensors_alone:
            tensors, integers = [inputs[i] for i in self._tensors], [inputs[i] for i in self._given]
        else:
            tensors, integers = inputs, []
        results = self._run(tensors, integers, self._handle)
        if not results:
            return self.wrapper(inputs)  # an input does not fit: the error is Inductor's
        if self._untold:
            self._untold -= 1
            if not self._untold and (why := self.why_not()):
                log.info("gaws: a graph runs step by step in every call: %s", why)
        if _noted.calls is not None:
            _noted.calls.append(Call(self, list(inputs), results))
        inputs.clear()
        return results

    def bind(self, watch: ctypes.c_void_p, inputs: Sequence[torch.Tensor | None]) -> bool:
        """Whether `watch`, a handle of ``gaws_watch``, sees every change of all `inputs`: then its checks are for this
        executor's calls from now on (``gaws::resume``), which are given the others, None here."""
        if self._frees or not self._tensors_alone or len(inputs) != len(self._tensors):
            return False
        tensors = [one if one is None else one._cdata for one in inputs]
        array = (ctypes.c_void_p * len(tensors))(*tensors)
        return bool(ops.with_gil().gaws_bind(watch, self.handle, ctypes.c_int64(len(tensors)), array))

    def replays(self) -> int:
        """How many replays of its steps wait for a call (`replay.cpp`)."""
        return int(_library().gaws_replays(self.handle))

    def why_not(self) -> str:
        """Why its steps were not laid out when they last could have been; empty where they were."""
        if self._given:
            return "its sizes may be others in every call"
        return bytes(_library().gaws_why_not(self.handle)).decode()

    def _run_and_free(self, inputs: list[Any]) -> Any:
        """C++ is lent the tensors before it runs: no list of Python's may hold one that its last reader is to free."""
        tensors, integers = [inputs[i] for i in self._tensors], [inputs[i] for i in self._given]
        known = all(isinstance(one, torch.Tensor) for one in tensors) and all(type(one) is int for one in integers)
        if not known and not self._told:
            self._told = True
            log.warning("gaws: a backward is given other kinds of inputs than its wrapper reads, and runs in Python")
        if not known:
            return self.wrapper(inputs)
        others = [None if isinstance(one, torch.Tensor) else one for one in inputs]
        try:
            self._lend(tensors, self._handle)
            inputs.clear()
            del tensors
            if results := self._run([], integers, self._handle):
                return results
            for i, tensor in zip(self._tensors, self._lend([], 0), strict=True):
                others[i] = tensor
        except BaseException:
            self._lend([], 0)
            raise
        return self.wrapper(others)


class Call(NamedTuple):
    """A call of an executor: what it was given, and what it gave."""

    executor: Executor
    inputs: list[Any]
    results: list[Any]


class _Noted(threading.local):
    calls: list[Call] | None = None


_noted = _Noted()


@contextlib.contextmanager
def noting() -> Iterator[list[Call]]:
    """Within, this thread's calls of executors are added to a list."""
    calls: list[Call] = []
    _noted.calls = calls
    try:
        yield calls
    finally:
        _noted.calls = None


@functools.cache
def _library() -> ctypes.CDLL:
    library = ops.ensure_loaded()
    library.gaws_executor.restype = ctypes.c_void_p
    library.gaws_replays.restype = ctypes.c_int64
    library.gaws_why_not.restype = ctypes.c_char_p
    return library


_reading: ContextVar[Wrappers | None] = ContextVar("_reading", default=None)
_later: dict[int, Wrappers] = {}
"""Inductor's number of a forward → what is said of it. Its backward has the same number, and may never be compiled."""
MOST_LATER = 256


@contextlib.contextmanager
def reading(wanted: bool) -> Iterator[Wrappers]:
    """Within, if `wanted`, graphs that Inductor compiles or has in its caches get an executor where they can have one.
    A line is added for each: of what it has, or why it runs in Python."""
    said = Wrappers()
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
    def post_compile(
        self: CompiledFxGraph, example_inputs: Sequence[Any], constants: Any, graph_kwargs: Any
    ) -> Any:
        result = after(self, example_inputs, constants, graph_kwargs)
        backward, number = bool(graph_kwargs.get("is_backward")), graph_kwargs.get("graph_id")
        later = _later.pop(number, None) if backward and number is not None else None
        said = _reading.get() or later
        if said is not None:
            said.add(_read(self, example_inputs, backward))
            if number is not None and not (backward or graph_kwargs.get("is_inference")):
                _later[number] = said
                if len(_later) > MOST_LATER:
                    del _later[next(iter(_later))]
        return result

    CompiledFxGraph.post_compile = post_compile  # type: ignore[method-assign]


def _read(graph: CompiledFxGraph, examples: Sequence[Any], backward: bool) -> str:
    whose = f"Inductor's wrapper{' of the backward' * backward} runs in"
    try:
        wrapper: Any = graph.current_callable
        if graph.device_types - {"cpu"} or "torch.ops.gaws." not in graph.source_code:
            raise Unreadable("it calls no kernel of ours")
        names = getattr(wrapper, "__func__", wrapper).__globals__
        # with a backward from the cache come the inputs of its forward
        code = Code(graph.source_code, names, None if backward else examples)
        executor = Executor(code, wrapper)
    except Unreadable as error:
        return f"{whose} Python: {error}"
    except Exception as error:  # another Inductor than we know
        log.warning("gaws: Inductor's wrapper cannot be read, and runs in Python: %r", error)
        return f"{whose} Python: {error!r}"
    graph.current_callable = executor
    return f"{whose} C++, as {executor.steps} steps"
