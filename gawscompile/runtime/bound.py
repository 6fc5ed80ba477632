"""A call of a compiled graph whose parameters are gathered once, and not before every call.

Dynamo's code for a frame hands everything to the graph that the graph reads: for a model with adapters hundreds of
parameters, each at the end of a chain of attributes and dictionaries. Where one guard knows that nothing of this
changed (`watch/unchanged.py`), neither did the parameters. So `rewritten`, a hook on that code, leaves the gathering
to `BoundCall`, which keeps what it gathered as long as the guard's `State` holds:

    __compiled_fn(kwargs["input_ids"], module._modules["layers"]._modules["0"]._parameters["weight"], …)
    BoundCall(__compiled_fn, module, args, kwargs)

Between such a call and `executor.py`'s steps stand AOTAutograd and Inductor, which hand on hundreds of tensors one by
one. Where they were seen to hand on the very same tensors in the same order, and to give back the very same results,
a call goes to the steps directly, with the tensors that may have changed; the others are known there (`Direct`).

Nothing else in the code is touched. What is called in between, what is read from globals or from closures, is not
understood, and such code stays as it is.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import logging
import operator
import sys
import threading
import weakref
from collections.abc import Collection, Mapping, Sequence
from types import CodeType
from typing import Any, NamedTuple, Protocol

import torch
from torch._dynamo import bytecode_transformation as bytecode
from torch._dynamo import output_graph
from torch._dynamo.convert_frame import register_bytecode_hook
from torch._dynamo.eval_frame import innermost_fn, skip_code
from torch._guards import CompileContext
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gawscompile.runtime import forks, ops
from gawscompile.runtime.executor import Call, Executor, noting
from gawscompile.runtime.wrapper import parts_of

log = logging.getLogger("gawscompile")

_compile = threading.local()
"""`_compile.wanted`: the compile of this thread that is to be bound; `_compile.call`: the `BoundCall` made for it."""


def want(wanted: bool) -> None:
    """Said by the backend: whether the frame that this thread compiles is to have its parameters bound."""
    known = sys.version_info[:2] == (3, 11)  # whose bytecode this is, and whose guards know
    _compile.wanted = CompileContext.current_compile_id() if wanted and known else None
    if _compile.wanted is not None:
        _install()


def compiled(run: Any) -> None:
    """Said by the backend: what it made of that frame's graph."""
    if vars(_compile).get("wanted") is not None:
        _compile.compiled = run


def tie(watch: Watch, seen: Collection[str]) -> None:
    """Said when the guards of that frame are made: `watch` sees every change to the parameters that sources of the
    names `seen` give."""
    call: BoundCall | None = vars(_compile).pop("call", None)
    if call is not None:
        call.tie(watch, seen)


@functools.cache
def _install() -> None:
    register_bytecode_hook(rewritten)


def rewritten(code: CodeType, new_code: CodeType) -> CodeType | None:
    """Dynamo's `new_code` for a frame, with a `BoundCall`; None where it stays as it is."""
    state = vars(_compile)
    state.pop("call", None)
    wanted = state.pop("wanted", None)
    run = state.pop("compiled", None)
    if wanted is None or wanted != CompileContext.current_compile_id():  # of a compile that failed
        return None
    if torch._dynamo.config.caching_precompile:  # which keeps code in files
        return None
    found: list[BoundCall] = []

    def change(instructions: list[bytecode.Instruction], options: dict[str, Any]) -> None:
        found.append(_replace(instructions, options))

    try:
        new, _made = bytecode.transform_code_object(new_code, change)
    except Exception as error:
        how = error if isinstance(error, Unknown) else repr(error)  # or another Dynamo than we know
        log.info("gaws: parameters are gathered in every call: %s", how)
        return None
    state["call"] = found[0]
    found[0].compiled = run
    return new


class State(Protocol):
    """Of parameters that did not change. `bound`: what a graph reads, gathered; None instead of what may change. They
    keep no parameter alive that a model has replaced since."""

    bound: list[weakref.ref[Any] | None] | None
    direct: Any
    misses: int
    handle: ctypes.c_void_p


