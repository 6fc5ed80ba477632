"""The epilogue of ``accumulate`` in the C++ emitter, for projections without mode products."""

from __future__ import annotations

from gawscompile.codegen.cpp_modes import Scratch
from gawscompile.codegen.cpp_text import CPP_TYPES, arguments, parameters
from gawscompile.ir.spec import KernelSpec, ProjectionSpec

ADDED = ("bias", "residual", "rowscale", "b", "c", "z")
"""Roles of the operands of `add`."""


def add(spec: KernelSpec, i: int, p: ProjectionSpec, ranks: Scratch) -> list[str]:
    """2V columns of one projection, all tokens: y += bias + residual + B u, rows scaled before the bias. B's block is
    transposed once."""
    operands = arguments(spec, i, ADDED)
    out = CPP_TYPES[p.out]
    # rank, factor, and the activation that it multiplies, for each term
    terms = [(t.rank, f"b{i}_{j}", f"u[(t0 + t) * LDU + {ranks.offsets[i, j]} + k]") for j, t in enumerate(p.lowrank)]
    terms += [(g.rank, f"c{i}_{j}", f"float(z{i}_{j}[(t0 + t) * {g.rank} + k])") for j, g in enumerate(p.given)]
    u = "const float* u, " if p.lowrank else ""
    lines = [
        f"inline void add{i}(int64_t n, int64_t m, {parameters(operands)}{u}{out}* y{i}) {{",
        "  constexpr int W = 2 * V;",
        f"  const int count = int(min<int64_t>(W, N{i} - n));",
    ]
    if terms:
        lines.append(f"  float bt[{sum(rank for rank, _, _ in terms)}][W] = {{}};")
        row = 0
        for rank, factor, _ in terms:
            at = f"{factor}[(n + c) * {rank} + k]"
            lines.append("  for (int c = 0; c < count; ++c)")
            lines.append(f"    for (int k = 0; k < {rank}; ++k) bt[{row} + k][c] = float({at});")
            row += rank
    if p.bias:
        lines.append(f"  const Pair bias = load_pair(bias{i} + n, count);")
    if p.rowscale:
        lines.append(f"  const Pair rowscale = load_pair(rowscale{i} + n, count);")
    added = ["acc[t] = {acc[t].lo + bias.lo, acc[t].hi + bias.hi};"] if p.bias else []
    if p.residual and p.dtype:
        at = f"res{i} + (t0 + t) * N{i} + n"
        added.append(f"const Pair r = whole ? load_pair({at}) : load_pair({at}, count);")
        added.append("acc[t] = {acc[t].lo + r.lo, acc[t].hi + r.hi};")
    early, late = ([], added) if p.rowscale else (added, [])
    late = ["acc[t] = {acc[t].lo * rowscale.lo, acc[t].hi * rowscale.hi};", *late] if p.rowscale else []
    lines += [
        "  const auto columns = [&](auto width, int64_t t0, auto whole) {",
        "    constexpr int T = decltype(width)::value;",
        "    Pair acc[T];",
        "    for (int t = 0; t < T; ++t) {",
        f"      const auto* y = {'y' if p.dtype else 'res'}{i} + (t0 + t) * N{i} + n;",
        "      acc[t] = whole ? load_pair(y) : load_pair(y, count);",
        *[f"      {line}" for line in early],
        "    }",
    ]
    row = 0
    for rank, _, activation in terms:
        lines += [
            f"    for (int k = 0; k < {rank}; ++k) {{",
            f"      const Pair b = load_pair(bt[{row} + k]);",
            "      for (int t = 0; t < T; ++t) {",
            f"        const F ut({activation});",
            "        acc[t] = {fmadd(b.lo, ut, acc[t].lo), fmadd(b.hi, ut, acc[t].hi)};",
            "      }",
            "    }",
        ]
        row += rank
    lines += [
        "    for (int t = 0; t < T; ++t) {",
        *[f"      {line}" for line in late],
        f"      {out}* y = y{i} + (t0 + t) * N{i} + n;",
        "      if (whole) store_pair(y, acc[t]); else store_pair(y, acc[t], count);",
        "    }",
        "  };",
        "  if (count == W) {",
        "    for_tokens(0, m, [&](auto width, int64_t t0) { columns(width, t0, std::true_type{}); });",
        "  } else {",
        "    for_tokens(0, m, [&](auto width, int64_t t0) { columns(width, t0, std::false_type{}); });",
        "  }",
        "}",
        "",
    ]
    return lines
