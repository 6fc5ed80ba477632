"""Quantised weights: which parameters hold a matrix as codes, scales and zeros, read from how a graph makes it.

No list of libraries: a matrix is traced back through views, casts, products with numbers that groups of its columns
share, and differences to such, down to a parameter of bytes. Known by name are operators that are a product with such
a matrix (bitsandbytes', and aten's with a weight of 4 bits on a CPU) or make it, and HQQ's way to take bytes apart.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Node

from gawscompile.analysis.identity import reinterpreted
from gawscompile.analysis.reading import (
    CASTS,
    args,
    aten,
    dtype,
    is_call,
    is_cast,
    is_parameter,
    shape,
    transposed,
    value,
)
from gawscompile.ir.packed import CODINGS, READ, Packed
from gawscompile.ir.sizes import same_sizes
from gawscompile.ir.types import DTYPE_NAMES, SpecError

STEPS = 32
"""Nodes at most between a weight and its codes."""

BYTES = {torch.int8: "int8", torch.uint8: "uint8"}
INTEGERS = {torch.int8: 8, torch.uint8: 8, torch.int16: 16, torch.int32: 32, torch.int64: 64}
WIDE = (*DTYPE_NAMES, torch.float64)
"""Dtypes of floats that only round."""


def packed_of(node: Any) -> Packed | None:
    """The matrix `node` ``[n, k]`` as it is kept, if it is made of codes."""
    fake = value(node)
    if fake is None or fake.dtype not in DTYPE_NAMES or fake.dim() != 2:
        return None
    if not all(isinstance(size, int) for size in shape(node)):
        return None
    found = _traced(node)
    return found if found is not None and _readable(found, fake) else None


def _readable(packed: Packed, fake: Any) -> bool:
    """Whether the kernels of the device of `fake` read such codes."""
    return packed.kept.layout in READ.get(fake.device.type, ())


def _traced(node: Any) -> Packed | None:
    """What `packed_of` finds, for whatever device."""
    n, k = shape(node)
    group: int | None = None
    scales: Node | None = None
    zeros: Node | None = None
    turned = False
    for _ in range(STEPS):
        if (source := transposed(node)) is not None:
            node, turned = source, not turned
        elif (source := _exact(node)) is not None:
            node = source
        elif (coded := _halves(node)) is not None:
            return None if turned else _settled(coded, n, k, "uint4_halves", group or k, scales, zeros)
        elif is_parameter(node):
            coding = BYTES.get(_dtype(node)) if not turned else None
            return _settled(node, n, k, coding, group or k, scales, zeros) if coding else None
        elif turned:
            return None
        elif _name(node) == WHOLE_4BIT:
            made = _dequantized(node)
            return made if made is not None and made.sizes == (n, k) and scales is None and zeros is None else None
        elif (source := reinterpreted(node)) is not None:
            node = source
        elif is_call(node, aten.mul.Tensor, aten.sub.Tensor) and not node.kwargs and not _wraps(node):
            whole, shared = args(node)
            if is_call(node, aten.mul.Tensor) and _numbers(whole) < _numbers(shared):
                whole, shared = shared, whole
            columns = _columns(shared, whole)
            taken = scales if is_call(node, aten.mul.Tensor) else zeros
            if not columns or taken is not None or group not in (None, columns):
                return None
            if is_call(node, aten.mul.Tensor):
                group, scales = columns, shared
            elif scales is not None:  # zeros come off first
                group, zeros = columns, shared
            else:
                return None
            node = whole
        else:
            return None
    return None


def product_of(node: Any) -> tuple[Node, Packed, Node | None] | None:
    """(x, W, bias) where `node` is the product with a packed weight by one operator that knows how it is kept."""
    if is_call(node, operator.getitem) and args(node)[1] == 0 and _name(args(node)[0]) == MIXED:
        node = args(node)[0]
    elif _name(node) == MIXED:  # a tuple, whose first part is the product
        return None
    if _name(node) not in _PRODUCTS:
        return None
    x, weight, bias = _PRODUCTS[_name(node)](node)
    fake = value(x)
    known = weight is not None and fake is not None and fake.dtype in DTYPE_NAMES and _readable(weight, fake)
    return (x, weight, bias) if weight is not None and known else None


def _argument(node: Node, at: int, name: str) -> Any:
    """The argument at that place or by that name, or None."""
    return args(node)[at] if len(args(node)) > at else node.kwargs.get(name)


def _gemm_4bit(node: Node) -> tuple[Node, Packed | None, Node | None]:
    """``gemm_4bit(x, codes, [n, k], absmax, blocksize, type, bias, absmax_8bit, absmax_code, absmax_offset)``. Where
    scales are coded, ``absmax`` is what those share."""
    x, codes, (n, k), absmax, group, coding = args(node)[:6]
    places = enumerate(("absmax_8bit", "absmax_code", "absmax_offset"), 7)
    coded, levels, offset = (_argument(node, at, name) for at, name in places)
    scales = (absmax, None, None, None, None) if coded is None else (coded, None, levels, absmax, offset)
    return x, _weight(codes, n, k, coding, group, None, *scales), _argument(node, 6, "bias")


def _dequantized(node: Node) -> Packed | None:
    """The packed weight that ``dequantize_4bit(codes, absmax, blocksize, type, [n, k], dtype)`` makes a matrix of:
    bitsandbytes does so for several tokens on a GPU, up to version 0.49."""
    codes, absmax, group, coding, sizes = args(node)[:5]
    if len(sizes) != 2:
        return None
    scales = (absmax, None, None, None, None)
    if is_call(absmax, aten.add.Tensor) and not absmax.kwargs and _name(args(absmax)[0]) == WHOLE_8BIT:
        made, offset = args(absmax)
        coded, shared, levels = args(made)[:3]  # how many scales share one of theirs is seen by its sizes
        if dtype(made) != torch.float32:
            return None
        scales = (coded, None, levels, shared, offset)
    return _weight(codes, *sizes, coding, group, None, *scales)


def numbers_of_codes(node: Any, inputs: Any) -> torch.Tensor | None:
    """What bitsandbytes' operator that `node` is makes of its `inputs`, in fp64, which it does not know itself."""
    if _name(node) not in (WHOLE_4BIT, WHOLE_8BIT) or inputs[0].dtype != torch.uint8:
        return None
    codes, scales = inputs[0].reshape(-1), inputs[1].double().reshape(-1)
    if _name(node) == WHOLE_8BIT:
        levels, group, sizes = inputs[2], inputs[3], inputs[0].shape
        found = levels.double()[codes.long()]
    else:
        group, coding, sizes = inputs[2:5]
        found = CODINGS[coding].numbers(codes, None, 1, 2 * len(codes), torch.float64)[0, : math.prod(sizes)]
    return (found * scales.repeat_interleave(group)[: len(found)]).reshape(sizes)


