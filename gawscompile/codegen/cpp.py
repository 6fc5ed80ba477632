"""The C++ emitter: one group, one file, two entry points.

``gemv``        y = c ⊙ (W x + s B (A x)) + bias + residual for any number of tokens, each weight read from memory once.
                All threads compute u = s A x, meet at a barrier, then stream rows of every W of the group; B's
                rows, as PEFT lays them, join the row's vector accumulators before their horizontal sum.
``accumulate``  the same on top of what y holds, for the plan whose base product comes from the vendor library.

Where a projection has no W, both add to its residual alone.

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

from gawscompile.codegen.cpp_add import ADDED, add
from gawscompile.codegen.cpp_modes import Scratch, step_code, work
from gawscompile.codegen.cpp_sums import CHECKSUM, SUMS, begin, by_columns, each_block, finish, streamed, sum_blocks
from gawscompile.codegen.cpp_text import (
    CPP_TYPES,
    EPILOGUE,
    arguments,
    expanded,
    extras,
    from_x,
    has_epilogue,
    parameters,
    region,
    scratch,
    unpack,
)
from gawscompile.ir.spec import KernelSpec, LowRankSpec, Operand, ProjectionSpec, SpecError

PANEL_BYTES = 1 << 18  # of weights that stay in the second cache while tile after tile of tokens meets them

READ = ("bias", "residual", "rowscale", "a", "b", "scale", "c", "z", "mode", "kron_scale")
"""Roles of all operands but weights."""

_PARTS = ("vectors", "prelude", "modes")  # one after the other
PRELUDE = "\n\n".join((Path(__file__).parent / f"{name}.cpp").read_text().strip() for name in _PARTS)


PLANS = {"gemv_cpp": "plan gemv_cpp (any m)", "gemm_accumulate": "the epilogue of plan gemm_accumulate"}
"""What a group's kernels can be asked for, `gemv` and `accumulate`, in words."""


def emit(spec: KernelSpec, plans: Collection[str] = PLANS, summed: Sequence[Operand] = ()) -> str:
    """The C++ source of a group's kernels, as far as `plans` need them. Equal specs give equal text.

    With `summed`, ``gemv`` has one more argument, ``uint64_t* sums``: to each it adds the checksum of that operand.

    Raises `SpecError` for SwiGLU over weights kept as ``[k, n]``.
    """
    if spec.swiglu and any(p.transposed for p in spec.projections):
        raise SpecError(f"no C++ for swiglu over transposed weights: {spec}")
    ranks = Scratch(spec)
    whole, added = (plan in plans for plan in PLANS)
    prelude = [CHECKSUM, PRELUDE, SUMS] if summed else [PRELUDE]
    parts = [_header(spec, plans), "\n\n".join(prelude), "", *_constants(spec, ranks), ""]
    for i, projection in enumerate(spec.projections):
        parts += _expand(spec, i, projection, ranks, summed=summed) if whole else []
        if added and projection.kronecker:
            parts += _expand(spec, i, projection, ranks, base=False)
        elif added and has_epilogue(projection):
            parts += add(spec, i, projection, ranks)
    parts += _multiply(spec) if spec.swiglu else []
    parts += ["}  // namespace"]
    parts += ["", *_gemv(spec, ranks, summed)] if whole else []
    if added and (spec.swiglu or any(has_epilogue(p) for p in spec.projections)):
        parts += ["", *_accumulate(spec, ranks)]
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
    return lines


