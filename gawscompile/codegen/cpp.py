"""The C++ emitter: one group, one file, an entry point for each plan.

``gemv``        y = c ⊙ (W x + s B (A x)) + bias + residual for any number of tokens, each weight read from memory once.
                All threads compute u = s A x, meet at a barrier, then stream rows of every W of the group; B's
                rows, as PEFT lays them, join the row's vector accumulators before their horizontal sum. A bank with
                one plain adapter for all rows, or none, has code of its own there.
``gemm``        the same for many tokens: panels of W are turned once, so that no sum is horizontal (`panels.cpp`), or
                copied where W is kept by columns, and adapters and epilogue join a tile's sums in registers. Where
                tokens are many, s B A joins the panel instead: W + ΔW exists a panel at a time, in a cache.
``accumulate``  the same on top of what y holds, for the plan whose base product comes from the vendor library.

Where a base is opaque, both add to what it has made of x.

Measured by ``python -m benchmarks.projections`` (``benchmarks/results/projections.md``). Four rows by six tokens fill
24 of AVX-512's 32 registers with accumulators. Panels of weights stay in the second cache while tile after tile of
tokens meets them.

Mode products of a Kronecker term run one after the other between barriers, the first together with u = s A x, and the
epilogue adds the last: ΔW exists nowhere. A token's slices are to G what tokens are to a weight, so tiles of them share
each load of its rows; only where there are two or three does G join the row accumulators instead, and spare a barrier.

A weight kept as ``[k, n]`` (Conv1D) is streamed by columns instead: a few of its rows at a time, whole lines of each,
added up in a block of accumulators that stays in the first cache.

Of operands that others are derived from (`hoist_weights`) ``gemv`` takes a checksum as it reads them (`cpp_sums.py`).

Vectors are `vectors.cpp`'s: AVX-512, AVX2, and on other machines ATen's, with ``vdpbf16ps`` where the compiler has it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from gawscompile.codegen import cpp_packed as packed
from gawscompile.codegen.cpp_entry import argument, banks_of, entry, shrunk
from gawscompile.codegen.cpp_modes import Scratch
from gawscompile.codegen.cpp_parts import Parts
from gawscompile.codegen.cpp_sums import CHECKSUM, SUMS, begin, finish
from gawscompile.codegen.cpp_types import CPP_TYPES
from gawscompile.ir.banked import USUAL_RANK
from gawscompile.ir.spec import KernelSpec, Operand
from gawscompile.ir.sums import Sum
from gawscompile.ir.types import SpecError, dtype_of

PANEL_BYTES = 1 << 18  # of weights that stay in the second cache while tile after tile of tokens meets them

_FILES = ("headers", "vectors", "prelude", "modes", "projections")  # one after the other
PRELUDE = "\n\n".join((Path(__file__).parent / f"{name}.cpp").read_text().strip() for name in _FILES)
SWIGLU = "\n\n".join((Path(__file__).parent / f"{name}.cpp").read_text().strip() for name in ("exp", "swiglu"))
BANKS = (Path(__file__).parent / "banks.cpp").read_text().strip()
"""Stands in kernels of groups that have a bank."""


PANELS = "\n\n".join((Path(__file__).parent / f"{name}.cpp").read_text().strip() for name in ("turning", "panels"))
"""Stands in kernels that turn weights."""


PLANS = {
    "gemv_cpp": "plan gemv_cpp (any m)",
    "gemm_cpp": "plan gemm_cpp (many tokens)",
    "gemm_accumulate": "the epilogue of plan gemm_accumulate",
}
"""What a group's kernels can be asked for, `gemv`, `gemm` and `accumulate`, in words."""


def takes_panels(spec: KernelSpec) -> bool:
    """Whether `gemm_cpp` can run a group: plain weights, adapters of low rank, banks."""
    return all(p.dense and not (p.packed or p.kronecker) for p in spec.projections)


