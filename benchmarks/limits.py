"""How far from what the machine could do: every backend's time as a multiple of its floor.

    python -m benchmarks.limits --processes 5 --markdown benchmarks/results/limits.md --plot …/limits.png

The floor of a call is what its weights, adapters and cached keys take to be read once at the machine's bandwidth, or
what its multiplications take at the machine's best matrix rate, whichever is longer. Both are measured here, before
each of the processes: a threaded sum over half a gigabyte, and the vendor library's matmul of large squares, of which
bf16 takes the better of its own rate and that of fp32. Variants: the bare model, PEFT's LoRA on every linear, and the
same LoRA merged; the models' own times are those of `benchmarks.runtime`, medians over the processes. llama.cpp takes
part where it is installed (`benchmarks.ggml`).
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, runtime
from benchmarks.common import MERGED, PAST, PREFILL, Setup
from gawscompile.calibration import measure
from gawscompile.codegen import build
from gawscompile.runtime import pages

BUFFER = 1 << 29
"""Bytes that are summed: about a small model's, so that a huge last cache counts for both or for neither."""

SQUARE = 2048
BACKENDS = "eager,inductor,gaws"
STREAM = """
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <cstdint>
#include <omp.h>
using F = at::vec::Vectorized<float>;
// STREAMS places in a thread's share are read in turn: some memories like one, some several
template <int STREAMS>
float read(const float* data, int64_t n, int threads) {
  constexpr int LOADS = 8 / STREAMS;
  float total = 0;
  #pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    F sums[8];
    for (auto& sum : sums) sum = F(0);
    const int64_t share = n / omp_get_num_threads(), stream = share / STREAMS;
    const float* mine = data + share * omp_get_thread_num();
    for (int64_t at = 0; at + LOADS * F::size() <= stream; at += LOADS * F::size())
      for (int i = 0; i < 8; ++i)
        sums[i] = sums[i] + F::loadu(mine + i / LOADS * stream + at + i % LOADS * F::size());
    for (int i = 1; i < 8; ++i) sums[0] = sums[0] + sums[i];
    total += at::vec::vec_reduce_all<float>([](F& a, F& b) { return a + b; }, sums[0]);
  }
  return total;
}
extern "C" float read_1(const float* data, int64_t n, int threads) { return read<1>(data, n, threads); }
extern "C" float read_4(const float* data, int64_t n, int threads) { return read<4>(data, n, threads); }
extern "C" float read_8(const float* data, int64_t n, int threads) { return read<8>(data, n, threads); }
"""


@dataclass(frozen=True)
class Machine:
    """Bytes per second that can be read, and floating-point operations per second by dtype name."""

    bandwidth: float
    rates: Mapping[str, float]


