"""What passes share: the record they write to, names of modules, and the few graph edits that keep values right."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from gawscompile.analysis.fixed import fixed_nodes
from gawscompile.analysis.paths import MODEL, path_of
from gawscompile.analysis.reading import aten, dtype, empty_like, is_call, same_value, shape
from gawscompile.ir.records import GraphRecord, LinearRecord, Reason
from gawscompile.ir.sizes import plain_sizes, same_sizes
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.sums import operator_group, operator_sum, project
from gawscompile.ir.types import DTYPES, SpecError, type_of
from gawscompile.options import Options
from gawscompile.planning.table import Program
from gawscompile.runtime.ops import OPS

log = logging.getLogger("gawscompile")


NEARBY = 16
"""Nodes at most that are asked for a name that lasts."""


PROVENANCE = (
    *("nn_module_stack", "fwd_nn_module_stack", "stack_trace", "source_fn_stack", "original_aten", "from_node"),
    *("partitioner_tag", "recompute", "ac_graph_id", "seq_nr"),
)
"""What a node says of where it comes from. The second line is for who takes a forward and its backward apart: which of
the two it is of, and whether the backward computes it again (a checkpoint)."""


class VerifierError(AssertionError):
    """A pass broke the graph: the message names pass and node."""


class Rewrite(NamedTuple):
    """One match of one pass, by names that it has in every run over the same graph, or what the pass looked at before
    it had `found` one."""

    stage: str
    names: tuple[str, ...]
    found: bool = True


@dataclass
class Context:
    """One run of the pipeline over one graph."""

    graph: Graph
    options: Options
    record: GraphRecord
    stored: frozenset[Node] = frozenset()  # the inputs that are parameters and buffers
    holder: Any = None  # the module whose constants get_attr nodes read
    stage: str = ""
    at: Node | None = None  # what is being rewritten, for messages
    under_way: Rewrite | None = None
    barred: dict[Rewrite, str] = field(default_factory=dict)  # what failed before and must not go ahead, and how
    denied: tuple[Reason, str] = (Reason.FUEL, "")  # why `allows` last said no
    touched: dict[Node, Rewrite | None] = field(default_factory=dict)  # since the last `verify`, and by which rewrite
    copied: dict[Node, Node] = field(default_factory=dict)  # node as it was → the same in the untouched graph
    stands_for: dict[Node, Node] = field(default_factory=dict)  # new node → the untouched graph's that it replaces
    complain: Callable[[str], None] = log.warning
    seen: set[Node] = field(default_factory=set)  # products of weights that need no entry of their own
    meanings: dict[str, Graph] = field(default_factory=dict)  # of our nodes, in aten (`spell_out`)
    matches: list[tuple[str, tuple[Node, ...]]] = field(default_factory=list)  # (stage, the nodes that matched)
    ended: str = ""  # the stage in which fuel ran out
    training: bool = False  # the graph holds a forward and its backward
    _fixed: tuple[str, set[Node]] = ("", set())

    @classmethod
    def of(
        cls,
        graph: Graph,
        options: Options,
        record: GraphRecord,
        stored: Container[Node] = (),
        barred: dict[Rewrite, str] | None = None,
        holder: Any = None,
        complain: Callable[[str], None] = log.warning,
    ) -> Context:
        """A context over a copy of `graph`, of whose inputs `stored` are parameters and buffers. `holder`: the module
        whose constants it reads, if it is not the graph's own."""
        work = Graph()
        copies: dict[Node, Node] = {}
        for node in inputs_of(graph):
            copies[node] = work.node_copy(node) if node.op == "placeholder" else work.placeholder(node.name)
            copies[node].meta = dict(node.meta)
        kept = frozenset(copy for node, copy in copies.items() if node in stored)
        work.output(work.graph_copy(graph, copies))
        for node in work.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
            work.erase_node(node)  # export writes them after every cast, and they would keep values that are fused
        context = cls(work, options, record, kept, holder or graph.owning_module, barred=barred or {})
        context.copied = {copy: node for node, copy in copies.items() if not copy._erased}
        context.complain = complain
        context.training = trains(work)
        return context

    @property
    def fixed(self) -> set[Node]:
        """The nodes that stored inputs alone determine, as the graph was when this stage first asked."""
        if self._fixed[0] != self.stage:
            self._fixed = self.stage, fixed_nodes(self.graph, self.stored)
        return self._fixed[1]

    def of_stored(self, node: Any) -> bool:
        """Whether `node` is a parameter or buffer, or what these alone determine."""
        return node in self.stored or node in self.fixed

    # ---- records ------------------------------------------------------------------------------------------

    def found(self, node: Node, sizes: tuple[Any, ...], stored: torch.dtype) -> LinearRecord:
        """Every linear of the graph gets an entry when it is first seen; passes then say what became of it. `sizes`
        and `stored`: its weight's shape and dtype."""
        n, k = plain_sizes(sizes)
        kind = str(stored).removeprefix("torch.")
        entry = LinearRecord(self.module_path(node), (n, k), kind, backward=backward(node))
        self.record.linears.append(entry)
        return entry

    def reject(self, entry: LinearRecord, reason: Reason, detail: str = "") -> None:
        entry.status, entry.reason, entry.detail = "rejected", reason.name, detail or reason.value
        entry.stage = self.stage

    def matched(self, count: int = 1) -> None:
        """A rewrite is done."""
        self.record.passes[self.stage] = self.record.passes.get(self.stage, 0) + count
        self.under_way = None

    def module_path(self, node: Node) -> str:
        """``model.layers.3.self_attn.q_proj``, from the node's module stack."""
        stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
        path = path_of(stack) if stack else ""
        return path or (MODEL if stack else f"<{node.name}>")

    def looks_at(self, node: Node) -> bool:
        """Whether a pass may look for a match at `node`: not where that failed before."""
        self.at, self.under_way = node, None
        return not (self.barred and Rewrite(self.stage, (self.lasting_name(node),), False) in self.barred)

    def allows(self, *nodes: Node) -> bool:
        """Whether the match of `nodes`, found and not yet applied, may go ahead: each takes one unit of fuel. If not,
        `denied` says why."""
        rewrite = Rewrite(self.stage, tuple(map(self.lasting_name, nodes)))
        if rewrite in self.barred:
            self.denied = Reason.INTERNAL_ERROR, self.barred[rewrite]
            return False
        fuel = self.options.fuel
        if fuel is not None and self.record.matches >= fuel:
            self.ended = self.ended or self.stage
            self.denied = Reason.FUEL, ""
            return False
        self.record.matches += 1
        self.matches.append((self.stage, nodes))
        self.at, self.under_way = nodes[0], rewrite
        return True

    def blamed(self) -> Rewrite | None:
        """The rewrite that an exception comes from, or what was looked at."""
        if self.under_way is None and self.at is not None:
            return Rewrite(self.stage, (self.lasting_name(self.at),), False)
        return self.under_way

    def failure(self, node: Node, stages: Container[str]) -> str | None:
        """How one of `stages` failed at `node`, if it did."""
        name = self.lasting_name(node)
        return next((how for (stage, names, _), how in self.barred.items() if stage in stages and name in names), None)

    def lasting_name(self, node: Node) -> str:
        """What `node` is called in every run: its own name in the untouched graph, or that of what it stands for, by
        itself, by the first of its results or by what is made of these."""
        near = [node]
        for one in near:  # grows
            if (found := self.original(one)) is not None:
                return found.name
            near += [user for user in one.users if user not in near][: NEARBY - len(near)]
        return node.name

    # ---- edits --------------------------------------------------------------------------------------------

    def insert(self, target: Callable[..., Any], args: tuple[Any, ...], like: Node, value: Any) -> Node:
        """A new node where the caller's ``inserting_before`` stands; `like` lends its provenance."""
        self.at = like
        node = self.graph.call_function(target, args)
        for name in PROVENANCE:
            if name in like.meta:
                node.meta[name] = like.meta[name]
        node.meta["val"] = value
        self.touch(node)
        return node

    def touch(self, *nodes: Node) -> None:
        """`verify` is to look at these."""
        self.touched.update(dict.fromkeys(nodes, self.under_way))

    def transpose(self, matrix: Node, like: Node) -> Node:
        """A matrix's transpose, as a view."""
        return self.insert(aten.permute.default, (matrix, [1, 0]), like, matrix.meta["val"].permute(1, 0))

    def contiguous(self, node: Node, like: Node) -> Node:
        """A copy of `node` that is laid out plainly."""
        new = self.insert(aten.clone.default, (node,), like, empty_like(node, shape(node), dtype(node)))
        new.kwargs = {"memory_format": torch.contiguous_format}
        return new

    def erase(self, node: Node) -> None:
        """Remove `node`, which nobody reads any more, and whatever only it read: passes count the readers of a node."""
        pending = [node]
        while pending:
            dead = pending.pop()
            if dead._erased or dead.users or dead.op != "call_function":
                continue
            sources = dead.all_input_nodes
            self.graph.erase_node(dead)
            pending += sources

    def replace(self, old: Node, new: Node, named: bool = False) -> None:
        """Everyone who read `old` reads `new`, which must have its shape and dtype. `named`: it had that value before,
        and keeps what it stands for already."""
        if not same_value(old.meta.get("val"), new.meta.get("val")):
            raise VerifierError(
                f"{self.stage}: {new.name} {_brief(new)} cannot stand for {old.name} {_brief(old)}"
            )
        old.replace_all_uses_with(new)
        self.touch(*new.users)
        origin = self.original(old)
        if origin is not None and not (named and self.original(new)):
            self.stands_for[new] = origin

    def original(self, node: Node) -> Node | None:
        """The node of the untouched graph whose value `node` has, where there is one."""
        return self.stands_for.get(node) or self.copied.get(node)