def foldable(spec: KernelSpec) -> tuple[int, int]:
    """Multiplications of a group's adapters of low rank: all of ΔW = B A, added to the panels once; and A x and B u of
    one token. `gemm_cpp` compares the two in every call (`folds` in `panels.cpp`), the cost model as it plans."""
    terms = [(p.n, term) for p in spec.projections for term in p.lowrank]
    delta = sum(n * term.rank for n, term in terms) * spec.k
    return delta, sum(term.multiplications(spec.k) for _, term in terms)


def no_swiglu(sums: Sequence[Sum]) -> str | None:
    """Why a kernel forms no product of this gate and its partner, if it does not."""
    if any(p.transposed for p in sums):  # a trial with both was no faster than Inductor's product behind them
        return "a weight is kept as [k, n]"
    apart = {p.packed.coding if p.packed and p.packed.summed_apart else "" for p in sums}
    return "gate's weight and up's are kept in different ways" if len(apart) > 1 else None


def emit(spec: KernelSpec, plans: Collection[str] = PLANS, summed: Sequence[Operand] = ()) -> str:
    """The C++ source of a group's kernels, as far as `plans` need them. Equal specs give equal text.

    With `summed`, ``gemv`` has one more argument, ``uint64_t* sums``: to each it adds the checksum of that operand.

    Raises `SpecError` for SwiGLU that `no_swiglu` refuses.
    """
    if spec.swiglu and (why := no_swiglu(spec.projections)) is not None:
        raise SpecError(f"no C++ for swiglu: {why}: {spec}")
    ranks = Scratch(spec)
    whole, turned, added = (plan in plans for plan in PLANS)
    turned = turned and takes_panels(spec)
    prelude = [CHECKSUM, PRELUDE, SUMS] if summed else [PRELUDE]
    prelude += [SWIGLU] * spec.swiglu
    prelude += [BANKS] * bool(banks_of(spec))
    prelude += packed.prelude(spec)
    prelude += [PANELS] * turned
    parts = [_header(spec, plans), "\n\n".join(prelude), "", *_constants(spec, ranks), "", "}  // namespace"]
    parts += ["", *_gemv(spec, ranks, summed)] if whole else []
    parts += ["", *_gemm(spec, ranks)] if turned else []
    if added and (spec.swiglu or not all(p.plain for p in spec.projections)):
        parts += ["", *_accumulate(spec, ranks)]
    if added and packed.packed_of(spec):
        parts += ["", *_unpack(spec)]
    return "\n".join(parts) + "\n"


def _header(spec: KernelSpec, plans: Collection[str]) -> str:
    words = " and ".join(text for plan, text in PLANS.items() if plan in plans)
    lines = [f"// gawscompile: {words}", f"// spec: {spec}"]
    return "\n".join(lines + [f"// {formula}" for formula in spec.formulas()]) + "\n"


def _constants(spec: KernelSpec, ranks: Scratch) -> list[str]:
    lines = [f"using X = {CPP_TYPES[spec.x]};", f"constexpr int64_t K = {spec.k};"]
    lines += [f"constexpr int64_t N{i} = {p.n};" for i, p in enumerate(spec.projections)]
    if spec.swiglu:
        lines.append(f"constexpr int64_t PANEL = {_panel(spec)};  // rows of gate, and of up, at a time")
    if ranks.width:
        lines.append(f"constexpr int64_t LDU = {ranks.width};  // a token's row of u = s A x, all terms")
    return [*lines, *packed.constants(spec)]


