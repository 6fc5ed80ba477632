"""The graph of a program as our passes see it: AOTAutograd's, before any pass of Inductor's.

A program that writes to nothing is traced step by step, and a step that was traced before, of inputs of the same
sizes, is copied from memory: tracing a program takes ten times as long as rewriting it. Writes in place and symbolic
sizes are traced whole, the former made functional. `tests/test_fuzz.py` holds both against AOTAutograd itself.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tests.fuzz.programs import GLOBALS, NAMES, SIZES, Program, compiled

DECOMPOSITIONS = select_decomp_table()


@dataclass
class Traced:
    """A program's graph. `symbols`: the sizes that are symbols in it, each with the number of its placeholder; those of
    tensors come after."""

    graph: Graph
    module: Any
    stored: list[int]
    symbols: dict[str, int]
    shape_env: ShapeEnv | None = None

    def arguments(self, program: Program, tensors: Sequence[torch.Tensor], batch: dict[str, int]) -> list[Any]:
        """What the graph takes, for tensors whose symbolic sizes are those of `batch`."""
        numbers = {place: batch.get(name, program.sizes[name]) for name, place in self.symbols.items()}
        return [*numbers.values(), *tensors]


def trace(program: Program, device: str = "cpu", symbolic: Sequence[str] = (), shared: bool = False) -> Traced:
    """The program's graph, for tensors that say they are on `device`. `symbolic`: the sizes that are symbols in it;
    where `shared`, those that are equal are one symbol. Raises what torch raises."""
    if program.functional and not symbolic:
        return _stepwise(program, device)
    return _whole(program, device, symbolic, shared)


def may_be_symbolic(program: Program) -> list[str]:
    """The sizes that only count tokens."""
    leading = {size for one in program.inputs if not one.stored for size in one.shape[:-1] if SIZES.fullmatch(size)}
    lasting = (size for one in program.inputs for size in (one.shape if one.stored else one.shape[-1:]))
    fixed = " ".join([*(step.text for step in program.steps), *lasting])
    return [name for name in program.sizes if name in leading - set(SIZES.findall(fixed)) and program.sizes[name] > 1]


# ---- step by step -----------------------------------------------------------------------------------------

_MODE = FakeTensorMode()
_fakes: dict[Any, torch.Tensor] = {}
_steps: dict[Any, tuple[list[Node], list[Node], Any]] = {}


class _Recorder(TorchDispatchMode):
    """Writes down every aten operation as a node, decomposed as Inductor has AOTAutograd do it."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device  # that nodes say they are on
        self.depth = 0  # of decompositions
        self.graph = Graph()
        self.nodes: dict[int, Node] = {}
        self.kept: list[torch.Tensor] = []  # or an id might come again

    def bind(self, tensor: torch.Tensor, node: Node) -> None:
        self.nodes[id(tensor)] = node
        self.kept.append(tensor)
        node.meta["val"] = _fake(tensor.shape, tensor.stride(), tensor.dtype, self.device)

    def is_prim(self, tensor: torch.Tensor) -> bool:
        return getattr(self.nodes[id(tensor)].target, "namespace", "") == "prims"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func is torch.ops.aten.detach.default and (self.depth or self.is_prim(args[0])):
            return args[0]  # a decomposition's or a prim's own, which fake tensors do without
        decompositions: list[Callable[..., Any]] = [DECOMPOSITIONS[func]] if func in DECOMPOSITIONS else []
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            decompositions.append(func.decompose)
        for decomposition in decompositions:
            self.depth += 1
            with self:
                found = decomposition(*args, **kwargs)
            self.depth -= 1
            if found is not NotImplemented:
                return found
        out = func(*args, **kwargs)
        positional, named = tree_map_only(torch.Tensor, lambda t: self.nodes[id(t)], (args, kwargs))
        node = self.graph.call_function(func, positional, named)
        if isinstance(out, torch.Tensor):
            self.bind(out, node)
        else:
            items = [self.graph.call_function(operator.getitem, (node, i)) for i in range(len(out))]
            for part, item in zip(out, items, strict=True):
                self.bind(part, item)
            node.meta["val"] = [item.meta["val"] for item in items]
        return out


