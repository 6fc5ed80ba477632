"""Every projection of a model by both CPU plans, with weights that come from memory: what the cost model is fitted to.

    python -m benchmarks.projections --dtype float32 bfloat16 --tokens 1 2 4 16 128 512
    python -m benchmarks.projections --dtype bfloat16 --tokens 1 --weights plain int8 nf4 nf4-blocks hqq4
    python -m benchmarks.projections --model llama-3.2-1b --layers 16 --plans gemv_cpp --tokens 1 --weights int4 nf4

Each layer has weights of its own, on huge pages, so no call finds them in a cache, as in a model. Columns: ms
for all projections of a forward pass, called one after the other from C++, without and with a LoRA of rank 16 in fp32,
and for reading the weights of the bare ones and no more; medians over `--rounds` in turns. A pass comes right after one
of its own: a cache that holds a whole model's weights keeps them. `--weights`: as they are kept, see docs/quantised.md.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import common, limits
from gawscompile.analysis import packed
from gawscompile.calibration import measure
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import DTYPES, OPERAND_DTYPES
from gawscompile.planning.targets import CPP
from gawscompile.runtime import ops, pages

GROUPS: dict[str, tuple[int, dict[int, list[tuple[int, ...]]]]] = {
    "smollm2": (30, {576: [(576, 192, 192), (576,), (1536, 1536)], 1536: [(576,)]}),
    "smollm2-factors": (30, {576: [(16, 16, 16), (16,), (16, 16)], 1536: [(16,)]}),
    "minilm": (6, {384: [(384, 384, 384), (384,), (1536,)], 1536: [(384,)]}),
    "bert-base": (4, {768: [(768, 768, 768), (768,), (3072,)], 3072: [(768,)]}),
    "llama-3.2-1b": (4, {2048: [(2048, 512, 512), (2048,), (8192, 8192)], 8192: [(2048,)]}),
}
"""Layers, and of each: features in → the features out of each group that reads them. Factors: u = A x, as training has
them."""
PLANS = tuple(CPP.kinds)
LORA = ("", " lora(r=16 f32 s=2.0)")
NAMES = {"float32": "f32", "bfloat16": "bf16"}


WEIGHTS = {
    "plain": "w={x}",
    "columns": "wt={x}",
    "int8": "packed(int8 g={k} s=f32)",
    "nf4": "packed(nf4 g=64 s=u8)",
    "nf4-blocks": "packed(table4_blocks g=64 s=bf16)",
    "hqq8": "packed(uint8 g=64 s=bf16 z=bf16)",
    "hqq4": "packed(uint4_halves g=64 s=bf16 z=bf16)",
    "int4": f"packed(int4_tiles{packed.TILES.get(torch.backends.cpu.get_cpu_capability(), 32)} g=64 s=bf16)",
}


def drawn(sizes: list[int], dtype: str) -> torch.Tensor:
    """Random numbers, or bytes."""
    if OPERAND_DTYPES[dtype].is_floating_point:
        return torch.randn(sizes).to(OPERAND_DTYPES[dtype])
    return torch.randint(0, 256, sizes).to(torch.uint8).view(OPERAND_DTYPES[dtype])


def operands(spec: KernelSpec, m: int) -> list[torch.Tensor]:
    """Random tensors for `spec`, in its order."""
    return [drawn([m if s == "m" else int(s) for s in o.shape], o.dtype) for o in spec.operands()]


def run(options: argparse.Namespace, dtype: str, weights: str, m: int) -> list[str]:
    """A row of the table: dtype, weights, tokens, for each plan base and LoRA in ms, and reading alone."""
    name = NAMES[dtype]
    variants: dict[tuple[str, str], Callable[[], None]] = {}
    for plan in options.plans:
        for lora in LORA:
            calls = []
            layers, features = GROUPS[options.model]
            layers = options.layers or layers
            for k, groups in features.items():
                for widths in groups:
                    kept = WEIGHTS[weights].format(x=name, k=k)
                    parts = [f"n={n} {kept} out={name}{lora}" for n in widths]
                    spec = KernelSpec.parse("; ".join([f"k={k} x={name}", *parts]))
                    if not CPP.kinds[plan].plans(spec):
                        continue
                    x = torch.randn(m, k).to(DTYPES[name])
                    calls += [(x, operands(spec, m), f"{plan} | {spec}") for _ in range(layers)]
            if not calls:  # panels are of plain weights
                continue
            tensors = [tensor for _, given, _ in calls for tensor in given]
            pages.enlarge(tensors)
            variants[plan, lora] = common.without_python(calls)
            if (plan, lora) == (options.plans[0], ""):
                reads = limits.reading(tensors)
    variants["reading", "alone"] = reads
    steps = {" ".join(key): functools.partial(measure.timed, call) for key, call in variants.items()}
    samples, _ = measure.interleave(steps, options.rounds, 1)
    columns = [" ".join((plan, lora)) for plan in options.plans for lora in LORA] + ["reading alone"]
    return [dtype, weights, str(m), *(f"{statistics.median(samples[c]):.2f}" if c in samples else "" for c in columns)]


def main() -> None:
    """The table, on stdout and into ``--markdown``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", choices=list(GROUPS), help="its shapes (default smollm2)")
    parser.add_argument("--dtype", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--weights", nargs="+", default=["plain"], choices=list(WEIGHTS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 16, 128, 512])
    parser.add_argument("--layers", type=int, help="how many, where it is not the model's own number")
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    ops.ensure_loaded()
    plans = (f"{plan}, {kind}" for plan in options.plans for kind in ("base", "LoRA"))
    headers = ["dtype", "weights", "tokens", *plans, "reading alone"]
    cells = [(dtype, kept, m) for dtype in options.dtype for kept in options.weights for m in options.tokens]
    rows = [run(options, *cell) for cell in cells]
    print(measure.describe(measure.machine()) + "\n\n" + measure.table(headers, rows))
    command = " ".join(["python -m benchmarks.projections", *sys.argv[1:]])
    text = f"# Projections\n\n`{command}`\n\n{measure.describe(measure.machine())}\n\n"
    common.write(options.markdown, text + measure.table(headers, rows, markdown=True))


if __name__ == "__main__":
    main()