def _gemv(spec: KernelSpec, ranks: Scratch, summed: Sequence[Operand]) -> list[str]:
    costs = [
        _base(spec, p) + sum(t.rank * _SIZE[t.dtype] for t in p.lowrank) + sum(t.rank * _SIZE[t.dtype] for t in p.given)
        + (USUAL_RANK * _SIZE[p.banked.dtype] if p.banked else 0)
        for p in spec.projections
    ]
    for i, endings in ranks.endings.items():
        costs[i] += sum(4 * e.mode.columns for e in endings if e.mode)
    units = ["blocks(N{}, 2 * V) * (V / 2)" if p.transposed else "blocks(N{}, ROWS)" for p in spec.projections]
    total = " + ".join(f"{unit.format(i)} * {cost}" for i, (unit, cost) in enumerate(zip(units, costs, strict=True)))
    total = f"blocks(N0, ROWS) * {sum(costs)}" if spec.swiglu else total
    parts, lone = Parts(spec, ranks, summed), Parts(spec, ranks, summed, lone=True)
    body = [*begin(summed), *packed.activations(spec), *shrunk(spec, ranks, parts)]
    body.append(f"    Share rows({total}, id, threads);  // in bytes of weights and factors")
    for (together, lines), (_, quick) in zip(_rows(spec, parts, costs), _rows(spec, lone, costs), strict=True):
        body += _either([f"bank{i}.lone()" for i in together if spec.projections[i].banked], quick, lines)
    ys = ["y"] if spec.swiglu else [f"y{i}" for i in range(len(spec.projections))]
    name = "gemv({}, uint64_t* sums)" if summed else "gemv({})"
    return entry(name, spec, ranks, True, True, ys, [*body, *finish(summed)])