class Watch(Protocol):
    """A guard on parameters (`watch.unchanged.Unchanged`). `last.state`: by which this thread's guards held; that is
    good for the call that they let through, and for that one alone."""

    last: threading.local


class Unknown(Exception):
    """Code that is not gathered from variables alone: the message says what it is."""


class Value(NamedTuple):
    """What an instruction leaves on the stack: Python for it, in which temporaries stand for what they hold, the same
    without temporaries, the names that it reads, and whether something is called for it."""

    text: str
    whole: str
    reads: frozenset[str] = frozenset()
    called: bool = False


def _replace(instructions: list[bytecode.Instruction], options: dict[str, Any]) -> BoundCall:
    """Put a `BoundCall` in the place of the gathering, and of the call. Raises `Unknown`."""
    start = next((at for at, one in enumerate(instructions) if _is_graph(one)), None)
    if start is None:
        raise Unknown("it calls no graph")
    starred = sum(bool(options["co_flags"] & flag) for flag in (inspect.CO_VARARGS, inspect.CO_VARKEYWORDS))
    variables = dict.fromkeys(
        options["co_varnames"][: options["co_argcount"] + options["co_kwonlyargcount"] + starred], "LOAD_FAST"
    )
    variables |= dict.fromkeys((*options["co_cellvars"], *options["co_freevars"]), "LOAD_DEREF")
    end, values, temporaries = _gathered(instructions, start, variables)
    after = [one for one in instructions[end:] if not (one.opname == "DELETE_FAST" and one.argval in temporaries)]
    if any(one.argval in temporaries for one in after if one.opname.endswith("_FAST")):
        raise Unknown("what was gathered is read again")
    read = set().union(*(value.reads for value in (*values, *temporaries.values())))
    variables = {name: load for name, load in variables.items() if name in read}
    call = BoundCall(list(variables), temporaries, values)
    instructions[start:] = [
        *bytecode.add_push_null(bytecode.create_instruction("LOAD_CONST", argval=call)),
        bytecode.create_instruction("LOAD_GLOBAL", arg=0, argval=instructions[start].argval),
        *(bytecode.create_instruction(load, argval=name) for name, load in variables.items()),
        *bytecode.create_call_function(1 + len(variables), push_null=False),
        *after,
    ]
    return call


def _is_graph(one: bytecode.Instruction) -> bool:
    return one.opname == "LOAD_GLOBAL" and str(one.argval).startswith("__compiled_fn")


def _gathered(
    instructions: list[bytecode.Instruction], start: int, variables: Mapping[str, str]
) -> tuple[int, list[Value], dict[str, Value]]:
    """Where the call of the graph ends, its arguments, and the temporaries that these are made of. `variables`: by
    which instruction each is loaded."""
    stack = [_constant("graph")]
    temporaries: dict[str, Value] = {}
    for at in range(start + 1, len(instructions)):
        one = instructions[at]
        name, given = one.opname, one.argval
        if name == "LOAD_FAST" and given in temporaries:
            stack.append(Value(given, temporaries[given].whole, frozenset([given]), temporaries[given].called))
        elif name == variables.get(given):
            stack.append(Value(given, f"L[{given!r}]", frozenset([given])))
        elif name == "STORE_FAST" and given not in (*variables, *temporaries):
            temporaries[given] = stack.pop()
        elif name == "LOAD_CONST":
            stack.append(_constant(repr(given)))
        elif name == "LOAD_ATTR":
            stack.append(_made(f"{{}}.{given}", stack.pop()))
        elif name == "BINARY_SUBSCR":
            index = stack.pop()
            stack.append(_made("{}[{}]", stack.pop(), index))
        elif name == "COPY" and one.arg == 1:
            stack.append(stack[-1])
        elif name == "LOAD_GLOBAL" and given == UTILS:
            stack.append(_constant(UTILS))
        elif name == "POP_TOP":
            stack.pop()
        elif name == "CALL":
            first = len(stack) - (one.arg or 0)
            values, stack = stack[first:], stack[:first]
            if len(stack) == 1:
                return at + 1, values, temporaries
            function = stack.pop()
            if not function.reads and not function.whole.startswith(f"{UTILS}."):
                raise Unknown(f"it calls {function.whole}")
            made = _made(f"{{}}({', '.join(['{}'] * len(values))})", function, *values)
            stack.append(made._replace(called=True))
        elif name not in ("PUSH_NULL", "PRECALL", "NOP"):
            raise Unknown(f"{name} {given}")
    raise Unknown("its call of the graph has no end")