def _gemv_4bit(node: Node) -> tuple[Node, Packed | None, Node | None]:
    """``gemv_4bit(x, codes, [n, k], absmax, levels, blocksize)``, which runs any number of tokens: on a CPU its weight
    lies in blocks of rows, and its shapes say so."""
    x, codes, (n, k), absmax, levels, group = args(node)[:6]
    in_blocks = shape(codes) == (n, k // 2) and shape(absmax) == (k // group, n)
    return x, _weight(codes, n, k, "table4_blocks", group, levels, absmax) if in_blocks else None, None


def _int4_product(node: Node) -> tuple[Node, Packed | None, Node | None]:
    """``_weight_int4pack_mm_for_cpu(x, codes, group, scales)``: torchao's weights of 4 bits, and GPTQ's and AWQ's as
    gptqmodel lays them out, which rounds x to bf16. How codes lie depends on the vectors of the CPU."""
    x, codes, group, scales = args(node)
    rows = TILES.get(torch.backends.cpu.get_cpu_capability())
    n, k = len(shape(codes)) == 2 and shape(codes)[0], shape(x)[-1]
    if not rows or not isinstance(n, int) or not isinstance(k, int):
        return x, None, None
    x, order = _reordered(x)
    return x, _weight(codes, n, k, f"int4_tiles{rows}", group, None, scales, order=order), None


def _reordered(node: Any) -> tuple[Node, Node | None]:
    """(x, indices) where `node` is x, or ``x[:, indices]``, copied or rounded to bf16 before or after."""
    x, indices = node, None
    while True:
        source = reinterpreted(x)
        if is_call(x, aten.clone.default) or (is_cast(x) and dtype(x) == torch.bfloat16):
            x = args(x)[0]
        elif source is not None and same_sizes(shape(source), shape(x)):
            x = source
        elif indices is None and is_call(x, aten.index.Tensor) and len(args(x)[1]) == len(shape(args(x)[0])):
            x, (*tokens, indices) = args(x)
            if any(one is not None for one in tokens) or shape(indices) != (shape(x)[-1],) or not _parameter(indices):
                return node, None
        else:
            return x, indices


def int4_weight(codes: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
    """W ``[n, k]`` in fp64 as aten's product on this CPU reads it: with scales of one its numbers are the codes."""
    n, k = len(codes), scales.shape[0] * group
    plain = torch.tensor([1.0, 0.0]).expand(k // group, n, 2).contiguous()
    levels = torch.ops.aten._weight_int4pack_mm_for_cpu(torch.eye(k), codes, group, plain).double()
    scale, added = scales.double().repeat_interleave(group, 0).unbind(-1)
    return (levels * scale + added).T


TILES = {"AVX2": 32, "AVX512": 64}
"""Rows that lie together, by the vectors that aten's kernels are built for."""


def _int8_product(node: Node) -> tuple[Node, Packed | None, Node | None]:
    """``int8_scaled_mm(codes of x, codes, scales of x, scales, bias, dtype)``, or ``int8_mixed_scaled_mm(x, codes of x,
    codes, scales of x, scales, outliers, bias)``. x's codes round it; W x is what they stand for."""
    mixed = _name(node) == MIXED
    coded, codes, rows, scales = args(node)[1:5] if mixed else args(node)[:4]
    x, weight = coded, None
    made: Any = args(coded)[0] if is_call(coded, operator.getitem) else None
    own = all(is_call(one, operator.getitem) and args(one) == (made, at) for at, one in enumerate((coded, rows)))
    if _name(made) == VECTORWISE and own and (mixed or not _argument(made, 1, "threshold")):
        x, wanted = args(made)[0], args(node)[0] if mixed else node
        while is_cast(x) and dtype(x) != dtype(wanted):
            x = args(x)[0]
        if dtype(x) == dtype(wanted) and (x is wanted or not mixed) and len(shape(codes)) == 2:
            n, k = shape(codes)
            weight = _weight(codes, n, k, "int8", k, None, scales, factor=1 / 127)
    return x, weight, _argument(node, 6 if mixed else 4, "bias")


def _weight(
    codes: Any, n: int, k: int, coding: str, group: int, *parts: Any, factor: float = 1.0, order: Any = None
) -> Packed | None:
    """The weight of these parts, if they are parameters and fit together."""
    found = [part if part is None else _parameter(part) for part in (order, codes, *parts)]
    if any(part is not None and one is None for part, one in zip((order, codes, *parts), found, strict=True)):
        return None
    order, held, *rest = found
    weight = Packed(held, n, k, coding, group, *rest, factor=factor, order=order)  # type: ignore[misc,arg-type]
    try:
        weight.features(k)
    except SpecError:
        return None
    return weight


VECTORWISE = "bitsandbytes::int8_vectorwise_quant"
"""Rounds an activation to codes."""

WHOLE_4BIT, WHOLE_8BIT = "bitsandbytes::dequantize_4bit", "bitsandbytes::dequantize_blockwise"
"""Make a matrix of codes, and the scales of one whose scales are coded."""

MIXED = "bitsandbytes::int8_mixed_scaled_mm"
"""Leaves columns of large numbers as they are, and returns those beside its product."""

_PRODUCTS = {
    "bitsandbytes::gemm_4bit": _gemm_4bit,
    "bitsandbytes::gemv_4bit": _gemv_4bit,
    "bitsandbytes::int8_scaled_mm": _int8_product,
    "aten::_weight_int4pack_mm_for_cpu": _int4_product,
    MIXED: _int8_product,
}


def rounds_activation(node: Any) -> bool:
    """Whether it makes codes of an activation, or leaves out some of it, and `product_of` knows the product."""
    return _name(node) in (VECTORWISE, MIXED)


def with_scales(packed: Packed, scales: Node) -> Packed | None:
    """`packed`, of which nothing is scaled yet, with a scale for each row."""
    if packed.scales is not None or packed.zeros is not None:
        return None
    return _settled(packed.codes, packed.n, packed.k, packed.coding, packed.k, scales, None)


def _settled(
    codes: Node, n: int, k: int, coding: str, group: int, scales: Node | None, zeros: Node | None
) -> Packed | None:
    """With the parameters that hold scales and zeros, if those are such."""
    found, factor = _scaled(scales) if scales is not None else (None, 1.0)
    zero, times = _scaled(zeros) if zeros is not None else (None, 1.0)
    if (scales is not None and found is None) or (zeros is not None and zero is None) or times != 1.0:
        return None
    # a kernel has the factor in fp32, and takes scales that are bytes for coded ones
    if not 1e-30 < abs(factor) < 1e30 or _dtype(found) == torch.uint8:
        return None
    return _weight(codes, n, k, coding, group, None, found, zero, factor=factor)


def _scaled(node: Node) -> tuple[Node | None, float]:
    """(p, c) where `node` is c times the parameter p, under views and casts."""
    factor = 1.0
    for _ in range(STEPS):
        if is_parameter(node):
            fine = _dtype(node) in DTYPE_NAMES or _dtype(node) in BYTES
            return (_parameter(node) if fine else None), factor
        if (source := _exact(node) or reinterpreted(node)) is not None:
            node = source
        elif is_call(node, aten.mul.Tensor, aten.div.Tensor) and isinstance(args(node)[1], (int, float)):
            by = float(args(node)[1])
            if not by or not math.isfinite(by) or _dtype(node) not in WIDE:
                break
            factor *= by if is_call(node, aten.mul.Tensor) else 1 / by
            node = args(node)[0]
        else:
            break
    return None, factor


def _exact(node: Any) -> Node | None:
    """What `node` is a cast of that keeps numbers: to floats, or of integers to wider ones."""
    if not is_call(node, *CASTS) or value(args(node)[0]) is None:
        return None
    source: Node = args(node)[0]
    made, given = _dtype(node), _dtype(source)
    if node.meta["val"].device != source.meta["val"].device:
        return None
    bits = INTEGERS.get(made, 0)
    wider = made == given or (given in INTEGERS and bits > INTEGERS[given] and made != torch.uint8)
    return source if wider or (made in WIDE and given in (*WIDE, *INTEGERS)) else None


def _wraps(node: Node) -> bool:
    """Whether its numbers may not fit its dtype: a difference of bytes is one modulo 256."""
    return _dtype(node) not in WIDE and INTEGERS.get(_dtype(node), 0) < 32


def _columns(shared: Any, whole: Any) -> int:
    """How many columns of `whole`, whose last axis they are, share each number of `shared`; 0 if it is not so."""
    if value(shared) is None or value(whole) is None or len(shape(shared)) != len(shape(whole)):
        return 0
    (*a, one), (*b, columns) = shape(shared), shape(whole)
    return columns if one == 1 and a == b and isinstance(columns, int) and columns > 1 else 0


def _dtype(node: Any) -> Any:
    found = value(node)
    return None if found is None else found.dtype


def _numbers(node: Any) -> int:
    found = value(node)
    return 0 if found is None else found.numel()


def _parameter(node: Any) -> Node | None:
    """The parameter that `node` is, or a view of it."""
    while isinstance(node, Node) and not is_parameter(node):
        node = reinterpreted(node)
    found = value(node)
    return node if found is not None and found.is_contiguous() else None


def _name(node: Any) -> str:
    target = node.target if isinstance(node, Node) and node.op == "call_function" else None
    return str(target.name()).removesuffix(".default") if isinstance(target, torch._ops.OpOverload) else ""


def _halves(node: Any) -> Node | None:
    """The bytes whose upper halves are the first half of `node`'s rows, and whose lower halves the second.

    ::

        empty = aten.empty([2 g, c])
        copy  = aten.copy(aten.slice(empty, 0, 0, g), (bytes & 240) >> 4);  a = aten.slice_scatter(empty, copy, 0, 0, g)
        copy  = aten.copy(aten.slice(a, 0, g, …), bytes & 15);  node = aten.slice_scatter(a, copy, 0, g, …)
    """
    low = _written(node)
    high = _written(low[0]) if low else None
    if low is None or high is None or not is_call(high[0], aten.empty.memory_format):
        return None
    half = shape(node)[0] // 2
    if (high[2], low[2]) != (0, half) or high[3] != half or low[3] < 2 * half or shape(node)[0] % 2:
        return None
    rest, shifted = low[1], high[1]
    if not is_call(rest, aten.bitwise_and.Scalar) or args(rest)[1] != 15:
        return None
    if not is_call(shifted, aten.__rshift__.Scalar, aten.bitwise_right_shift.Tensor_Scalar) or args(shifted)[1] != 4:
        return None
    source = args(shifted)[0]
    if is_call(source, aten.bitwise_and.Scalar) and args(source)[1] == 240:
        source = args(source)[0]
    codes = _parameter(source)
    same = codes is not None and codes is _parameter(args(rest)[0])
    same = same and 2 * _numbers(codes) == _numbers(node)
    return codes if same and _dtype(codes) == torch.uint8 else None


def _written(node: Any) -> tuple[Node, Node, int, int] | None:
    """(target, source, first, end) where `node` is `target` with rows written over by `source`."""
    if not is_call(node, aten.slice_scatter.default):
        return None
    target, copied, *where = args(node)
    if where[3:] not in ([], [1]):
        return None
    axis, first, end = (*where, 0, None, None)[:3] if len(where) < 3 else where[:3]
    if axis != 0 or not is_call(copied, aten.copy.default):
        return None
    return target, args(copied)[1], first or 0, 2**63 - 1 if end is None else end

