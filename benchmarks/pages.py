"""What huge pages do for decoding: the same model with its weights mapped from the checkpoint, in memory of its own on
pages of 4 KiB, and there on pages of 2 MiB.

    python -m benchmarks.pages --markdown benchmarks/results/pages.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.common import PAST, Setup
from gawscompile.calibration import measure
from gawscompile.demo.decoding import Decoder
from gawscompile.runtime import pages

KINDS = ("mapped from the file", "own, 4 KiB pages", "own, 2 MiB pages")


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pages", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--backends", nargs="+", default=["inductor", "gaws"])
    parser.add_argument("--adapters", nargs="+", default=["base", "lora"], choices=("base", *common.ADAPTERS))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args(argv)
    facts = measure.machine()
    setup = Setup(options.model, "float32")  # the dtype of the file: others are converted, and so never mapped
    steps = {}
    for kind in KINDS:
        base = common.load_base(setup, own=kind != KINDS[0])
        for adapter in options.adapters:
            model = base if adapter == "base" else common.with_adapter(base, setup, adapter)
            for backend in options.backends:
                extra = {"options": {"huge_pages": kind == KINDS[2]}} if backend == "gaws" else {}
                run = measure.compiled(model, backend, dynamic=False, **extra)
                decoder = Decoder(model, run, 2 * PAST, setup.kv)
                with torch.no_grad():
                    decoder.fill(list(range(1, PAST + 1)))
                    decoder.timed_step()
                steps[f"{backend} {adapter}", kind] = decoder.timed_step
        if kind == KINDS[2]:
            print(pages.enlarge(base.parameters()))
    names = {f"{what}, {kind}": (what, kind) for what, kind in steps}
    samples, _ = measure.interleave({name: steps[key] for name, key in names.items()}, options.rounds, options.steps)
    medians = {names[name]: measure.Timing.of(taken) for name, taken in samples.items()}

    def report(markdown: bool) -> str:
        rows = []
        for what in dict.fromkeys(what for what, _ in medians):
            taken = [medians[what, kind] for kind in KINDS]
            cells = [f"{one.median:.1f} ({one.median / taken[0].median:.2f})" for one in taken]
            rows.append([what, *cells])
        heads = [f"{options.model}, float32, decode, ms", *KINDS]
        return measure.describe(facts) + "\n\n" + measure.table(heads, rows, markdown)

    common.publish("Weights on huge pages", "pages", argv, options.markdown, report)


if __name__ == "__main__":
    main()