def _lowered(x: Node, arguments: list[Node], text: str) -> KernelSpec:
    """The spec of a lowered group. Raises `SpecError` where its operands are not what that says."""
    program = Program.parse(text)
    if len(arguments) < sum(1 for _ in program.spec.operands()) - len(program.derived):
        raise SpecError(f"{len(arguments)} operands for {text}")
    inputs: list[Node | None] = list(arguments)
    given = program.operands(inputs, lambda recipe, sources: None)
    wanted = list(program.spec.operands())
    if len(given) != len(wanted):
        raise SpecError(f"{len(given)} operands for {len(wanted)}")
    for operand, leaf in zip(wanted, given, strict=True):
        found = None if leaf is None else type_of(leaf)  # None: it is derived
        shape_ = operand.shape[-1:] if operand.activation else operand.shape
        if found and operand.table:
            shape_ = found.shape[: len(shape_)]
        if found and operand.flat and math.prod(found.shape) == shape_[0]:
            shape_ = found.shape
        if found and (found.dtype != operand.dtype or found.shape[-len(shape_) or None :] != shape_):
            raise SpecError(f"{operand.name} is {found}, not {operand.type}")
    return program.spec


def trains(graph: Graph) -> bool:
    """Whether it holds a forward and its backward, as AOTAutograd traces them before it takes them apart."""
    inputs = graph.find_nodes(op="placeholder")
    return any("Tangent" in type(node.meta.get("desc")).__name__ or node.name.startswith("tangents") for node in inputs)


