"""Proof of a graph's rewrites on the spot: ``options={"verify": True}``.

Every node of the rewritten graph that stands for a node of the original one is computed from both graphs, from the
same random inputs, in fp64, where casts between floating dtypes are identities: the two must agree to 1e-9. Then the
generated kernels run in their own dtype, by every plan of their table, against the fp64 answer. Several draws;
symbolic sizes take another value in each; parameters are random numbers of the same shape, so nothing depends on what
a model happens to hold. A rewrite that fails is undone: the original nodes come back in its place.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import _disable_current_modes

from gawscompile.analysis.collectives import is_collective
from gawscompile.analysis.identity import reinterpreted, through_casts
from gawscompile.analysis.packed import int4_weight, numbers_of_codes, product_of, rounds_activation
from gawscompile.analysis.reading import CASTS, ROUNDING, args, aten, dtype, is_call, is_cast
from gawscompile.ir import banked, recipe
from gawscompile.ir.records import Reason, plain
from gawscompile.passes.context import Context
from gawscompile.planning.table import PlanTable, Program
from gawscompile.runtime import attention
from gawscompile.runtime.banked import BANKED
from gawscompile.runtime.ops import OPS
from gawscompile.verify.collectives import simulated

SIZES = (3, 2, 7)
"""One draw each: what the first symbolic size is in it (the others follow from it)."""

EXACT = 1e-9
KERNEL = {torch.float32: 3e-5, torch.bfloat16: 3 * 2**-8, torch.float16: 3 * 2**-11}
"""Largest error over largest answer; kernels by the dtype that they write."""


@dataclass
class Rewrite:
    """Nodes of the rewritten graph that came together, with the original nodes that they stand for."""

    nodes: list[Node]
    call: Node | None = None  # of a group's kernels, whose outputs the nodes are

    @property
    def anchor(self) -> Node:
        return self.call or self.nodes[0]


@dataclass
class Values:
    """What the nodes of one graph are in one draw, in fp64."""

    draw: int
    generator: torch.Generator
    known: dict[Node, Any] = field(default_factory=dict)

    def run(self, nodes: list[Node]) -> None:
        for node in nodes:
            if node not in self.known:
                self.known[node] = self._of(node)

    def _of(self, node: Node) -> Any:
        fake = node.meta.get("val")
        if isinstance(fake, torch.SymInt):
            return _size(fake, self.draw)
        if node.op == "placeholder":
            return random(fake, self.draw, self.generator)
        if node.op == "get_attr":
            result = operator.attrgetter(str(node.target))(node.graph.owning_module)
        else:
            assert callable(node.target), node
            inputs: Any
            inputs, keywords = map_arg((node.args, node.kwargs), self.known.__getitem__)
            if is_cast(node):
                result = inputs[0]
            elif is_call(node, *CASTS) and inputs[0].dtype in (torch.int8, torch.uint8) and dtype(node) in ROUNDING:
                result = inputs[0].double()
            elif is_call(node, aten._weight_int4pack_mm_for_cpu.default):  # in fp64, by what its kernel makes of codes
                x, codes, group, scales = inputs
                result = x @ int4_weight(codes, group, scales).T
            elif (found := product_of(node)) is not None:  # whose own kernel knows no fp64
                x, weight, bias = cast(Any, map_arg(found, self.known.__getitem__))
                result = weight.apply(x, bias)
            elif (made := numbers_of_codes(node, inputs)) is not None:
                result = made
            elif rounds_activation(node):  # what its product makes of it is known
                result = inputs[0], None, None
            elif is_call(node, *OPS):
                program = Program.parse(inputs[2])
                result = program.run(inputs[0], inputs[1], functools.partial(recipe.run, exact=True))
            elif is_call(node, attention.ATTEND):
                result = attention.meaning(*inputs)
            elif is_call(node, BANKED):
                result = banked.apply(*inputs[:5])
            elif is_collective(node):
                result = simulated(node, inputs)
            else:
                # what was drawn lies plainly, whatever the graph's own value does
                target = aten.reshape.default if is_call(node, aten.view.default) else node.target
                result = target(*inputs, **keywords)
        return result.double() if isinstance(result, torch.Tensor) and result.is_floating_point() else result

    def join(self) -> None:
        """What known nodes are the parts of is known too: streams that `split_streams` takes apart are whole in the
        original graph. A part that nobody has drawn yet is what known nodes, and others that are drawn, make it.
        """
        for node in list(self.known):
            split: Any = args(node)[0] if is_call(node, operator.getitem) else None
            if is_call(split, aten.split_with_sizes.default) and args(split)[0] not in self.known:
                items = {args(user)[1]: user for user in split.users}
                fakes = split.meta["val"]
                missing = [i for i in range(len(fakes)) if items.get(i) not in self.known]
                made = self._made(split) if missing else None
                parts = [
                    self.known[items[i]]
                    if i not in missing
                    else made[i]
                    if made is not None
                    else random(fake, self.draw, self.generator)
                    for i, fake in enumerate(fakes)
                ]
                self.known[args(split)[0]] = torch.cat([part.double() for part in parts], *args(split)[2:])

    def _made(self, split: Any) -> Any:
        """The parts of a split by what it is computed of; None where that cannot be run in fp64. Inputs of the graph
        that are drawn for it keep their numbers."""
        whole, _, *axis = args(split)
        apart = Values(self.draw, self.generator, dict(self.known))
        try:
            apart.run(cone([whole], apart.known.__contains__)[0])
            sizes = [_size(fake.shape[axis[0] if axis else 0], self.draw) for fake in split.meta["val"]]
            found = apart.known[whole].split(sizes, *axis)
        except Exception:  # an operation of somebody's that takes fp32 alone
            return None
        self.known |= {node: value for node, value in apart.known.items() if node.op != "call_function"}
        return found


def random(fake: Any, draw: int, generator: torch.Generator, activation: bool = False) -> Any:
    """A random value like `fake`: floats in fp64, representable in its dtype, so sized that ``W x`` is near 1."""
    if isinstance(fake, torch.SymInt):
        return _size(fake, draw)
    if not isinstance(fake, torch.Tensor):
        return fake
    sizes = [_size(size, draw) for size in fake.shape]
    if fake.dtype in (torch.int8, torch.uint8):  # a quantised weight's codes
        return torch.randint(0, 256, sizes, generator=generator).to(torch.uint8).view(fake.dtype)
    if not fake.is_floating_point():
        return torch.randint(0, 2, sizes, generator=generator).to(fake.dtype)
    numbers = torch.randn(sizes, generator=generator, dtype=torch.float64)
    if len(sizes) == 2 and not activation:
        numbers /= max(sizes[-1], 1) ** 0.5
    elif len(sizes) == 1:
        numbers /= 10  # a bias: no tolerance should come from it
    return numbers.to(fake.dtype).double()


def _size(size: Any, draw: int) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    # a symbol has one value in all of a draw: it follows from the symbol's number
    values = {symbol: SIZES[draw] + int("0" + str(symbol).lstrip("su")) % 4 for symbol in expression.free_symbols}
    return int(expression.subs(values))


def verify_rewrites(context: Context) -> None:
    """Prove every rewrite of ``context.graph``; undo and report the ones that fail. `context` knows the originals."""
    proven = 0
    for rewrite in rewrites(context):
        with torch.no_grad(), _disable_current_modes():  # compilation runs under fake tensors; these are real
            fault = _fault(context, rewrite)
        if fault is None:
            proven += 1
        else:
            _undo(context, rewrite, fault)
    context.record.passes["verify"] = proven
    context.record.notes.append(f"verify: {proven} rewrites agree with their originals in {len(SIZES)} random draws")


def rewrites(context: Context) -> list[Rewrite]:
    found: dict[Node, Rewrite] = {}
    for node in context.graph.nodes:
        if node not in context.stands_for or not node.users:
            continue
        source = args(node)[0] if is_call(node, operator.getitem) else None
        call = source if is_call(source, *OPS) else None
        found.setdefault(call or node, Rewrite([], call)).nodes.append(node)
    return list(found.values())


def cone(outputs: Iterable[Node], stop: Any) -> tuple[list[Node], list[Node]]:
    """(the nodes that `outputs` are computed from, in order, down to where `stop` holds; the nodes where it does)."""
    inside: dict[Node, None] = {}
    edge: dict[Node, None] = {}
    pending = list(outputs)
    while pending:
        node = pending.pop()
        if node in inside or node in edge:
            continue
        if stop(node):
            edge[node] = None
        else:
            inside[node] = None
            pending += node.all_input_nodes
    return sorted(inside), sorted(edge)


def _fault(context: Context, rewrite: Rewrite) -> str | None:
    """What is wrong with a rewrite, if anything: the first difference, or what could not be run."""
    own = set(rewrite.nodes)
    after, edge = cone(rewrite.nodes, lambda n: n not in own and context.original(n) is not None)
    for draw in range(len(SIZES)):
        generator = torch.Generator().manual_seed(draw)
        old, new = Values(draw, generator), Values(draw, generator)
        wanted = [context.stands_for[node] for node in rewrite.nodes]
        ends = set(map(context.original, edge))
        _draw_banks(wanted, ends, old)
        _draw_indices(wanted, ends, old)
        narrowest: dict[Node, Any] = {}  # casts of one value must be one number, which all of them can hold
        for node in edge:
            origin = context.original(node)
            assert origin is not None
            base = _base(origin)
            narrowest[base] = _narrower(narrowest.get(base, base.meta.get("val")), node.meta.get("val"))
        read = context.original(args(rewrite.call)[0]) if rewrite.call else None
        x = _base(read) if read else None
        for node in edge:
            origin = context.original(node)
            assert origin is not None
            source = through_casts(origin)
            if source not in old.known:
                base = _base(source)
                if _determined(source, old) is None:
                    old.known[base] = random(narrowest[base], draw, generator, base is x)
                between = _determined(source, old)
                if between is None:
                    old.known[source] = random(source.meta.get("val"), draw, generator, base is x)
                else:
                    old.run(between)
            old.known[origin] = new.known[node] = old.known[source]
        try:
            old.join()
            before, _ = cone(wanted, old.known.__contains__)
            old.run(before)
            new.run(after)
            for node, origin in zip(rewrite.nodes, wanted, strict=True):
                fault = _difference(f"{node.name} for {origin.name}", new.known[node], old.known[origin], EXACT)
                if fault:
                    return f"draw {draw}, fp64: {fault}"
            if rewrite.call is not None:
                fault = _kernel_fault(rewrite, new, [old.known[origin] for origin in wanted])
                if fault:
                    return f"draw {draw}, {fault}"
            for node, origin in zip(rewrite.nodes, wanted, strict=True):
                if is_call(node, attention.ATTEND) and (fault := _attention_fault(node, new, old.known[origin])):
                    return f"draw {draw}, {fault}"
        except Exception as error:
            return f"draw {draw}: cannot be run: {type(error).__name__}: {error}"
    return None


def _draw_banks(wanted: Iterable[Node], ends: Container[Node | None], values: Values) -> None:
    """A small pool, and schedules that fit it, for the banks that are read between `ends` and `wanted`: not any numbers
    are a schedule."""
    inside, _ = cone(wanted, ends.__contains__)
    for node in inside:
        if not is_call(node, BANKED):
            continue
        x, pool, entries = args(node)[:3]
        table, k, n = entries.meta["val"].shape[:2], x.meta["val"].shape[-1], node.meta["val"].shape[-1]
        rows, width, k, n = (_size(size, values.draw) for size in (*table, k, n))
        modes = None if pool.meta["val"].device.type == "cpu" else sum(args(node)[5:])
        schedule, room = banked.drawn(rows - 1, width, k, n, values.generator, modes)
        numbers = random(pool.meta["val"].new_empty(max(room, 1)), values.draw, values.generator)
        known = values.known.get(pool)
        if known is None or len(known) < len(numbers):
            values.known[pool] = numbers
        values.known[entries] = schedule


def _draw_indices(wanted: Iterable[Node], ends: Container[Node | None], values: Values) -> None:
    """Any features, from either end, for parameters that index activations between `ends` and `wanted`."""
    for node in cone(wanted, ends.__contains__)[0]:
        if is_call(node, aten.index.Tensor) and isinstance(args(node)[1][-1], Node):
            indices: Node = _base(args(node)[1][-1])
            fake: Any = indices.meta.get("val")
            plain = indices.op == "placeholder" and isinstance(fake, torch.Tensor) and fake.dim() == 1
            if plain and fake.dtype in (torch.int32, torch.int64):
                count, size = (_size(n, values.draw) for n in (args(node)[0].meta["val"].shape[-1], fake.shape[0]))
                drawn = torch.randint(-count, count, (size,), generator=values.generator)
                values.known.setdefault(indices, drawn.to(fake.dtype))


def _determined(source: Node, values: Values) -> list[Node] | None:
    """The nodes that `source` is computed by from values that are known, if those determine it: a draw of its own would
    contradict them."""
    known = values.known
    between, ends = cone([source], lambda n: n in known or n.op != "call_function")
    sizes = [end for end in ends if isinstance(end.meta.get("val"), torch.SymInt)]  # the draw says what they are
    others = [end for end in ends if end not in sizes]
    return [*sizes, *between] if others and all(end in known for end in others) else None


def _base(node: Node) -> Node:
    """What `node` is a view or a cast of: drawn in its place, as others may read other views of it."""
    while (below := reinterpreted(through_casts(node))) is not None:
        node = below
    return through_casts(node)


def _narrower(a: Any, b: Any) -> Any:
    """Of two values that are views and casts of each other, the first with numbers that both can hold."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return a
    if a.is_floating_point() and b.is_floating_point():  # of 16 bits, bf16's have fewer digits
        return a.to(b.dtype) if torch.finfo(b.dtype).eps > torch.finfo(a.dtype).eps else a
    return a.to(b.dtype) if b.dtype.itemsize < a.dtype.itemsize else a


