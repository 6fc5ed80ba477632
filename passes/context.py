"""What passes share: the record they write to, names of modules, and the few graph edits that keep values right."""

from __future__ import annotations

import ast
import logging
import operator
import re
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch.fx import Graph, Node

from gawscompile.ir import operators
from gawscompile.ir.operators import linear
from gawscompile.ir.recipe import hoisted
from gawscompile.ir.records import GraphRecord, LinearRecord, Reason
from gawscompile.options import Options
from gawscompile.passes.sizes import plain_sizes, same_size, same_sizes, settled
from gawscompile.passes.sizes import same_strides as same_strides

aten, prims = torch.ops.aten, torch.ops.prims

log = logging.getLogger("gawscompile")

ROUNDING = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
CASTS = (prims.convert_element_type.default, aten._to_copy.default, aten.to.dtype)
MODEL = "(model)"  # the path of the compiled module itself
VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
MATRIX_MATHS = (aten.mm.default, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, linear)
ONES = {aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims}
TRANSPOSES = {aten.permute.default, aten.t.default, aten.transpose.int}


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
    fixed: set[Node] = field(default_factory=set)  # the nodes that are computed from those alone
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
    matches: list[tuple[str, tuple[Node, ...]]] = field(default_factory=list)  # (stage, the nodes that matched)
    ended: str = ""  # the stage in which fuel ran out

    # ---- records ------------------------------------------------------------------------------------------

    def found(self, node: Node, sizes: tuple[Any, ...], stored: torch.dtype) -> LinearRecord:
        """Every linear of the graph gets an entry when it is first seen; passes then say what became of it. `sizes`
        and `stored`: its weight's shape and dtype."""
        n, k = plain_sizes(sizes)
        entry = LinearRecord(self.module_path(node), (n, k), str(stored).removeprefix("torch."))
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
        stack = node.meta.get("nn_module_stack")
        path = _path(stack) if stack else ""
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
        itself or by the first of its results."""
        found = self.original(node) or next(filter(None, map(self.original, node.users)), None)
        return (found or node).name

    # ---- edits --------------------------------------------------------------------------------------------

    def insert(self, target: Callable[..., Any], args: tuple[Any, ...], like: Node, value: Any) -> Node:
        """A new node where the caller's ``inserting_before`` stands; `like` lends its provenance."""
        self.at = like
        node = self.graph.call_function(target, args)
        for name in ("nn_module_stack", "stack_trace", "source_fn_stack", "original_aten", "from_node"):
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
        """Remove `node`, which nobody reads any more, and whatever only it read (a dead reader is a false reader)."""
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


def verify(context: Context) -> None:
    """The cheap check between passes: what was touched is typed, valued, and reads only what comes before it."""
    for node, rewrite in context.touched.items():
        context.at, context.under_way = node, rewrite
        if node._erased:
            continue
        if node.op == "call_function" and node.meta.get("val") is None:
            raise VerifierError(f"{context.stage}: {node.format_node()} has no value")
        for source in node.all_input_nodes:
            if source._erased or not source < node:
                raise VerifierError(f"{context.stage}: {node.name} reads {source.name}, which does not come before it")
    context.touched.clear()
    context.at = context.under_way = None


# ---- reading the graph --------------------------------------------------------------------------------------


def value(node: Any) -> torch.Tensor | None:
    """The fake tensor that a node stands for."""
    found = node.meta.get("val") if isinstance(node, Node) else None
    return found if isinstance(found, torch.Tensor) else None


def args(node: Node) -> tuple[Any, ...]:
    """A node's arguments, without fx's twenty-way union that no reader can use."""
    return node.args


def shape(node: Node) -> tuple[Any, ...]:
    """A node's sizes. A symbolic one that a guard has settled (``mm`` with a weight of 8 columns) is a number."""
    return tuple(size if type(size) is int else settled(size) for size in node.meta["val"].shape)


def dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype


def same_value(a: Any, b: Any) -> bool:
    """Shape, dtype and device of two fake values agree."""
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return False
    return a.dtype == b.dtype and a.device == b.device and same_sizes(a.shape, b.shape)


