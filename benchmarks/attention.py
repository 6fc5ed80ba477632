"""Attention of many queries on a CPU: `gaws::attend` beside the library's kernel, which Inductor calls.

    python -m benchmarks.attention --dtype float32 bfloat16
    python -m benchmarks.attention --written-out

Random numbers, laid out as transformers lays them out; the library gets its keys and values repeated for each head and
its mask as numbers beforehand, which a model pays for. `--written-out`: with a soft cap or sinks, which no kernel of
the library has, beside Inductor's code of the same products and softmax, as transformers writes them. Columns: µs of a
call of each, in turns, medians over `--rounds`, and their ratio.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import common
from gawscompile.calibration import measure
from gawscompile.codegen import cpp_attention
from gawscompile.ir.types import DTYPE_NAMES
from gawscompile.runtime import attention, ops


class Shape(NamedTuple):
    """One attention. `sees`: all keys, those up to the query's own by a flag, or these by a mask of bools."""

    rows: int
    heads: int
    groups: int
    queries: int
    keys: int
    features: int
    sees: str = "all"


SHAPES = (
    Shape(1, 12, 12, 32, 32, 32),
    Shape(1, 12, 12, 128, 128, 32),
    Shape(32, 12, 12, 64, 64, 32),
    Shape(1, 12, 12, 128, 128, 64),
    Shape(1, 12, 12, 197, 197, 64),
    Shape(1, 9, 3, 128, 128, 64, "causal"),
    Shape(1, 9, 3, 128, 128, 64, "mask"),
    Shape(1, 32, 8, 512, 512, 64, "causal"),
    Shape(1, 8, 8, 1024, 77, 64),
    Shape(1, 8, 8, 1024, 1024, 64),
    Shape(1, 8, 8, 2048, 2048, 40),
    Shape(1, 24, 24, 1100, 1100, 128),
)
"""MiniLM, a batch of it, BERT-base, ViT-base, SmolLM2's and LLaMA-1B's prompts, images' cross- and self-attention."""
WRITTEN_OUT = (
    Shape(1, 8, 4, 1, 1024, 256, "cap"),
    Shape(1, 8, 4, 1, 8192, 256, "cap"),
    Shape(4, 8, 4, 1, 1024, 256, "cap"),
    Shape(1, 8, 4, 128, 128, 256, "cap"),
    Shape(1, 64, 8, 1, 1024, 64, "sinks"),
    Shape(1, 64, 8, 128, 128, 64, "sinks"),
)
"""Gemma-2-2B and gpt-oss-20B: a token, and prompts."""
CAP = 50.0


def written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float, sinks: torch.Tensor | None
) -> torch.Tensor:
    """As transformers writes it: `sinks` of gpt-oss, or the soft cap of Gemma 2."""
    times = q.shape[1] // k.shape[1]
    k, v = (one[:, :, None].expand(-1, -1, times, -1, -1).reshape(len(q), -1, *one.shape[2:]) for one in (k, v))
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    if sinks is None:
        weights = torch.softmax(torch.tanh(scores / CAP) * CAP + mask, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(weights, v)
    extra = sinks.reshape(1, -1, 1, 1).expand(len(q), -1, q.shape[2], -1)
    both = torch.cat([scores + mask, extra], dim=-1)
    weights = torch.softmax(both - both.max(dim=-1, keepdim=True).values, dim=-1, dtype=both.dtype)
    return torch.matmul(weights[..., :-1], v)


def run_written_out(shape: Shape, dtype: torch.dtype, rounds: int) -> list[str]:
    """A row of the table of what is written out: everything may be seen, as a mask of zeros says."""
    rows, heads, groups, queries, keys, features, sees = shape
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(rows, queries, heads, features, generator=generator).to(dtype).transpose(1, 2)
    k, v = torch.randn(2, rows, groups, keys, features, generator=generator).to(dtype)
    sinks = torch.randn(heads, generator=generator).to(dtype) if sees == "sinks" else None
    mask, scale = torch.zeros(1, 1, queries, keys, dtype=dtype), features**-0.5
    kernel = cpp_attention.Kernel(features, DTYPE_NAMES[dtype], cap=CAP if sees == "cap" else None)
    theirs = torch.compile(written_out, dynamic=False)
    with torch.no_grad():
        calls: list[Callable[[], object]] = [
            functools.partial(attention.ATTEND, q, k, v, mask, scale, str(kernel), sinks),
            functools.partial(theirs, q, k, v, mask, scale, sinks),
        ]
        return _row(shape, dtype, rounds, calls)


def run(shape: Shape, dtype: torch.dtype, rounds: int) -> list[str]:
    """A row of the table."""
    rows, heads, groups, queries, keys, features, sees = shape
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(rows, queries, heads, features, generator=generator).to(dtype).transpose(1, 2)
    k, v = torch.randn(2, rows, keys, groups, features, generator=generator).to(dtype).transpose(2, 3)
    kernel = str(cpp_attention.Kernel(features, DTYPE_NAMES[dtype], sees == "causal"))
    mask = torch.ones(rows, 1, queries, keys, dtype=torch.bool).tril() if sees == "mask" else None
    bias = None if mask is None else torch.where(mask, 0.0, float("-inf")).to(dtype)
    wide = [one.repeat_interleave(heads // groups, 1) for one in (k, v)]
    library = functools.partial(
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, q, *wide, 0.0, sees == "causal", attn_mask=bias
    )
    calls: list[Callable[[], object]] = [
        functools.partial(attention.ATTEND, q, k, v, mask, features**-0.5, kernel),
        library,
    ]
    return _row(shape, dtype, rounds, calls)


def _row(shape: Shape, dtype: torch.dtype, rounds: int, calls: list[Callable[[], object]]) -> list[str]:
    """What both calls take, in turns."""
    rows, heads, groups, queries, keys, features, sees = shape
    times = min(1000, max(1, round(5e6 / (rows * heads * queries * keys))))
    samples: list[list[float]] = [[], []]
    for turn in range(rounds + 1):  # the first builds and warms up
        for one, call in enumerate(calls):
            taken = measure.timed(lambda call=call: [call() for _ in range(times)])  # type: ignore[misc]
            if turn:
                samples[one].append(taken / times * 1e3)
    ours, theirs = map(statistics.median, samples)
    sizes = [f"{rows} × {heads}/{groups}", str(queries), str(keys), str(features), sees]
    return [DTYPE_NAMES[dtype], *sizes, f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}"]


def main() -> None:
    """The table, on stdout and into ``--markdown``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=dtypes)
    parser.add_argument("--written-out", action="store_true", help="soft caps and sinks, beside Inductor")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    ops.ensure_loaded()
    headers = ["dtype", "rows × heads/key heads", "queries", "keys", "features", "sees"]
    headers += ["gaws, µs", "Inductor, µs" if options.written_out else "library, µs", "ratio"]
    shapes, row = (WRITTEN_OUT, run_written_out) if options.written_out else (SHAPES, run)
    rows = [row(shape, getattr(torch, dtype), options.rounds) for dtype in options.dtype for shape in shapes]
    machine = measure.describe(measure.machine())
    print(machine + "\n\n" + measure.table(headers, rows))
    command = " ".join(["python -m benchmarks.attention", *sys.argv[1:]])
    title = "Attention that is written out" if options.written_out else "Attention of many queries"
    text = f"# {title}\n\n`{command}`\n\n{machine}\n\n"
    common.write(options.markdown, text + measure.table(headers, rows, markdown=True))


if __name__ == "__main__":
    main()