def machine(rounds: int = 5) -> Machine:
    """The best of `rounds` each, for torch's present number of threads."""
    data = torch.ones(BUFFER // 4)
    pages.enlarge([data])  # as weights are
    reads = [reading([data], streams) for streams in (1, 4, 8)]
    taken = min(measure.timed(read) for _ in range(rounds) for read in reads) / 1e3
    rates: dict[str, float] = {}
    for dtype in ("float32", "bfloat16"):  # bf16 may be widened: where torch multiplies it in a loop, fp32 is the limit
        a = torch.ones(SQUARE, SQUARE, dtype=getattr(torch, dtype))
        multiply = functools.partial(torch.mm, a, a)
        found = 2 * SQUARE**3 / (min(measure.timed(multiply) for _ in range(rounds)) / 1e3)
        rates[dtype] = max(found, rates.get("float32", 0.0))
    return Machine(BUFFER / taken, rates)


def reading(tensors: Sequence[torch.Tensor], streams: int = 1) -> Callable[[], None]:
    """A call that sums `tensors` (contiguous, read as fp32 but for a few last bytes), each by all threads."""
    read, threads = getattr(build.load(STREAM), f"read_{streams}"), ctypes.c_int(torch.get_num_threads())
    pieces = [(t, ctypes.c_void_p(t.data_ptr()), ctypes.c_int64(t.nbytes // 4)) for t in tensors]

    def run() -> None:
        for _, data, count in pieces:
            read(data, count, threads)

    return run


@dataclass(frozen=True)
class Work:
    """What a call cannot do without: bytes to read, and floating-point operations by dtype name."""

    read: int
    operations: Mapping[str, float]

    def floor(self, limits: Machine) -> float:
        """Milliseconds."""
        multiplying = sum(count / limits.rates[dtype] for dtype, count in self.operations.items())
        return 1e3 * max(self.read / limits.bandwidth, multiplying)


def work(setup: Setup, kind: str) -> dict[str, Work]:
    """Of a causal model's decode step and of its prefill, by the cases' names; `kind` as in `common.with_adapter`."""
    base = common.load_base(setup)
    head = base.get_output_embeddings().weight
    embedding = base.get_input_embeddings().weight
    body = sum(p.numel() for p in base.parameters() if p is not head and p is not embedding)
    weights = (body + head.numel()) * head.element_size()  # of an embedding alone a few rows are read
    factors = []
    if kind not in ("base", MERGED):
        factors = [p for p in common.with_adapter(base, setup, kind).parameters() if p.requires_grad]
    read = weights + sum(p.nbytes for p in factors)
    config = base.config
    width = config.hidden_size // config.num_attention_heads
    keys = 2 * config.num_hidden_layers * config.num_key_value_heads * width * head.element_size()  # of a token
    # scores and sums of values over the tokens before, half of the square on average
    attention = 2 * PREFILL**2 * config.num_hidden_layers * config.num_attention_heads * width
    added = 2 * sum(p.numel() for p in factors)

    def operations(tokens: int, attended: float) -> dict[str, float]:
        mine = {setup.dtype: 2.0 * tokens * body + 2 * head.numel() + attended}
        for p in factors[:1]:
            name = str(p.dtype).removeprefix("torch.")
            mine[name] = mine.get(name, 0.0) + tokens * added
        return mine

    return {
        f"decode, {PAST} past": Work(read + PAST * keys, operations(1, 0)),
        f"prefill {PREFILL}": Work(read, operations(PREFILL, attention)),
    }


Line = dict[str, Any]


def lines(rows: list[runtime.Row], floors: Mapping[tuple[str, str, str], float]) -> list[Line]:
    """The rows with their floors (by dtype, case and adapter) and multiples of them, with and without guards."""
    found = []
    for row in rows:
        floor = floors[row["dtype"], row["case"], row["adapter"]]
        bare = row["ms_without_guards"]
        found.append(
            {
                **{key: row[key] for key in ("dtype", "case", "backend", "adapter")},
                "floor": floor,
                "ms": row["ms"],
                "bare": bare["median"] if bare else None,
                "times": row["ms"]["median"] / floor,
            }
        )
    return found


def table(found: list[Line], markdown: bool) -> str:
    """One for each dtype and case. Ratios in brackets are of what both take without guards."""
    parts = []
    for dtype, case in dict.fromkeys((line["dtype"], line["case"]) for line in found):
        mine = {(x["backend"], x["adapter"]): x for x in found if (x["dtype"], x["case"]) == (dtype, case)}

        def ratio(line: Line, other: Line | None) -> str:
            if other is None:
                return ""
            whole = f"{line['ms']['median'] / other['ms']['median']:.2f}"
            return f"{whole} ({line['bare'] / other['bare']:.2f})" if line["bare"] and other["bare"] else whole

        body = [
            [
                f"{line['backend']} {line['adapter']}",
                f"{line['floor']:.1f}",
                f"{line['ms']['median']:.1f}",
                f"{line['ms']['low']:.1f}-{line['ms']['high']:.1f}",
                "" if line["bare"] is None else f"{line['bare']:.1f}",
                f"{line['times']:.2f}",
                ratio(line, mine.get(("inductor", "base"))),
                ratio(line, mine.get((line["backend"], "base"))),
            ]
            for line in sorted(mine.values(), key=lambda line: line["times"])
        ]
        heads = ["", "floor ms", "ms", "medians' range", "no guards", "× floor", "× Inductor base", "× own base"]
        title = f"{dtype}, {case}"
        parts.append((f"### {title}\n\n" if markdown else f"{title}\n") + measure.table(heads, body, markdown))
    return "\n\n".join(parts)


def plot(found: list[Line], file: Path) -> None:
    """A panel for each dtype and case, a bar for each variant. Says so and draws nothing without matplotlib."""
    colours = {"eager": "#b0b0b0", "inductor": "#e0a030", "gaws": "#2060c0", "gawscompile.compile": "#103070"}
    panels = list(dict.fromkeys((line["dtype"], line["case"]) for line in found))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    tall = max(sum((line["dtype"], line["case"]) == panel for line in found) for panel in panels)
    if (figure := common.figure(5 * columns, rows * (0.9 + 0.24 * tall))) is None:
        return
    for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False):
        mine = sorted((x for x in found if (x["dtype"], x["case"]) == panel), key=lambda line: line["times"])
        names = [f"{line['backend']}, {line['adapter']}" for line in mine]
        fill = [colours.get(line["backend"], "#60a060") for line in mine]
        bars = axes.barh(names, [line["times"] for line in mine], color=fill)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=", ".join(panel), xlabel="multiples of the floor")
        axes.tick_params(labelsize=7)
        axes.invert_yaxis()
    common.save(figure, file)


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, a shape, or a directory: a causal model")
    parser.add_argument("--layers", type=int, help="cut a shape to its first N layers")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--backends", default=BACKENDS, help="comma-separated (default %(default)s and llama.cpp)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write everything measured here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--plot", type=Path, help="needs matplotlib: pip install 'gawscompile[bench]'")
    argv = sys.argv[1:] if argv is None else argv
    given = parser.parse_args(argv)
    facts = measure.machine()
    backends, missing = given.backends, ""
    if backends == BACKENDS and importlib.util.find_spec("llama_cpp"):
        backends += f",{common.LLAMA_CPP}"
    elif backends == BACKENDS:
        missing = " llama.cpp is not installed: pip install 'gawscompile[llama]'."
    flags = ["--model", given.model, "--dtype", *given.dtype, "--backends", backends, "--rank", str(given.rank)]
    flags += ["--adapters", "lora", MERGED, "--rounds", str(given.rounds), "--steps", str(given.steps)]
    flags += ["--layers", str(given.layers)] if given.layers else []
    limits, runs = [], []
    for _ in range(given.processes):
        limits.append(machine())
        runs.append(common.in_fresh_process("benchmarks.runtime", flags)["rows"])
    known = Machine(
        max(one.bandwidth for one in limits),
        {name: max(one.rates[name] for one in limits) for name in limits[0].rates},
    )
    floors: dict[tuple[str, str, str], float] = {}
    for dtype in given.dtype:
        setup = Setup(given.model, dtype, given.rank, layers=given.layers)
        for kind in ("base", "lora", MERGED):
            floors |= {(dtype, case, kind): one.floor(known) for case, one in work(setup, kind).items()}
    rows = [runtime.merge(list(same)) for same in zip(*runs, strict=True)]
    found = lines(rows, floors)
    bandwidths = [one.bandwidth / 1e9 for one in limits]
    told = (
        f"Limits: {known.bandwidth / 1e9:.1f} GB/s read (best; median of {len(limits)} processes"
        f" {statistics.median(bandwidths):.1f}), matmul of {SQUARE}²: "
        + ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in known.rates.items())
        + f".{missing}"
    )

    def report(markdown: bool) -> str:
        return "\n\n".join([measure.describe(facts), told, table(found, markdown)])

    common.publish("Limits of the machine", "limits", argv, given.markdown, report)
    if given.plot:
        plot(found, given.plot)
    common.write(given.json, json.dumps({"machine": facts, "limits": asdict(known), "lines": found}, indent=1))


if __name__ == "__main__":
    main()