def _expand(
    spec: KernelSpec, i: int, p: ProjectionSpec, ranks: Scratch, base: bool = True, summed: Sequence[Operand] = ()
) -> list[str]:
    """Rows of one projection for a tile of tokens: base dot (or z, where the weight's columns were added up already),
    the adapters' dots, one horizontal sum, epilogue. Without `base`, y holds the base's product, and is added to."""
    operands = arguments(spec, i, expanded(p) if base else EPILOGUE)
    halved = spec.swiglu and base
    out, y = ("float", "half") if halved else (CPP_TYPES[p.out], f"y{i}")
    u = "const float* u, " if extras(i, p, ranks) else ""
    rows = base and p.dtype and not p.transposed
    x = "const X* x, " if rows or from_x(i, ranks) else ""
    z = "const float* z, int64_t ldz, " if base and p.transposed else ""
    seen = f"Checksum& sum_w{i}, " if rows and streamed(f"w{i}", summed) else ""
    joined = [ending for ending in ranks.endings[i] if ending.mode]
    added = [ending for ending in ranks.endings[i] if not ending.mode]
    dots = p.lowrank or p.given or joined or rows
    lines = [
        f"// {spec.formulas()[i]}" if base else "// the same, its base's product from the library",
        "template <int R, int T>",
        f"inline void {'expand' if base else 'spread'}{i}(int64_t row, int64_t t0, "
        f"{parameters(operands)}{u}{x}{seen}{z}{out}* {y}) {{",
    ]
    if dots:
        lines += ["  F acc[R][T];", "  for (auto& row_acc : acc)", "    for (auto& a : row_acc) a = F(0);"]
    if rows:
        lines.append(f"  stream<R, T, K>(acc, w{i} + row * K, x + t0 * K, K, t0 == 0{streamed(f'w{i}', summed)});")
    for j, term in enumerate(p.lowrank):
        where = f"u + t0 * LDU + {ranks.offsets[i, j]}"
        lines.append(f"  dot<R, T, {term.rank}>(acc, b{i}_{j} + row * {term.rank}, {where}, LDU);")
    for j, given in enumerate(p.given):
        at = f"c{i}_{j} + row * {given.rank}, z{i}_{j} + t0 * {given.rank}, {given.rank}"
        lines.append(f"  dot<R, T, {given.rank}>(acc, {at});")
    for ending in joined:
        assert ending.mode
        pointer, stride = ending.source.pointer, ending.source.stride
        shape = f"{ending.mode.rows}, {ending.mode.columns}"
        lines.append(f"  slice_dot<R, T, {shape}>(acc, {ending.factor}, row, {pointer} + t0 * {stride}, {stride});")
    before = [f"{e.source.pointer} + (t0 + t) * LDU + row" for e in added]
    before += ["z + (t0 + t) * ldz"] if z else []
    before += [f"y{i} + at"] if not base and p.dtype else []
    lines += [
        "  for (int t = 0; t < T; ++t) {",
        "    const int64_t at = t * PANEL + row;" if halved else f"    const int64_t at = (t0 + t) * N{i} + row;",
        "    if constexpr (R == 4) {",
        "      Quad v = sum4(acc[0][t], acc[1][t], acc[2][t], acc[3][t]);" if dots else "      Quad v = {};",
        *[f"      v += load4({term});" for term in before],
        *([f"      v *= load4(rowscale{i} + row);"] if p.rowscale else []),
        *([f"      v += load4(bias{i} + row);"] if p.bias else []),
        *([f"      v += load4(res{i} + at);"] if p.residual else []),
        f"      store4({y} + at, v);",
        "    } else {",
        "      float v = sum(acc[0][t]);" if dots else "      float v = 0;",
        *[f"      v += float(*({term}));" for term in before],
        *([f"      v *= float(rowscale{i}[row]);"] if p.rowscale else []),
        *([f"      v += float(bias{i}[row]);"] if p.bias else []),
        *([f"      v += float(res{i}[at]);"] if p.residual else []),
        f"      {y}[at] = {out}(v);",
        "    }",
        "  }",
        "}",
        "",
    ]
    return lines


def _multiply(spec: KernelSpec) -> list[str]:
    """Columns of the one output for some tokens, from gate and up in lines of `ldh`."""
    out = CPP_TYPES[spec.projections[0].out]
    return [
        "// y = silu(gate) * up",
        "template <class H>",
        "inline void multiply(int64_t tokens, int64_t count, const H* gate, const H* up, int64_t ldh, "
        f"{out}* y) {{",
        "  for (int64_t t = 0; t < tokens; ++t, gate += ldh, up += ldh, y += N0) {",
        "    int64_t c = 0;",
        "    for (; c + 2 * V <= count; c += 2 * V) {",
        "      const Pair a = load_pair(gate + c), b = load_pair(up + c);",
        "      store_pair(y + c, {silu(a.lo) * b.lo, silu(a.hi) * b.hi});",
        "    }",
        "    if (c < count) {",
        "      const int rest = int(count - c);",
        "      const Pair a = load_pair(gate + c, rest), b = load_pair(up + c, rest);",
        "      store_pair(y + c, {silu(a.lo) * b.lo, silu(a.hi) * b.hi}, rest);",
        "    }",
        "  }",
        "}",
        "",
    ]