UTILS = "__import_torch_dot__dynamo_dot_utils"
"""How Dynamo's code calls its own helpers: one tells a tensor's size, one the profiler that there is gathering."""


def _constant(text: str) -> Value:
    return Value(text, text)


def _made(form: str, *values: Value) -> Value:
    """What `form` says of `values`."""
    return Value(
        form.format(*(value.text for value in values)),
        form.format(*(value.whole for value in values)),
        frozenset().union(*(value.reads for value in values)),
        any(value.called for value in values),
    )


class BoundCall:
    """The call of a graph in a frame of such `variables`. Its arguments are `values`, made of `temporaries`."""

    def __init__(self, variables: Sequence[str], temporaries: dict[str, Value], values: list[Value]) -> None:
        self._variables, self._temporaries, self._values = variables, temporaries, values
        self._all = self._gather(values)
        self._watch: Watch | None = None
        self._free: list[int] = []
        self._others = self._all
        self.compiled: Any = None  # what the backend made of the graph

    def _gather(self, values: list[Value]) -> Any:
        """The function of the frame's variables whose result is the tuple of `values`."""
        needed = set().union(*(value.reads for value in values))
        lines = []
        for name, value in reversed(self._temporaries.items()):
            if name in needed:
                needed |= value.reads
                lines.append(f"    {name} = {value.text}")
        returned = "".join(f"{value.text}, " for value in values)
        source = [f"def gather({', '.join(self._variables)}):", *reversed(lines), f"    return ({returned})"]
        made: dict[str, Any] = {UTILS: torch._dynamo.utils}
        exec(compile("\n".join(source), "<gaws: what a graph reads>", "exec"), made)
        skip_code(made["gather"].__code__)
        return made["gather"]

    def tie(self, watch: Watch, seen: Collection[str]) -> None:
        """From now on keep the values that `watch` sees changes of: those that sources named so give."""
        self._free = [at for at, value in enumerate(self._values) if value.called or value.whole not in seen]
        self._others = self._gather([self._values[at] for at in self._free])
        self._watch = watch
        self._let_go = ops.with_gil().gaws_let_go

    def __call__(self, graph: Any, *variables: Any) -> Any:
        state = vars(self._watch.last).pop("state", None) if self._watch else None
        if state is None:
            return graph(*self._all(*variables))
        if state.bound is None:
            values = list(self._all(*variables))
            free = frozenset(self._free)
            state.bound = [None if at in free else weakref.ref(value) for at, value in enumerate(values)]
            return graph(*values)
        plain = not torch._C._len_torch_dispatch_stack()  # a mode is to see every op
        try:
            others = self._others(*variables)
            if plain and (direct := state.direct):
                if results := direct(others):
                    state.misses = 0
                    return results
                state.misses += 1
                if state.misses == MOST_MISSES:
                    state.direct = False
        finally:  # where nobody took it
            if state.direct is not None:
                self._let_go()
        values = [found and found() for found in state.bound]
        for at, value in zip(self._free, others, strict=True):
            values[at] = value
        if state.direct is not None or not plain:
            return graph(*values)
        return self._watched(state, graph, values, others)

    @torch._dynamo.disable
    def _watched(self, state: State, graph: Any, values: list[Any], others: tuple[Any, ...]) -> Any:
        """A call that shows whether the next ones can go directly."""
        parts, grad = [parts_of(value) for value in values], torch.is_grad_enabled()
        tensors = [[value, *some] for value, some in zip(values, parts, strict=True)]
        versions = [_versions(some) for some in tensors]
        with noting() as calls:
            results = graph(*values)
        moved = {at for at, some in enumerate(tensors) if _versions(some) != versions[at]}
        free = {at: number for number, at in enumerate(self._free)}
        why = self._why_not(graph, [part for some in parts for part in some], calls, results)
        if not why and not all(type(values[at]) in (torch.Tensor, torch.nn.Parameter) for at in free):
            why = "a tensor of a subclass is no parameter"
        in_parts = any(is_traceable_wrapper_subclass(values[at]) for at in moved)
        if not why and (torch.is_grad_enabled() is not grad or in_parts):
            why = "it changes whether gradients are recorded, or writes to a tensor of a subclass"
        with _binding:
            if state.direct is None:  # else another thread was first
                known = [None if at in free else part for at, some in enumerate(parts) for part in some]
                if not why and not calls[0].executor.bind(state.handle, known):
                    why = "a parameter is given twice, or is not watched"
                if why:
                    log.info("gaws: a graph is called through AOTAutograd and Inductor every time: %s", why)
                    state.direct = False
                else:
                    written = [free[at] for at in free.keys() & moved]
                    kept = [one for at, one in enumerate(state.bound or ()) if one and at in moved]
                    state.direct = Direct(calls[0].executor, state.handle, type(results), written, kept)
        return results

    def _why_not(self, graph: Any, given: list[Any], calls: list[Call], results: Any) -> str:
        """Why that call could not have gone directly; empty where it could. `given`: the graph's inputs, tensors of a
        subclass in parts."""
        if _behind(graph) is not innermost_fn(self.compiled):
            return "a backend of the user's stands around ours, and may want to see every call"
        if len(calls) != 1:
            return "its wrapper runs in Python"
        if not all(map(_is_plain, given)):
            return "it is given something else than plain tensors"
        if type(results) not in (list, tuple) or not _same(calls[0].results, results):
            return "AOTAutograd changes its results"
        return "" if _same(calls[0].inputs, given) else "AOTAutograd changes its inputs"