def backward(node: Node) -> bool:
    """Whether it is of a backward."""
    return node.meta.get("partitioner_tag") == "is_backward"


def inputs_of(graph: Graph) -> list[Node]:
    """What a graph computes from: placeholders, and the parameters that an exported graph holds as attributes, which
    the passes see as placeholders too. Numbers that stood in the model's code stay what they are."""
    held = (node for node in graph.find_nodes(op="get_attr") if isinstance(node.meta.get("val"), torch.Tensor))
    parameters = (node for node in held if "_tensor_constant" not in str(node.target))
    return [*graph.find_nodes(op="placeholder"), *parameters]


def verify(context: Context) -> None:
    """The cheap check between passes: what was touched is typed, valued, and reads only what comes before it."""
    for node, rewrite in context.touched.items():
        context.at, context.under_way = node, rewrite
        if node._erased:
            continue
        if node.op == "call_function" and node.meta.get("val") is None:
            raise VerifierError(f"{context.stage}: {node.format_node()} has no value")
        if wrong := _mistyped(node):
            raise VerifierError(f"{context.stage}: {node.name}: {wrong}")
        for source in node.all_input_nodes:
            if source._erased or not source < node:
                raise VerifierError(f"{context.stage}: {node.name} reads {source.name}, which does not come before it")
    context.touched.clear()
    context.at = context.under_way = None


def _mistyped(node: Node) -> str | None:
    """What is wrong with the operators or operands of one of our nodes, or with its value, if anything."""
    inputs: Any = node.args
    try:
        if is_call(node, operator_sum):
            spec = KernelSpec.of(inputs[0], [inputs[1]])
        elif is_call(node, operator_group):
            spec = KernelSpec.of(*inputs)
        elif is_call(node, project):
            spec = KernelSpec.of(*inputs[:3])
        elif is_call(node, *OPS):
            spec = _lowered(*inputs)
        else:
            return None
    except SpecError as error:
        return str(error)
    x, outputs = inputs[0], spec.outputs
    values = node.meta["val"] if isinstance(node.meta["val"], list) else [node.meta["val"]]
    sizes = [(tuple(v.shape), v.dtype) for v in values]
    wanted = [((*shape(x)[:-1], n), DTYPES[dtype]) for n, dtype in outputs]
    agree = len(sizes) == len(wanted) and all(
        a[1] == b[1] and same_sizes(a[0], b[0]) for a, b in zip(sizes, wanted, strict=True)
    )
    return None if agree else f"its values are {sizes}, and its operators make {wanted}"


def _brief(node: Node) -> str:
    found = node.meta.get("val")
    return f"{tuple(found.shape)} {found.dtype}" if isinstance(found, torch.Tensor) else str(found)