def _difference(what: str, got: Any, want: Any, tolerance: float) -> str | None:
    if not isinstance(got, torch.Tensor) or not isinstance(want, torch.Tensor) or got.shape != want.shape:
        return f"{what}: {_brief(got)} is not {_brief(want)}"
    if not want.numel():
        return None
    error, size = (got.double() - want).abs().max().item(), want.abs().max().item()
    return None if error <= tolerance * (size + 1e-30) else f"{what}: off by {error:.3g} where answers reach {size:.3g}"


def _brief(thing: Any) -> str:
    return f"{tuple(thing.shape)} {thing.dtype}" if isinstance(thing, torch.Tensor) else repr(thing)


def _kernel_fault(rewrite: Rewrite, new: Values, wanted: list[torch.Tensor]) -> str | None:
    """Run the generated kernels, by every plan of the table, on the draw's inputs in their own dtypes."""
    call = rewrite.call
    assert call is not None
    x, operands, text = args(call)
    program = Program.parse(text)

    def own(node: Node) -> torch.Tensor:
        return new.known[node].to(node.meta["val"].device, node.meta["val"].dtype).contiguous()

    for plan in program.plans:
        alone = dataclasses.replace(program, table=PlanTable(((plan, None),)))
        outputs = torch.ops.gaws.project(own(x), [own(node) for node in operands], str(alone))
        for node, want in zip(rewrite.nodes, wanted, strict=True):
            got = outputs[args(node)[1]].cpu()
            fault = _difference(f"output {args(node)[1]}", got, want, KERNEL[got.dtype])
            if fault:
                return f"plan {plan}, {got.dtype}: {fault}"
    return None