def _shrink(spec: KernelSpec, ranks: Scratch, summed: Sequence[Operand] = ()) -> list[str]:
    """u = s A x and first mode products, split over all threads by blocks of rows times tiles of tokens; then everyone
    waits; then second mode products, and so on."""
    if not ranks.width:
        return []
    lines = ["    const int64_t tiles = blocks(m, 4 * TOKENS);"]
    for number in range(max(1, len(ranks.phases))):
        steps = ranks.phases[number] if number < len(ranks.phases) else []
        terms = [(i, j, t) for i, p in enumerate(spec.projections) for j, t in enumerate(p.lowrank) if number == 0]
        # costs in multiplications of a block of rows
        parts = [f"blocks({t.rank}, ROWS) * K" if steps else f"blocks({t.rank}, ROWS)" for _, _, t in terms]
        parts += ["{} * {}".format(*work(step)) for step in steps]
        name = "shrink" if number == 0 else f"phase{number}"
        lines.append(f"    Share {name}(({' + '.join(parts)}) * tiles, id, threads);")
        lines += _low_ranks(terms, ranks, "K" if steps else "1", summed)
        for step in steps:
            lines += step_code(step, name)
        lines.append("#pragma omp barrier")
    return lines


def _low_ranks(
    terms: list[tuple[int, int, LowRankSpec]], ranks: Scratch, cost: str, summed: Sequence[Operand]
) -> list[str]:
    lines = []
    for i, j, term in terms:
        scale = f"float(*scale{i}_{j})" if term.scale is None else f"{term.scale!r}f" if term.scale != 1.0 else None
        at, seen = f"u[(t0 + t) * LDU + {ranks.offsets[i, j]} + row + r]", streamed(f"a{i}_{j}", summed)
        lines += [
            f"    shrink.piece(blocks({term.rank}, ROWS) * tiles, {cost}, [&](int64_t piece) {{",
            "      const int64_t lo = piece % tiles * 4 * TOKENS, hi = min(m, lo + 4 * TOKENS);",
            f"      for_rows<{term.rank}>(piece / tiles, [&](auto rows, int64_t row) {{",
            "        for_tokens(lo, hi, [&](auto width, int64_t t0) {",
            "          constexpr int R = decltype(rows)::value, T = decltype(width)::value;",
            "          F acc[R][T];",
            "          for (auto& row_acc : acc)",
            "            for (auto& a : row_acc) a = F(0);",
            f"          stream<R, T, K>(acc, a{i}_{j} + row * K, x + t0 * K, K, t0 == 0{seen});",
            "          for (int t = 0; t < T; ++t)",
            f"            for (int r = 0; r < R; ++r) {at} = "
            + (f"{scale} * sum(acc[r][t]);" if scale else "sum(acc[r][t]);"),
            "        });",
            "      });",
            "    });",
        ]
    return lines