def _rows(spec: KernelSpec, parts: Parts, costs: Sequence[int]) -> list[tuple[list[int], list[str]]]:
    """A thread's share of the rows, which cost so many bytes each: lines, and the projections that they make."""
    if spec.swiglu and spec.projections[0].summed_apart:
        return [([0, 1], _apart(spec, parts, sum(costs), [0, 1]))]
    if spec.swiglu:
        halves = [*parts.expanded(0), *parts.expanded(1), *parts.hashes(0), *parts.hashes(1)]
        return [([0, 1], [f"    gated<even(N0), PANEL>(rows, {sum(costs)}, N0, m, y, {', '.join(halves)});"])]
    found = []
    for i, (p, cost) in enumerate(zip(spec.projections, costs, strict=True)):
        panel = max(1, PANEL_BYTES // (4 * _base(spec, p)))
        reads = ", ".join([*parts.expanded(i), *parts.hashes(i)])
        line = f"    by_panels<even(N{i})>(rows, {cost}, {panel}, N{i}, m, y{i}, {reads});"
        found.append(([i], _apart(spec, parts, cost, [i]) if p.summed_apart else [line]))
    return found


def _either(conditions: Sequence[str], quick: Sequence[str], lines: Sequence[str]) -> Sequence[str]:
    """`quick` where all conditions hold, of which there may be none, and `lines` elsewhere."""
    if not conditions:
        return lines
    inner = ["  " + line for line in quick], ["  " + line for line in lines]
    return [f"    if ({' && '.join(conditions)}) {{", *inner[0], "    } else {", *inner[1], "    }"]


def _apart(spec: KernelSpec, parts: Parts, cost: int, together: list[int]) -> list[str]:
    """A share of the rows of a projection whose weight is `summed_apart`, or of gate and up `together`, which share a
    range of rows: adapters and epilogues join their sums where these lie, and then their product is taken."""
    lines, weights = [], []
    for at, i in enumerate(together):
        p, to = spec.projections[i], f"z[{at}], ldz" if spec.swiglu else f"y{i}, N{i}"
        reads = ", ".join([*parts.expanded(i, f"plus(z[{at}], ldz)"), *parts.hashes(i)])
        lines.append(f"      expand<even(N{i})>(first, last, N{i}, m, {to}, {reads});")
        weights.append(
            packed.apart(i, p.packed) if p.packed else f"by_columns<K, N{i}>(w{i}, x{parts.seen(f'w{i}')})"
        )
    if spec.swiglu:
        halves = "z[0] + row, z[1] + row, ldz, y + row, N0"
        lines.append("      const int64_t row = first * ROWS;")
        lines.append(f"      multiply(m, min(N0, last * ROWS) - row, {halves});")
    call = f"    rows_apart(rows, {cost}, m, [&](int64_t first, int64_t last, auto z, int64_t ldz) {{"
    return [call, *lines, f"    }}, {', '.join(weights)});"]


def _panel(spec: KernelSpec) -> int:
    """Rows of gate, and of up, that are multiplied before their product is taken: whole vectors on every machine."""
    row = 2 * max(_base(spec, p) for p in spec.projections)
    return max(16, PANEL_BYTES // row // 16 * 16)


def _accumulate(spec: KernelSpec, ranks: Scratch) -> list[str]:
    parts = Parts(spec, ranks)
    added = [i for i, p in enumerate(spec.projections) if not p.plain]
    pieces = [(i, [_added(spec, i, parts)]) for i in added]
    if spec.swiglu:  # one piece of both, and of their product
        at = "b * 2 * V"
        product = f"      multiply(m, min<int64_t>(2 * V, N0 - {at}), y0 + {at}, y1 + {at}, N0, y + {at}, N0);"
        pieces = [(0, [*(line for _, lines in pieces for line in lines), product])]
    total = " + ".join(f"blocks(N{i}, 2 * V)" for i, _ in pieces)
    body = [*shrunk(spec, ranks, parts), f"    Share columns({total}, id, threads);"]
    for i, lines in pieces:
        body += [f"    columns.piece(blocks(N{i}, 2 * V), 1, [&](int64_t b) {{", *lines, "    });"]
    reads = bool(ranks.width or banks_of(spec)) or any(e.source.pointer == "x" for i in added for e in ranks.endings[i])
    ys = [f"y{i}" for i in range(len(spec.projections))] + ["y"] * spec.swiglu
    return entry("accumulate({})", spec, ranks, reads, False, ys, body)


def _gemm(spec: KernelSpec, ranks: Scratch) -> list[str]:
    parts, wide, barrier = Parts(spec, ranks), spec.x != "f32", "#pragma omp barrier"
    shrink = shrunk(spec, ranks, parts)
    if shrink:
        inner = [line if line.startswith("#") else f"  {line}" for line in shrink]
        shrink = ["    if (!folded) {", *inner, "    }"]
    widen = "widen(id, threads, (end - begin) * K, x + begin * K, xs);"
    body = [f"    {widen}"] * wide + shrink
    if wide:  # threads that compute u wait for each other after it; a bank may have none to compute
        body += ["    if (folded) {", barrier, "    }"] if ranks.width else [barrier]
    pieces = [[0, 1]] if spec.swiglu else [[i] for i in range(len(spec.projections))]
    stripes = [f"blocks(N{piece[0]}, STRIPE)" for piece in pieces]
    sizes = [f"    int64_t begin = 0, end = {'chunk' if wide else 'm'};"]
    sizes.append(f"    const int64_t stripes = {' + '.join(stripes)};")
    sizes.append("    int64_t each = tokens_at_once<K>(end, stripes, threads);")
    if shrink:
        banks = banks_of(spec)
        delta, factors = map(str, foldable(spec))
        for bank, end in banks.items():
            delta, factors = f"{delta} + {bank}.rank() * K * N{end}", f"{factors} + {bank}.rank() * (K + N{end})"
        wanted = " && ".join([*(f"{bank}.plain" for bank in banks), f"folds(m, most, {delta}, {factors})"])
        sizes += [
            "    const int64_t most = tokens_folded(end, stripes, threads);",
            f"    const bool folded = {wanted};",
            "    if (folded) each = most;",
        ]
    body = [*sizes, *body]
    body += ["    for (;;) {  // x in fp32, a chunk of tokens at a time"] * wide
    body += [
        "    queue.run(id, threads, stripes * blocks(end - begin, each), [&](int64_t piece) {",
        "      int64_t stripe = piece % stripes;",
        "      const int64_t lo = begin + piece / stripes * each, hi = min(end, lo + each);",
    ]
    for piece, count in zip(pieces, stripes, strict=True):
        i = piece[0]
        body += [f"      if (stripe < {count}) {{", f"        const Stripe<K, N{i}> own(stripe, lo, hi, {len(piece)});"]
        for number, at in enumerate(piece):
            body += _ended(spec, parts, at, number)
        for number, at in enumerate(piece):
            weight = parts.folded(at, f"columns<N{at}>(w{at})" if spec.projections[at].transposed else f"w{at}")
            ends = f"end{at}"
            if number:  # gate and up are there
                body += [
                    "        const auto both = [&](auto& acc, int64_t t) __attribute__((always_inline)) {",
                    "          const int64_t at = t * STRIPE + own.column;",
                    "          end1(acc, t);",
                    "          constexpr int64_t tokens = sizeof(acc) / sizeof(acc[0]);",
                    "          multiply(tokens, own.rows, z0 + at, z1 + at, STRIPE, y + t * N0 + own.column, N0);",
                    "        };",
                ]
                ends = "both"
            body.append(f"        own.multiply({number}, {weight}, {'xs - begin * K' if wide else 'x'}, {ends});")
        body += ["        return;", "      }", f"      stripe -= {count};"]
    body.append("    });")
    body += [
        "    if (end == m) break;",
        barrier,
        "    queue.clear(id);",
        "    begin = end, end = min(m, begin + chunk);",
        f"    {widen}",
        barrier,
        "    }",
    ] * wide
    ys = ["y"] if spec.swiglu else [f"y{i}" for i in range(len(spec.projections))]
    memory = [
        "  static thread_local Buffer kept;  // of the calling thread, unless x is very wide",
        "  Buffer passing;",
        "  const int64_t chunk = tokens_widened<K>(m);",
        "  float* xs = aligned((chunk * K <= LONG ? kept : passing).of(chunk * K + 16));",
    ] * wide
    return entry("gemm({})", spec, ranks, True, True, ys, body, ["  Queue queue;", *memory])


def _ended(spec: KernelSpec, parts: Parts, at: int, number: int) -> list[str]:
    """What follows the product of projection `at`, the stripe's weight `number`: ``end{at}``, called for tiles."""
    to, stride = (f"z{at}", ", STRIPE") if spec.swiglu else (f"y{at}", "")
    early, late, *terms = parts.added(at, "n0", panels=True)
    held = [f", term{j} = {term}" for j, term in enumerate(terms)]
    call = ", ".join(["sums", "n0", "t", to, early, late, *(f"term{j}" for j, _ in enumerate(terms))])
    return [
        *([f"        float* const z{at} = own.sums({number});"] if spec.swiglu else []),
        f"        const auto end{at} = own.ending([&](int64_t n0) {{",
        f"          return [={''.join(held)}](auto& sums, int64_t t) __attribute__((always_inline)) {{",
        f"            close<N{at}{stride}>({call});",
        "          };",
        "        });",
    ]


def _added(spec: KernelSpec, i: int, parts: Parts) -> str:
    """2V rows of a projection, all tokens, on top of what y holds: the block b."""
    p = spec.projections[i]
    if not p.kronecker:
        base = f"{'y' if p.opaque is None else 'base'}{i}"
        return f"      add<N{i}>({', '.join(['b * 2 * V', 'm', f'y{i}', base, *parts.added(i, 'b * 2 * V')])});"
    ends = f"b * 2 * V / ROWS, min(blocks(N{i}, ROWS), (b + 1) * 2 * V / ROWS)"
    reads = parts.expanded(i, f"plus(y{i}, Int<N{i}>{{}})" if p.opaque is None else None, weight=False)
    return f"      expand<even(N{i})>({ends}, N{i}, m, y{i}, N{i}, {', '.join(reads)});"


def _unpack(spec: KernelSpec) -> list[str]:
    """An entry point: the packed weight of one projection as a matrix of x's dtype."""
    lines = ['extern "C" void unpack(int64_t projection, const void* const* in, void* out) {']
    own = packed.packed_of(spec)
    lines += [argument(at, o) for at, o in enumerate(spec.operands()) if o.of_base and o.projection in own]
    lines += packed.weights(spec)
    lines += [f"  if (projection == {i}) unpack(q{i}, (X*)out);" for i in own]
    return [*lines, "}"]


def _base(spec: KernelSpec, p: Sum) -> int:
    """Bytes of a row of W, or of what stands for its product."""
    if p.packed:
        return packed.row_bytes(p.packed)
    return spec.k * _SIZE[p.weight.dtype] if p.dense else _SIZE[dtype_of(p.opaque)]


_SIZE = {"f32": 4, "bf16": 2, "f16": 2}