def _behind(graph: Any) -> Any:
    """What the backend made of a graph, without what Dynamo puts around it. Where a parameter's class has operators of
    its own, that is a function of Dynamo's which closes over nothing else."""
    found = innermost_fn(graph)
    if getattr(found, "__globals__", None) is vars(output_graph):
        inside = list(inspect.getclosurevars(found).nonlocals.values())
        found = inside[0] if len(inside) == 1 else found
    return innermost_fn(found)


def _is_plain(value: Any) -> bool:
    """Whether it is handed on as it is, and C++ reads it so: a tensor, or a parameter, also of a class of its own."""
    usual = type(value) is torch.Tensor or isinstance(value, torch.nn.Parameter)
    return usual and not is_traceable_wrapper_subclass(value)


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _versions(tensors: Sequence[Any]) -> list[int]:
    """How often each was written to in place, as far as that is counted."""
    counted = (isinstance(one, torch.Tensor) and not one.is_inference() for one in tensors)
    return [one._version if is_counted else 0 for one, is_counted in zip(tensors, counted, strict=True)]


MOST_MISSES = 8  # in a row, after which no call is tried
_binding = threading.Lock()
forks.held_across(_binding)


class Direct:
    """A call of an executor's steps with parameters that are known there. Empty where they are not run: then nothing
    was done. Of the other inputs those `written`, and of the parameters `kept`, count a write in every call."""

    def __init__(
        self,
        executor: Executor,
        watch: ctypes.c_void_p,
        kind: type,
        written: Sequence[int] = (),
        kept: Sequence[weakref.ref[Any]] = (),
    ) -> None:
        self._executor = executor  # which is not to go before the last call
        self._watch = watch.value
        self._kind, self._written, self._kept = kind, written, kept
        self._run = torch.ops.gaws.resume.default._op

    def __call__(self, others: tuple[Any, ...]) -> Any:
        results = self._run(others, self._watch)
        if results and (self._written or self._kept):
            kept = [tensor for reference in self._kept if (tensor := reference()) is not None]
            torch.autograd.graph.increment_version([*kept, *(others[at] for at in self._written)])
        return results if self._kind is list else self._kind(results)


skip_code(Direct.__call__.__code__)
skip_code(BoundCall.__call__.__code__)  # or Dynamo would compile it