def _gemv(spec: KernelSpec, ranks: Scratch, summed: Sequence[Operand]) -> list[str]:
    costs = [
        _base(spec, p)
        + sum(t.rank * _SIZE[t.dtype] for t in p.lowrank)
        + sum(t.rank * _SIZE[t.dtype] for t in p.given)
        for p in spec.projections
    ]
    for i, endings in ranks.endings.items():
        costs[i] += sum(4 * e.mode.columns for e in endings if e.mode)
    units = ["blocks(N{}, 2 * V) * (V / 2)" if p.transposed else "blocks(N{}, ROWS)" for p in spec.projections]
    total = " + ".join(f"{unit.format(i)} * {cost}" for i, (unit, cost) in enumerate(zip(units, costs, strict=True)))
    total = f"blocks(N0, ROWS) * {sum(costs)}" if spec.swiglu else total
    body = [*begin(summed), *_shrink(spec, ranks, summed)]
    body.append(f"    Share rows({total}, id, threads);  // in bytes of weights and factors")
    ys = ["y"] if spec.swiglu else [f"y{i}" for i in range(len(spec.projections))]
    body += _gated(spec, ranks, sum(costs), summed) if spec.swiglu else []
    for i, (p, cost) in enumerate(zip(spec.projections, costs, strict=True)) if not spec.swiglu else ():
        names = "".join(f"{o.name}, " for o in arguments(spec, i, expanded(p)))
        call = f"expand{i}<decltype(r)::value, decltype(t)::value>"
        panel = max(1, PANEL_BYTES // (4 * _base(spec, p)))
        u = "u, " if extras(i, p, ranks) else ""
        rows = p.dtype and not p.transposed
        seen = f"sum_w{i}, " if rows and streamed(f"w{i}", summed) else ""
        reads = names + u + ("x, " if rows or from_x(i, ranks) else "") + seen
        if p.transposed:
            body += _columns(i, cost, call, reads, summed)
            continue
        body += [
            f"    rows.range(blocks(N{i}, ROWS), {cost}, [&](int64_t first, int64_t last) {{",
            f"      for (int64_t panel = first; panel < last; panel += {panel}) {{",
            f"        const int64_t end = min<int64_t>(last, panel + {panel});",
            "        for_tokens(0, m, [&](auto t, int64_t t0) {",
            *each_block(
                "panel; block < end",
                [f"            for_rows<N{i}>(block, [&](auto r, int64_t row) {{ {call}(row, t0, {reads}y{i}); }});"],
                sum_blocks(i, summed),
            ),
            "        });",
            "      }",
            "    });",
        ]
    taken = "int64_t m, const void* x_, const void* const* in, void* const* out" + ", uint64_t* sums" * bool(summed)
    return [
        f'extern "C" void gemv({taken}) {{',
        "  const X* x = (const X*)x_;",
        *unpack(spec, ("weight", *READ), ys),
        *scratch(ranks),
        *region([*body, *finish(summed)]),
    ]


def _gated(spec: KernelSpec, ranks: Scratch, cost: int, summed: Sequence[Operand]) -> list[str]:
    """A share of the rows of gate and up: a panel of both for a tile of tokens, then their product, a line at a time
    (a vector along four rows would waste most of its lanes on exp)."""
    calls = []
    for i, (p, half) in enumerate(zip(spec.projections, ("gate", "up"), strict=True)):
        names = "".join(f"{o.name}, " for o in arguments(spec, i, expanded(p)))
        u = "u, " if extras(i, p, ranks) else ""
        reads = f"{names}{u}x, " + (f"sum_w{i}, " if streamed(f"w{i}", summed) else "")
        call = f"expand{i}<decltype(r)::value, decltype(t)::value>(row, t0, {reads}{half} - panel * ROWS);"
        calls.append(f"              {call}")
    return [
        f"    rows.range(blocks(N0, ROWS), {cost}, [&](int64_t first, int64_t last) {{",
        "      for (int64_t panel = first; panel < last; panel += PANEL / ROWS) {",
        "        const int64_t end = min<int64_t>(last, panel + PANEL / ROWS), row0 = panel * ROWS;",
        "        for_tokens(0, m, [&](auto t, int64_t t0) {",
        "          float gate[decltype(t)::value * PANEL], up[decltype(t)::value * PANEL];",
        *each_block(
            "panel; block < end",
            ["            for_rows<N0>(block, [&](auto r, int64_t row) {", *calls, "            });"],
            [*sum_blocks(0, summed), *sum_blocks(1, summed)],
        ),
        "          multiply(decltype(t)::value, min(N0, end * ROWS) - row0, gate, up, PANEL, y + t0 * N0 + row0);",
        "        });",
        "      }",
        "    });",
    ]


def _panel(spec: KernelSpec) -> int:
    """Rows of gate, and of up, that are multiplied before their product is taken: whole vectors on every machine."""
    row = 2 * max(_base(spec, p) for p in spec.projections)
    return max(16, PANEL_BYTES // row // 16 * 16)


def _columns(i: int, cost: int, call: str, names: str, summed: Sequence[Operand]) -> list[str]:
    """A share of a ``[k, n]`` weight: blocks of its columns are added up in z, then meet the epilogue."""
    return [
        f"    rows.range(blocks(N{i}, 2 * V), (V / 2) * {cost}, [&](int64_t first, int64_t last) {{",
        f"      const int64_t end = min(N{i}, last * 2 * V), ldz = columns_for(m);",
        "      for (int64_t n = first * 2 * V; n < end; n += ldz) {",
        "        const int64_t count = min(ldz, end - n);",
        f"        const float* z = columns<K>(w{i} + n, N{i}, count, x, m, ldz{by_columns(f'w{i}', summed)});",
        "        for_tokens(0, m, [&](auto t, int64_t t0) {",
        *each_block(
            "n / ROWS; block < blocks(n + count, ROWS)",
            [
                f"            for_rows<N{i}>(block, [&](auto r, int64_t row) {{",
                f"              {call}(row, t0, {names}z + (row - n), ldz, y{i});",
                "            });",
            ],
            sum_blocks(i, summed),
        ),
        "        });",
        "      }",
        "    });",
    ]


def _accumulate(spec: KernelSpec, ranks: Scratch) -> list[str]:
    added = [i for i, p in enumerate(spec.projections) if has_epilogue(p)]
    ys = [f"y{i}" for i in range(len(spec.projections))] + ["y"] * spec.swiglu
    pieces = [(i, _added(spec, i, ranks)) for i in added]
    if spec.swiglu:  # one piece of both, and of their product
        together = [line for _, lines in pieces for line in lines]
        count = "min<int64_t>(2 * V, N0 - b * 2 * V)"
        product = f"      multiply(m, {count}, y0 + b * 2 * V, y1 + b * 2 * V, N0, y + b * 2 * V);"
        pieces = [(0, [*together, product])]
    total = " + ".join(f"blocks(N{i}, 2 * V)" for i, _ in pieces)
    body = [*_shrink(spec, ranks), f"    Share columns({total}, id, threads);"]
    for i, lines in pieces:
        body += [f"    columns.piece(blocks(N{i}, 2 * V), 1, [&](int64_t b) {{", *lines, "    });"]
    reads = ranks.width or any(from_x(i, ranks) for i in added)
    x = ["  const X* x = (const X*)x_;"] if reads else []
    return [
        'extern "C" void accumulate(int64_t m, const void* x_, const void* const* in, void* const* out) {',
        *x,
        *unpack(spec, READ, ys),
        *scratch(ranks),
        *region(body),
    ]


def _added(spec: KernelSpec, i: int, ranks: Scratch) -> list[str]:
    """2V rows of a projection, all tokens, on top of what y holds: the block b."""
    u = "u, " if extras(i, spec.projections[i], ranks) else ""
    if not spec.projections[i].kronecker:
        names = ", ".join([o.name for o in arguments(spec, i, ADDED)])
        return [f"      add{i}(b * 2 * V, m, {names}, {u}y{i});"]
    reads = u + ("x, " if from_x(i, ranks) else "")
    names = "".join(f"{o.name}, " for o in arguments(spec, i, EPILOGUE))
    return [
        "      for_tokens(0, m, [&](auto t, int64_t t0) {",
        f"        const int64_t end = min(blocks(N{i}, ROWS), (b + 1) * 2 * V / ROWS);",
        "        for (int64_t block = b * 2 * V / ROWS; block < end; ++block)",
        f"          for_rows<N{i}>(block, [&](auto r, int64_t row) {{",
        f"            spread{i}<decltype(r)::value, decltype(t)::value>(row, t0, {names}{reads}y{i});",
        "          });",
        "      });",
    ]


def _base(spec: KernelSpec, p: ProjectionSpec) -> int:
    """Bytes of a row of W, or of what stands for its product."""
    return spec.k * _SIZE[p.dtype] if p.dtype else _SIZE[p.residual or p.out]


_SIZE = {"f32": 4, "bf16": 2, "f16": 2}
