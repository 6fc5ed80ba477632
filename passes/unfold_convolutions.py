"""A convolution's adapter becomes linears: a kernel of one position is a projection of channels.

before (PEFT's LoRA on a ``Conv2d`` of k×k, the model in channels-last memory)::

    base = aten.convolution(x, W, bias, [1, 1], [1, 1], …)          # W [n, c, k, k]
    a    = aten.convolution(x, A, None, [1, 1], [1, 1], …)          # A [r, c, k, k]
    b    = aten.convolution(a, B, None, [1, 1], [0, 0], …)          # B [n, r, 1, 1]
    add  = aten.add(base, aten.mul(b, 2.0))

after::

    rows   = aten.permute(a, [0, 2, 3, 1])                          # channels last: a view
    linear = operators.linear(rows, aten.view(B, [n, r]))
    add    = aten.add(aten.permute(base, [0, 2, 3, 1]), aten.mul(linear, 2.0))
    back   = aten.permute(add, [0, 3, 1, 2])

A base of k×k stays with the library, and what it made is the residual of the adapter's last projection. Where the base
has a kernel of one position too, x, W, A and B are linears as any others, and `recover_operators` finds the same sum as
in a linear. Such x is copied to channels-last memory if it does not lie so, and the result back.

Only sums that hold an adapter are looked at: two convolutions in a row without anything between, the last of one
position, or two of one position and one input. GPUs are left to Inductor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph, Node

from gawscompile.analysis.identity import reinterpreted
from gawscompile.analysis.matrices import matrix_of, scaling_of
from gawscompile.analysis.reading import args, aten, dtype, empty_like, is_call, is_cast, is_parameter, shape, value
from gawscompile.ir.records import Reason
from gawscompile.ir.sizes import same_size, same_sizes, same_strides
from gawscompile.ir.sums import linear
from gawscompile.passes.context import Context

CONVOLUTION = aten.convolution.default
SUMS = (aten.add.Tensor, aten.sub.Tensor)
BY_ELEMENTS = (*SUMS, aten.mul.Tensor, aten.div.Tensor, aten.neg.default)


def run(graph: Graph, context: Context) -> None:
    settled: set[Node] = set()
    rows: dict[Node, Node] = {}
    if not graph.find_nodes(op="call_function", target=CONVOLUTION):
        return
    for node in reversed(graph.nodes):
        image = is_call(node, *SUMS) and value(node) is not None and len(shape(node)) > 2 and _by_elements(node)
        if not image or node in settled or not context.looks_at(node):
            continue
        region = _region(node)
        settled |= region
        if _adapted(region) and (why := _left(node, region)) is not None:
            context.record.notes.append(f"{context.module_path(node)}: {Reason.CONVOLUTION.value}: {why}")
        elif _adapted(region) and context.allows(node):
            _unfold(context, node, region, rows)


def is_projection(node: Any) -> bool:
    """Whether it is a convolution that looks at one position at a time, all of them, and all channels."""
    if not is_call(node, CONVOLUTION) or value(node) is None:
        return False
    x, weight, _, stride, padding, _, turned, _, groups = args(node)
    plain = not turned and groups == 1 and set(stride) == {1} and set(padding) == {0}
    sizes = shape(weight)
    batched = len(shape(x)) == len(sizes)
    known = is_parameter(weight) or _matrix(weight) is not None
    return plain and batched and known and all(same_size(size, 1) for size in sizes[2:])


def _matrix(weight: Any) -> Node | None:
    """The matrix of parameters that a convolution's weight is a view of, as LoKr's is."""
    matrix = reinterpreted(weight)
    fits = matrix is not None and same_sizes(shape(matrix), shape(weight)[:2]) and matrix_of(matrix) is not None
    return matrix if fits else None


def _region(root: Node) -> set[Node]:
    """`root` and what it is made of, by elements or by convolutions of one position, that nobody else reads."""
    found, pending = {root}, [root]
    while pending:
        node = pending.pop()
        conv = is_call(node, CONVOLUTION)
        for source in args(node)[:1] if conv else node.all_input_nodes:
            if source in found or value(source) is None or not all(user in found for user in source.users):
                continue
            kind = is_projection(source) or (not conv and _by_elements(source))
            if kind and len(shape(source)) == len(shape(root)):
                found.add(source)
                pending.append(source)
    return found


def _by_elements(node: Node) -> bool:
    """Whether it computes each number of an image of the same one of another, and of what all positions share."""
    if is_cast(node):
        return True
    if not is_call(node, *BY_ELEMENTS):
        return False
    return all(same_sizes(shape(n), shape(node)) or _shared(n, node) for n in node.all_input_nodes)


def _shared(source: Node, image: Node) -> bool:
    """Whether all positions of an image share it: a number, or one for each channel."""
    if value(source) is None or same_sizes(shape(source), shape(image)):
        return False
    sizes = (1,) * (len(shape(image)) - len(shape(source))) + shape(source)
    if len(sizes) != len(shape(image)) or not all(same_size(size, 1) for size in (sizes[0], *sizes[2:])):
        return False
    return same_size(sizes[1], 1) or same_size(sizes[1], shape(image)[1])


def _adapted(region: set[Node]) -> bool:
    """Whether an adapter is among its convolutions."""
    last = [node for node in region if is_projection(node)]
    in_a_row = any(is_call(args(node)[0], CONVOLUTION) and len(args(node)[0].users) == 1 for node in last)
    return in_a_row or len({args(node)[0] for node in last}) < len(last)


def _sources(region: set[Node]) -> list[Node]:
    """The images that a region is made of."""
    found = []
    for node in region:
        for source in args(node)[:1] if is_call(node, CONVOLUTION) else node.all_input_nodes:
            if source not in region and source not in found and not _shared(source, node):
                found.append(source)
    return found


def _left(root: Node, region: set[Node]) -> str | None:
    """Why a region stays as it is, if it does."""
    if root.meta["val"].device.type != "cpu":
        return "on a GPU the library has them"
    images = (root, *_sources(region))
    if not all(map(_image, images)):
        return "its images lie in memory in an order of their own"
    if any(is_call(source, CONVOLUTION) for source in images) and not all(map(_last, images)):
        # a copy of the base's result and one back are the two trips through memory that fusing would save
        return "its base looks at several positions, and channels do not come last in memory"
    return None


def _last(node: Node) -> bool:
    """Whether channels come last in memory."""
    rows = _to_rows(value(node))
    return same_strides(tuple(rows.shape), _plain(node, tuple(rows.shape)).stride(), rows.stride())


def _image(node: Node) -> bool:
    """Whether an image's memory is one of the two that are known."""
    image = value(node)
    assert image is not None
    return _last(node) or same_strides(shape(node), _plain(node, shape(node)).stride(), image.stride())


