"""The GAWS paper's question, asked of compilers: what share of LoRA's cost over the base is left with GAWS?

    python -m benchmarks.gaws_gap --layers 2 --markdown FILE --plot FILE

Base, LoRA, GAWS and GAWS-D on every linear, at equal numbers of parameters, on the shapes of the paper's four models
with random weights, take turns in one process; decode and prefill (encoders: whole sequences), in eager mode, under
Inductor and under gaws. The share is (GAWS - base) / (LoRA - base): published as about 0.40 for the authors' setting, a
GPU and no compiler. Where LoRA costs less than a few percent the share is noise over noise, and is not printed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import common, runtime
from benchmarks.common import BACKENDS, Setup
from gawscompile.calibration import measure

MODELS = ("t5-3b", "gpt2-large", "llama-3.2-3b", "roberta-large")
KINDS = ("gaws", "gawsd")
LEAST = 0.02
"""Of the base's time: a smaller LoRA tax is no ground for a share."""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gaws_gap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=list(MODELS), help="default: the paper's four")
    parser.add_argument("--layers", type=int, help="cut shapes to their first N layers; the table says so")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=("float32", "bfloat16"))
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA, whose size the others take (default 16)")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path, help="needs matplotlib: pip install 'gawscompile[bench]'")
    return parser.parse_args(argv)


Gap = tuple[str, str, str, str, dict[str, float]]
"""Model, dtype, case, backend, and each adapter's ms."""


def gaps(rows: list[runtime.Row]) -> list[Gap]:
    """The rows of `benchmarks.runtime`, one for each model, case and backend."""
    found: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for row in rows:
        key = (common.title(row), row["dtype"], row["case"], row["backend"])
        found.setdefault(key, {})[row["adapter"]] = row["ms"]["median"]
    return [(*key, times) for key, times in found.items()]


def share(times: dict[str, float], kind: str) -> float | None:
    """What is left of LoRA's cost over the base with `kind`; None where LoRA costs next to nothing."""
    cost = times["lora"] - times["base"]
    return (times[kind] - times["base"]) / cost if cost > LEAST * times["base"] else None


def gap_table(found: list[Gap], markdown: bool) -> str:
    """Base in ms, each adapter over it, and the shares."""
    headers = ["", "dtype", "case", "backend", "base ms", "LoRA", "GAWS", "GAWS-D", "share GAWS", "share GAWS-D"]
    body = []
    for model, dtype, case, backend, times in found:
        shares = ["–" if (s := share(times, kind)) is None else f"{s:.2f}" for kind in KINDS]
        over = [f"{times[kind] / times['base']:.2f}" for kind in ("lora", *KINDS)]
        body.append([model, dtype, case, backend, f"{times['base']:.1f}", *over, *shares])
    return measure.table(headers, body, markdown)


def plot(found: list[Gap], file: Path) -> None:
    """Bars: each adapter's time over the same backend's base. Says so and draws nothing without matplotlib."""
    cases = list(dict.fromkeys((model, dtype, case) for model, dtype, case, _, _ in found))
    if (figure := common.figure(9, 0.7 + 0.62 * len(cases))) is None:
        return
    panels = figure.subplots(1, len(dict.fromkeys(backend for *_, backend, _ in found)), sharey=True, squeeze=False)[0]
    for axes, backend in zip(panels, dict.fromkeys(backend for *_, backend, _ in found), strict=True):
        for offset, kind in enumerate(("lora", *KINDS)):
            times = {(m, d, c): t for m, d, c, b, t in found if b == backend}
            values = [times[case][kind] / times[case]["base"] for case in cases]
            axes.barh([i + 0.27 * (offset - 1) for i in range(len(cases))], values, 0.25, label=kind)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=backend, xlabel="time over the same backend's base", xlim=(0.8, None))
    labels = [f"{model}\n{case}" + (f", {dtype}" if dtype != "float32" else "") for model, dtype, case in cases]
    panels[0].set_yticks(range(len(cases)), labels, fontsize=7)
    panels[0].invert_yaxis()
    panels[0].legend(fontsize=7)
    common.save(figure, file)


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    argv = sys.argv[1:] if argv is None else argv
    options = arguments(argv)
    facts = measure.machine()
    found: list[Gap] = []
    for model in options.model:
        for dtype in options.dtype:
            setup = Setup(model, dtype, options.rank, layers=options.layers)
            adapters = ("lora", *KINDS)
            found += gaps(runtime.measure_setup(setup, options.backends, options.rounds, options.steps, adapters))

    def report(markdown: bool) -> str:
        return measure.describe(facts) + "\n\n" + gap_table(found, markdown)

    common.publish("What is left of LoRA's cost", "gaws_gap", argv, options.markdown, report)
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
