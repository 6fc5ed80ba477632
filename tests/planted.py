"""Faults to plant: one-line edits of the compiler that make it wrong, and a model on which each of them shows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Fault:
    """In `file`, `old` (which occurs once) becomes `new`; `tests` are the ones that should notice."""

    file: str
    old: str
    new: str
    tests: str
    library: bool = False  # shows only where the library's matmul is planned


PASSES = "tests/passes"
FAULTS = {
    "scale dropped": Fault(
        "passes/recover_operators.py", "        return scale.number\n", "        return 1.0\n", PASSES
    ),
    "sign turned": Fault(
        "passes/recover_operators.py", "        return scale.number\n", "        return -scale.number\n", PASSES
    ),
    "siblings swapped": Fault(
        "passes/group_siblings.py",
        "zip(members, items, strict=True)",
        "zip(members, items[:-2] + items[-2:][::-1], strict=True)",
        "tests/passes/test_group_siblings.py",
    ),
    "first adapter's factors for all": Fault(
        "passes/fuse_zflora.py",
        "operands += [term.a, term.b] if fixed",
        "operands += [lowrank[0].a, lowrank[0].b] if fixed",
        "tests/passes/test_fuse_zflora.py tests/passes/test_lower.py tests/test_planted_faults.py::test_the_zoo",
    ),
    "bias lost": Fault(
        "passes/recover_operators.py",
        "    terms += [Bias(bias)] if bias is not None else []\n",
        "",
        PASSES,
    ),
    "activation as residual": Fault(
        "passes/fuse_epilogues.py", "[*operands[:position], residual, *", "[*operands[:position], x, *", PASSES
    ),
    "gate and up swapped": Fault(
        "passes/fuse_epilogues.py", "[*mine[first], *mine[1 - first]]", "[*mine[1 - first], *mine[first]]", PASSES
    ),
    "last adapter lost": Fault(
        "passes/recover_operators.py",
        "in sorted(adapters, key=low_rank",
        "in sorted(adapters[:-1] or adapters, key=low_rank",
        PASSES,
    ),
    "alpha of an add overlooked": Fault(
        "passes/matrices.py",
        "    return float(alpha) if is_call(node, aten.add.Tensor) else -float(alpha)\n",
        "    return 1.0 if is_call(node, aten.add.Tensor) else -1.0\n",
        PASSES,
    ),
    "activations taken to be one": Fault(
        "passes/forms.py",
        "    return source_of(a.activation) is source_of(b.activation) and "
        "(a.turned, a.layout) == (b.turned, b.layout)\n",
        "    return True\n",
        PASSES,
    ),
    "added to a kept base where it is taken away": Fault(
        "passes/kept.py",
        "            form = form if weight == 1.0 else form.scaled(weight, node)\n",
        "",
        "tests/passes/test_kept_bases.py",
    ),
    "ranks of blocks not dealt out": Fault(
        "passes/merge_blocks.py",
        "    if order == sorted(order):\n        return matrix\n",
        "    return matrix\n",
        "tests/passes/test_merge_blocks.py",
    ),
    "bias lost by a linear left over": Fault(
        "passes/lower.py",
        "    x, weight, *bias = args(node)\n",
        "    x, weight = args(node)[:2]\n    bias = []\n",
        PASSES,
    ),
    "tail of a dot product dropped": Fault(
        "codegen/prelude.cpp", "  if constexpr (WHOLE < N) {", "  if constexpr (false) {", "tests/codegen/test_cpp.py"
    ),
    "last row off by one": Fault(
        "codegen/prelude.cpp",
        "for (int64_t r = row; r < N; ++r) f(Int<1>{}, r);",
        "for (int64_t r = row; r < N - 1; ++r) f(Int<1>{}, r);",
        "tests/codegen/test_cpp.py",
    ),
    "scale not in the kernel": Fault(
        "codegen/cpp.py",
        'f"{scale} * sum(acc[r][t]);" if scale',
        'f"sum(acc[r][t]);" if scale',
        "tests/codegen/test_cpp.py",
    ),
    "G's rows in another order": Fault(
        "codegen/modes.cpp",
        "dot<R, T, I>(acc, g + row * I, from + s0 * I, I);",
        "dot<R, T, I>(acc, g + (O - R - row) * I, from + s0 * I, I);",
        "tests/codegen/test_cpp.py",
    ),
    "a Conv1D weight's tail of rows left out": Fault(
        "codegen/prelude.cpp", "      run(Int<1>{});\n", "", "tests/codegen/test_cpp.py"
    ),
    "u read from the first term": Fault(
        "codegen/cpp.py",
        'where = f"u + t0 * LDU + {ranks.offsets[i, j]}"',
        'where = "u + t0 * LDU"',
        "tests/codegen/test_cpp.py",
    ),
    "half of B u missing where the library multiplies": Fault(
        "codegen/cpp_add.py",
        "fmadd(b.hi, ut, acc[t].hi)",
        "acc[t].hi",
        "tests/codegen/test_cpp.py",
        library=True,
    ),
    "rows not scaled": Fault(
        "passes/recover_operators.py",
        "(RowScale(rowscale),) if rowscale is not None else ()",
        "()",
        "tests/passes/test_hoist_weights.py",
    ),
    "half of a stream's sum lost": Fault(
        "passes/split_streams.py",
        "aten.add.Tensor, tuple(pair), one",
        "aten.add.Tensor, (pair[0], pair[0]), one",
        "tests/passes/test_split_streams.py",
    ),
    "operands kept from the first call": Fault(
        "runtime/dispatch.cpp",
        "    in[i] = operands[i].const_data_ptr();\n",
        "    static std::unordered_map<std::string, const void*> kept;\n"
        "    const void*& first = kept[text + program.operands[i].name];\n"
        "    in[i] = first = first ? first : operands[i].const_data_ptr();\n",
        "tests/runtime/test_ops.py",
    ),
}


class Zoo(nn.Module):
    """Everything that the faults touch, in one graph: k 64, adapters of one rank, odd widths, near misses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = {"q": 64, "k": 32, "v": 32, "o": 64, "odd": 13, "twice": 24, "gate": 40, "up": 40}
        self.w = nn.ParameterDict({name: nn.Parameter(torch.randn(n, 64) / 8) for name, n in shapes.items()})
        self.a = nn.ParameterDict({name: nn.Parameter(torch.randn(8, 64) / 8) for name in (*shapes, "again")})
        self.b = nn.ParameterDict({name: nn.Parameter(torch.randn(n, 8) / 3) for name, n in shapes.items()})
        self.b["again"] = nn.Parameter(torch.randn(24, 8) / 3)
        self.bias = nn.Parameter(torch.randn(13))
        self.wide = nn.Linear(64, 24, dtype=torch.float64)
        self.turned = nn.Parameter(torch.randn(63, 40) / 8)  # [in, out]
        self.w1, self.w2 = nn.Parameter(torch.randn(4, 8) / 3), nn.Parameter(torch.randn(12, 8) / 3)
        self.grouped = nn.Parameter(torch.randn(48, 64) / 8)
        self.magnitude, self.widened = nn.Parameter(torch.rand(32) + 0.5), nn.Parameter(torch.randn(24, 32) / 6)
        self.blocks = nn.ParameterList([torch.randn(2, 32, 4) / 5, torch.randn(2, 4, 32) / 2])
        self.register_buffer("quantised", torch.randint(-9, 9, (24, 64), dtype=torch.int8))

    def delta(self, name: str, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a[name]), self.b[name])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (F.linear(x, self.w[name]) + 2.0 * self.delta(name, x) for name in "qkv")
        mixed = q.tanh()
        o = x + (F.linear(mixed, self.w["o"]) + 0.5 * self.delta("o", mixed))
        odd = F.linear(o, self.w["odd"], self.bias) + 3.0 * self.delta("odd", o)
        sine, cosine = o.sin(), o.cos()
        twice = F.linear(sine, self.w["twice"]) + 2.0 * self.delta("twice", sine) + self.delta("again", sine)
        alpha = torch.add(F.linear(cosine, self.w["k"]), self.delta("k", cosine), alpha=3)
        other = F.linear(o.exp(), self.w["v"]) + self.delta("v", (o + 1).tanh())
        gated = o.sigmoid()
        grouped = F.linear(gated, self.grouped) + F.linear(gated, torch.kron(self.w1, self.w2))
        turned = k.tanh().repeat(1, 1, 2)[..., :63] @ self.turned
        bent = o.abs().sqrt()
        gate, up = (F.linear(bent, self.w[name]) + 2.0 * self.delta(name, bent) for name in ("gate", "up"))
        product = F.silu(gate) * up
        apart = o.erf()
        norm = (self.w["k"] + self.b["k"] @ self.a["k"]).norm(dim=1)
        scaled = self.magnitude / norm * (F.linear(apart, self.w["k"]) + self.delta("k", apart))
        stream = torch.cat([o.sigmoid(), k.tanh()], -1) + torch.cat([cosine, v.tanh()], -1)
        h, z = stream.split([64, 32], -1)
        streamed = F.linear(h, self.w["twice"]) + F.linear(z, self.widened)
        flat = o.atan()
        kept = F.linear(flat, self.quantised.to(x.dtype) / 64) - self.delta("twice", flat)
        steep = o.sinh()
        inner = torch.einsum("...ni,nir->...nr", steep.unflatten(-1, (2, 32)), self.blocks[0]).unflatten(-1, (2, 2))
        dealt = torch.einsum("...jr,jro->...jo", inner.transpose(-3, -2).flatten(-2), self.blocks[1]).flatten(-2)
        blocks = F.linear(steep, self.w["q"]) + 2.0 * dealt
        answers = (q, k, v, o, odd, twice, alpha, other, grouped, turned, product, scaled, streamed, kept, blocks)
        return *answers, self.wide(o.double())