def _plain(node: Node, sizes: tuple[Any, ...]) -> Any:
    return empty_like(node, sizes, dtype(node))


def _order(dimensions: int) -> list[int]:
    """Channels last."""
    return [0, *range(2, dimensions), 1]


def _to_rows(image: Any) -> Any:
    """A view of an image's value."""
    return image.permute(_order(image.dim()))


def _unfold(context: Context, root: Node, region: set[Node], images: dict[Node, Node]) -> None:
    """Compute a region with channels last, and replace its root. `images`: those that were turned for other regions."""
    rows = _Rows(context, region, images).of(root)
    with context.graph.inserting_before(root):
        back = [0, len(shape(root)) - 1, *range(1, len(shape(root)) - 1)]
        new = context.insert(aten.permute.default, (rows, back), root, rows.meta["val"].permute(back))
        if not same_strides(shape(root), new.meta["val"].stride(), root.meta["val"].stride()):
            new = context.contiguous(new, root)
    context.replace(root, new)
    context.erase(root)
    context.matched()


@dataclass
class _Rows:
    """Nodes of a region, and what they are made of, with channels last."""

    context: Context
    region: set[Node]
    images: dict[Node, Node]  # from outside of regions: siblings read the same one
    made: dict[Node, Node] = field(default_factory=dict)

    def of(self, node: Node) -> Node:
        known, make = (self.made, self._computed) if node in self.region else (self.images, self._viewed)
        if node not in known or known[node]._erased:
            known[node] = make(node)
        return known[node]

    def _viewed(self, node: Node) -> Node:
        """An image from outside. Its view, or copy, stands where it does: any reader comes later."""
        graph = self.context.graph
        with graph.inserting_after(node):
            order = _order(len(shape(node)))
            rows = self.context.insert(aten.permute.default, (node, order), node, _to_rows(value(node)))
        if _last(node):
            return rows
        with graph.inserting_after(rows):
            return self.context.contiguous(rows, node)

    def _computed(self, node: Node) -> Node:
        if is_call(node, CONVOLUTION):
            x, _, bias = args(node)[:3]
            return self._linear(node, self.of(x), bias, node)
        scaling = scaling_of(node)
        product = scaling[0] if scaling is not None else node
        whole = is_projection(product) and args(product)[2] is None and dtype(product) == dtype(node)
        if whole and args(product)[0] not in self.region:
            # a base is never scaled: what the last projection reads is, and has few channels
            return self._linear(product, self._like(node, {product: self.of(args(product)[0])}), None, node)
        return self._like(node, {})

    def _like(self, node: Node, read: dict[Node, Node]) -> Node:
        """What `node` computes by elements, of other nodes than its own where they are given."""
        reads = tuple(read[one] if one in read else self._read(one, node) for one in args(node))
        sizes = next(iter(read.values())).meta["val"].shape if read else _to_rows(value(node)).shape
        assert callable(node.target)
        with self.context.graph.inserting_before(node):
            new = self.context.insert(node.target, reads, node, _plain(node, tuple(sizes)))
            new.kwargs = dict(node.kwargs)
        return new

    def _linear(self, node: Node, x: Node, bias: Node | None, before: Node) -> Node:
        weight = args(node)[1]
        flat = _matrix(weight) or self._view(weight, list(shape(weight)[:2]))
        with self.context.graph.inserting_before(before):
            reads = (x, flat) if bias is None else (x, flat, bias)
            return self.context.insert(linear, reads, node, _plain(node, tuple(_to_rows(value(node)).shape)))

    def _read(self, source: Any, node: Node) -> Any:
        if not isinstance(source, Node):
            return source
        if not _shared(source, node):
            return self.of(source)
        return source if shape(source) == () else self._flat(source, node)

    def _flat(self, source: Node, node: Node) -> Node:
        """What all positions of `node` share, of one dimension (without any, it would promote no dtype). Of a number
        less than another one it is found too, as DoRA has c and c - 1."""
        if source in self.made:
            return self.made[source]
        if is_call(source, *SUMS) and not isinstance(args(source)[1], Node) and not source.kwargs:
            flat = self._flat(args(source)[0], node)
            plain = _plain(source, tuple(flat.meta["val"].shape))
            assert callable(source.target)
            with self.context.graph.inserting_after(source):
                new = self.context.insert(source.target, (flat, args(source)[1]), source, plain)
        else:
            single = all(same_size(size, 1) for size in shape(source))
            new = self._view(source, [1 if single else shape(node)[1]])
        self.made[source] = new
        return new

    def _view(self, node: Node, sizes: list[Any]) -> Node:
        """As early as can be: any reader comes later, and siblings group if all that they read is before the first."""
        fake = node.meta["val"]
        with fake.fake_mode:
            seen = fake.view(sizes)
        with self.context.graph.inserting_after(node):
            return self.context.insert(aten.view.default, (node, sizes), node, seen)