def _fake(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
    key = (tuple(shape), tuple(stride), dtype, device)
    if key not in _fakes:
        with _MODE:
            _fakes[key] = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    return _fakes[key]


def _like(value: Any) -> Any:
    """What tells one traced step from another, of one input."""
    if isinstance(value, Node):
        value = value.meta["val"]
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device.type
    return tuple(map(_like, value))


def _stepwise(program: Program, device: str) -> Traced:
    graph = Graph()
    values: dict[str, Any] = {}
    for one, plain in zip(program.inputs, _plain_inputs(program), strict=True):
        values[one.name] = graph.placeholder(f"{one.name}_1")
        values[one.name].meta["val"] = _fake(plain.shape, plain.stride(), plain.dtype, device)
    for step in program.steps:
        reads = [values[name] for name in step.reads]
        sizes = tuple((name, program.sizes[name]) for name in dict.fromkeys(SIZES.findall(step.text)))
        places = {name: f"_{i}" for i, name in enumerate(step.reads)}  # by which it reads, not from where
        text = NAMES.sub(lambda found, places=places: places[found[0]], step.text)
        key = (text, sizes, tuple(map(_like, reads)), device)
        if key not in _steps:
            _steps[key] = _traced_step(text, dict(sizes), reads, device)
        inputs, nodes, result = _steps[key]
        flat = [node for read in reads for node in ([read] if isinstance(read, Node) else read)]
        copies = dict(zip(inputs, flat, strict=True))
        for node in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = dict(node.meta)
        values[step.name] = tree_map_only(Node, copies.__getitem__, result)
    graph.output(tuple(values[name] for name in program.outputs))
    graph.eliminate_dead_code()
    return Traced(graph, None, [i for i, one in enumerate(program.inputs) if one.stored], {})


def _plain_inputs(program: Program) -> list[torch.Tensor]:
    """The inputs' sizes, strides and dtypes, without numbers."""
    scope: dict[str, Any] = {}
    for one in program.inputs:
        plain = torch.empty([program.size(size) for size in one.shape], dtype=one.dtype, device="meta")
        scope[one.name] = eval(compiled(one.layout), program.sizes | scope | {"t": plain})
    return list(scope.values())


def _traced_step(text: str, sizes: dict[str, int], reads: list[Any], device: str) -> tuple[list[Node], list[Node], Any]:
    """(inputs, nodes, result) of one step, in a graph of its own. Real tensors are traced: they are the faster ones."""
    recorder = _Recorder(device)
    inputs: list[Node] = []

    def tensor(node: Node) -> torch.Tensor:
        value = node.meta["val"]
        new = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        inputs.append(recorder.graph.placeholder(f"i{len(inputs)}"))
        recorder.bind(new, inputs[-1])
        return new

    scope = GLOBALS | sizes | {f"_{i}": tree_map_only(Node, tensor, read) for i, read in enumerate(reads)}
    with torch.no_grad(), enable_python_dispatcher(), recorder:
        found = eval(compiled(text), scope)
    found = list(found) if isinstance(found, tuple) else found
    result = tree_map_only(torch.Tensor, lambda t: recorder.nodes[id(t)], found)
    return inputs, [node for node in recorder.graph.nodes if node.op == "call_function"], result


# ---- whole ------------------------------------------------------------------------------------------------


def _whole(program: Program, device: str, symbolic: Sequence[str], shared: bool) -> Traced:
    shape_env = ShapeEnv() if symbolic else None
    mode = FakeTensorMode(shape_env=shape_env) if shape_env else FakeTensorMode()
    symbols: dict[str, Any] = {}
    for name in symbolic:
        known = next((symbols[other] for other in symbols if program.sizes[other] == program.sizes[name]), None)
        if shared and known is not None:
            symbols[name] = known
            continue
        assert shape_env is not None
        source = ConstantSource(name)
        symbol = shape_env.create_symbol(program.sizes[name], source, dynamic_dim=DimDynamic.DYNAMIC)
        symbols[name] = shape_env.create_symintnode(symbol, hint=program.sizes[name], source=source)
    numbers = list({id(symbol): symbol for symbol in symbols.values()}.values())
    places = {id(symbol): i for i, symbol in enumerate(numbers)}  # not by value: comparing symbols adds guards
    scope: dict[str, Any] = {}
    with mode, torch.no_grad():
        for one in program.inputs:
            sizes = [eval(compiled(size), {}, program.sizes | symbols) for size in one.shape]
            plain = torch.empty(sizes, dtype=one.dtype)
            scope[one.name] = eval(compiled(one.layout), program.sizes | symbols | scope | {"t": plain})
        inputs = list(scope.values())

        def function(*given: Any) -> Any:
            sizes = {name: given[places[id(symbol)]] for name, symbol in symbols.items()}
            return replace(program, sizes=program.sizes | sizes).call(*given[len(numbers) :])

        with enable_python_dispatcher():
            module = make_fx(_functional(function), decomposition_table=DECOMPOSITIONS)(*numbers, *inputs)
    graph = module.graph
    graph.eliminate_dead_code()
    if device != "cpu":
        for node in graph.nodes:
            node.meta["val"] = tree_map_only(torch.Tensor, functools.partial(_on, mode, device), node.meta.get("val"))
    stored = [len(numbers) + i for i, one in enumerate(program.inputs) if one.stored]
    return Traced(graph, module, stored, {name: places[id(s)] for name, s in symbols.items()}, shape_env)


def _on(mode: FakeTensorMode, device: str, value: torch.Tensor) -> torch.Tensor:
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


def _functional(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` without writes, as AOTAutograd makes it so: inputs that it wrote to are written at its end."""

    def found(tensor: Any) -> torch.Tensor:
        torch._sync(tensor)
        return torch._from_functional_tensor(tensor.elem)

    def inner(*inputs: Any) -> Any:
        functionalize = torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)
        with torch._C._ExcludeDispatchKeyGuard(functionalize), FunctionalTensorMode():
            made = [FunctionalTensor.to_functional(t) if isinstance(t, torch.Tensor) else t for t in inputs]
            outputs = tree_map_only(FunctionalTensor, found, function(*made))
        for given, functional in zip(inputs, made, strict=True):
            if isinstance(functional, FunctionalTensor) and (now := found(functional)) is not given:
                given.copy_(now)
        return outputs

    return inner


def module_of(traced: Traced, graph: Graph) -> GraphModule:
    return GraphModule(traced.module or torch.nn.Module(), graph)
