"""What a widened stream costs: base, LoRA and zFLoRA at equal numbers of parameters.

    python -m benchmarks.zflora --model smollm2 --processes 3 --markdown benchmarks/results/zflora.md
    python -m benchmarks.zflora --model llama-3.2-1b llama-3.2-3b llama-7b --layers 2 --dtype bfloat16

All variants take turns in one process; decode and prefill, in eager mode, under Inductor and under gaws. Ratios are to
the same backend's base, in brackets of what both take without guards. The bytes' share is what the adapter's factors
add to the weights that a call has to read: a decode step that waits for memory cannot cost less.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import common, runtime
from benchmarks.common import BACKENDS, Setup
from gawscompile.calibration import measure

KINDS = ("lora", "zflora")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.zflora", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["smollm2"], help="smollm2, or shapes of decoders")
    parser.add_argument("--layers", type=int, help="cut shapes to their first N layers; the table says so")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA, whose size zFLoRA takes (default 16)")
    parser.add_argument("--cast-adapters", action="store_true", help="factors in the base's dtype (PEFT: fp32)")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--processes", type=int, default=1, help="repeat in this many fresh processes")
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args(argv)


def byte_share(setup: Setup, kind: str) -> float:
    """Bytes of an adapter's factors over those of the base's weights (of an embedding alone a few rows are read)."""
    base = common.load_base(setup)
    head, embedding = base.get_output_embeddings().weight, base.get_input_embeddings().weight
    weights = sum(p.nbytes for p in base.parameters() if p is not embedding) + head.nbytes * (head is embedding)
    return sum(p.nbytes for p in common.with_adapter(base, setup, kind).parameters() if p.requires_grad) / weights


def table(rows: list[runtime.Row], shares: dict[tuple[str, str, str], float], markdown: bool) -> str:
    """A row for each model, dtype, case and backend; `shares` by title, dtype and adapter."""
    found: dict[tuple[str, str, str, str], dict[str, runtime.Row]] = {}
    for row in rows:
        key = (common.title(row), row["dtype"], row["case"], row["backend"])
        found.setdefault(key, {})[row["adapter"]] = row
    body = []
    for (model, dtype, case, backend), kinds in found.items():
        base, over = kinds["base"], []
        for kind in KINDS:
            text = f"{kinds[kind]['ms']['median'] / base['ms']['median']:.3f}"
            bare = kinds[kind]["ms_without_guards"], base["ms_without_guards"]
            over.append(f"{text} ({bare[0]['median'] / bare[1]['median']:.3f})" if all(bare) else text)
        bytes_ = [f"{1 + shares[model, dtype, kind]:.3f}" for kind in KINDS]
        body.append([model, dtype, case, backend, f"{base['ms']['median']:.1f}", *over, *bytes_])
    heads = ["", "dtype", "case", "backend", "base ms", "LoRA", "zFLoRA", "bytes, LoRA", "bytes, zFLoRA"]
    return measure.table(heads, body, markdown)


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    argv = sys.argv[1:] if argv is None else argv
    options = arguments(argv)
    facts = measure.machine()
    flags = ["--model", *options.model, "--dtype", *options.dtype, "--backends", ",".join(options.backends)]
    flags += ["--adapters", *KINDS, "--rank", str(options.rank), "--rounds", str(options.rounds)]
    flags += ["--steps", str(options.steps)] + ["--layers", str(options.layers)] * bool(options.layers)
    flags += ["--cast-adapters"] * options.cast_adapters
    runs = [common.in_fresh_process("benchmarks.runtime", flags)["rows"] for _ in range(options.processes)]
    rows = [runtime.merge(list(same)) for same in zip(*runs, strict=True)]
    shares: dict[tuple[str, str, str], float] = {}
    for model in options.model:
        for dtype in options.dtype:
            setup = Setup(model, dtype, options.rank, options.cast_adapters, layers=options.layers)
            title = next(common.title(row) for row in rows if row["model"] == model)
            shares |= {(title, dtype, kind): byte_share(setup, kind) for kind in KINDS}

    def report(markdown: bool) -> str:
        return measure.describe(facts) + "\n\n" + table(rows, shares, markdown)

    common.publish("What a widened stream costs", "zflora", argv, options.markdown, report)


if __name__ == "__main__":
    main()