def is_call(node: Any, *targets: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_cast(node: Any) -> bool:
    """Whether `node` is a cast that only rounds or widens. One to float8 quantises: another number comes back."""
    made, source = (value(node), value(args(node)[0])) if is_call(node, *CASTS) else (None, None)
    if made is None or source is None or made.device != source.device:
        return False
    return {made.dtype, source.dtype} <= ROUNDING


def through_casts(node: Any) -> Any:
    """The node whose value, rounded, `node` is."""
    while is_cast(node):
        node = args(node)[0]
    return node


def is_parameter(node: Any) -> bool:
    """A graph input (every parameter and buffer is one), or what `hoist_weights` has made of them."""
    return isinstance(node, Node) and (node.op == "placeholder" or is_call(node, hoisted))


def stored(node: Node) -> Node:
    """The parameter of which `node` is a cast, or itself: kernels read parameters in their own dtype."""
    source: Node = through_casts(node)
    return source if is_parameter(source) else node


def of_parameters(node: Any) -> bool:
    """Whether a matrix is computed from graph inputs alone, by sums, products and scales."""
    pending, seen = [node], 0
    while pending:
        node, seen = pending.pop(), seen + 1
        if is_parameter(node) or not isinstance(node, Node):
            continue
        if seen > 64 or not is_call(node, *CASTS, *TRANSPOSES, *MATRIX_MATHS):
            return False
        pending += node.all_input_nodes
    return True


def transposed(node: Any) -> Node | None:
    """The matrix of which `node` is the transpose, if it is one."""
    if not is_call(node, *TRANSPOSES):
        return None
    source = args(node)[0]
    if value(source) is None or len(shape(source)) != 2:
        return None
    if node.target is aten.permute.default and [d % 2 for d in args(node)[1]] != [1, 0]:
        return None
    if node.target is aten.transpose.int and args(node)[1] % 2 == args(node)[2] % 2:
        return None
    return source


def reinterpreted(node: Any) -> Node | None:
    """The node whose numbers `node` has in the same order, under other sizes or copied (dropout in eval mode)."""
    if not isinstance(node, Node) or not node.args or value(node) is None or value(args(node)[0]) is None:
        return None
    source: Node = args(node)[0]
    if is_call(node, *VIEWS, *ONES) or (is_call(node, aten.clone.default) and not node.kwargs):
        return source
    if is_call(node, aten.expand.default):  # to what it is already
        return source if same_sizes(shape(node), shape(source)) else None
    if is_call(node, aten.permute.default):  # einsum moves dimensions of size one about
        moved = [d % len(shape(node)) for d in args(node)[1] if not same_size(shape(source)[d], 1)]
        return source if moved == sorted(moved) else None
    return None


def is_view(node: Any) -> bool:
    """Whether `node` shares memory with what it is made of."""
    if is_call(node, *VIEWS, operator.getitem):
        return True
    target = node.target if isinstance(node, Node) and node.op == "call_function" else None
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return any(found.alias_info is not None and not found.alias_info.is_write for found in target._schema.returns)


def with_views(node: Node) -> list[Node]:
    """`node` and all that is a view of it."""
    found = [node]
    for one in found:  # grows
        found += [user for user in one.users if is_view(user) and user not in found]
    return found


def returned(node: Node) -> bool:
    """Whether `node` or a view of it leaves the graph: whose memory it is, and its strides, are part of the answer."""
    return any(user.op == "output" for one in with_views(node) for user in one.users)


def empty_like(x: Node, sizes: tuple[Any, ...], out: torch.dtype) -> torch.Tensor:
    """A contiguous fake of `sizes` on x's device, under x's fake mode."""
    fake = x.meta["val"]
    with fake.fake_mode:
        return torch.empty(sizes, dtype=out, device=fake.device)


def leaves(terms: tuple[operators.Operator, ...]) -> list[Node]:
    """The nodes that a sum reads beside its activation."""
    return [leaf for leaf in pytree.tree_leaves(terms) if isinstance(leaf, Node)]


_ROOT = re.compile(r"L\['\w+'\](\._orig_mod)?|L__self__")
_ONE = re.compile(r"(?:\.__dict__\['_modules'\]|\._modules)\[('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")\]")
_PLAIN = re.compile(r"(\.\w+|\['?\w+'?\])+")


def _path(stack: dict[str, tuple[str, Any]]) -> str:
    """``model.layers.3.self_attn.q_proj`` from Dynamo's spelling of the modules around a node, outermost first.

    Each entry's path continues the one before it, by ``.name``, ``[index]`` or ``._modules['name']``, where a name may
    be anything that is no dot.
    """
    names, before = [], ""
    for path, _ in stack.values():
        rest = path[len(before) :] if path.startswith(before) else path
        before = path
        rest = rest[root.end() :] if (root := _ROOT.match(rest)) else rest
        while found := _ONE.match(rest):
            names.append(str(ast.literal_eval(found[1])))
            rest = rest[found.end() :]
        if _PLAIN.fullmatch(rest):
            names += re.findall(r"\w+", rest)
        elif rest:
            names.append(rest.removeprefix("."))
    return ".".join(names).removesuffix(".base_layer")


def path_of_source(name: str) -> str:
    """The same of one of Dynamo's sources."""
    return _path({"": (name, None)})


def _brief(node: Node) -> str:
    found = node.meta.get("val")
    return f"{tuple(found.shape)} {found.dtype}" if isinstance(found, torch.Tensor) else str(found)