def _attention_fault(node: Node, new: Values, want: torch.Tensor) -> str | None:
    """Run the generated kernel of attention on the draw's inputs in their own dtypes."""

    def own(one: Node) -> torch.Tensor:
        fake = one.meta["val"]
        return new.known[one].to(fake.device, fake.dtype)

    inputs: Any = map_arg(node.args, own)
    got = attention.ATTEND(*inputs)
    return _difference(f"{inputs[5]}, {got.dtype}", got, want, KERNEL[got.dtype])


def _undo(context: Context, rewrite: Rewrite, fault: str) -> None:
    """Put the original nodes in the place of a rewrite, and say so."""
    anchor = rewrite.anchor
    entries = anchor.meta.get("gaws_entries", [])
    # what is hoisted only the op can read: it is computed in the graph again
    kept = [n for n in context.graph.nodes if n < anchor and not is_call(n, recipe.hoisted)]
    standing = {origin: n for n in kept if (origin := context.original(n)) is not None}
    wanted = [context.stands_for[node] for node in rewrite.nodes]
    before, _ = cone(wanted, lambda n: n not in wanted and n in standing)
    with context.graph.inserting_before(anchor):
        for origin in before:
            standing[origin] = context.graph.node_copy(origin, standing.__getitem__)
    for node, origin in zip(rewrite.nodes, wanted, strict=True):
        context.replace(node, standing[origin])
        del context.stands_for[standing[origin]]  # it is the original
        context.copied[standing[origin]] = origin
        context.erase(node)
    where = ", ".join(plain(entry.path) for entry in entries) or context.module_path(anchor)
    spec = f"; program: {args(rewrite.call)[2]}" if rewrite.call else ""
    for index in {entry.group for entry in entries if entry.group is not None}:
        context.record.drop_group(index)
    for entry in entries:
        context.reject(entry, Reason.UNPROVEN, fault)
    context.complain(f"verify refused the rewrite of {where}: {fault}{spec}. The original stays in its place.")
