"""Decode and prefill (encoders: whole sequences) with and without adapters, side by side in one process.

    python -m benchmarks.runtime --dtype float32 bfloat16 --model smollm2 minilm --processes 3
    python -m benchmarks.runtime --dtype float32 bfloat16 --model gpt2-large roberta-large t5-3b llama-3.2-1b --layers 4
    python -m benchmarks.runtime --dtype float32 bfloat16 --model smollm2 --quantize int8 --processes 3

Six variants take turns: the base and the same with an unmerged LoRA on every linear (or other adapters of its size),
each in eager mode, under Inductor and under gaws. Columns: medians and quartiles in ms; the same with Dynamo's guards
skipped (what a token costs apart from them; our backend gathers parameters anew then); ratios to
Inductor's base and to the same backend's base (the adapter tax). Within a table numbers compare; between runs on a
shared machine they do not, so ``--processes N`` repeats everything in N fresh processes and shows the medians of their
medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import BACKENDS, Setup
from benchmarks.shapes import SHAPES
from gawscompile.calibration import measure

PHASES = ("decode", "prefill", "encode")
"""The kinds of calls, with one of which the name of each case begins."""

Row = dict[str, Any]
"""One variant in one case: what was measured, as it goes into the JSON file (times in ms)."""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.runtime",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        nargs="+",
        default=["smollm2", "minilm"],
        help=f"these two, a shape with random weights ({', '.join(SHAPES)}), or a local directory",
    )
    parser.add_argument("--layers", type=int, help="cut shapes to their first N layers; the tables say so")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=("float32", "bfloat16"))
    parser.add_argument(
        "--backends",
        default=",".join(BACKENDS),
        help=f"comma-separated (default %(default)s); also gawscompile.compile and {common.LLAMA_CPP}",
    )
    parser.add_argument("--rounds", type=int, default=12, help="turns of each variant (default 12)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps in a turn (default 6)")
    kinds = (*common.ADAPTERS, common.DORA, common.MERGED)
    parser.add_argument("--adapters", nargs="+", default=["lora"], choices=kinds)
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA, whose size the others take (default 16)")
    parser.add_argument("--quantize", nargs="+", default=[None], choices=common.QUANTIZED, help="the base's weights")
    parser.add_argument("--phases", nargs="+", default=PHASES, choices=PHASES, help="the calls (default all)")
    parser.add_argument("--cast-adapters", action="store_true", help="factors in the base's dtype (PEFT: fp32)")
    parser.add_argument("--kv", choices=("static", "dynamic"), default="static", help="the decoder's cache")
    parser.add_argument("--device", default="cpu", help="a torch device (default cpu)")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--processes", type=int, default=1, help="repeat in this many fresh processes")
    parser.add_argument("--memory", action="store_true", help="also measure memory, one process a variant")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    options = parser.parse_args(argv)
    options.backends = [name.strip() for name in options.backends.split(",")]
    if min(options.rounds, options.steps, options.processes) < 1:
        parser.error("--rounds, --steps and --processes must be at least 1")
    return options


def measure_setup(
    setup: Setup,
    backends: list[str],
    rounds: int,
    steps: int,
    adapters: Sequence[str] = ("lora",),
    phases: Sequence[str] = PHASES,
) -> list[Row]:
    """All variants of one model and dtype in this process: a row for each variant and case of `phases`."""
    base = common.load_base(setup)
    models = {"base": base} | {kind: common.with_adapter(base, setup, kind) for kind in adapters}
    cases: dict[str, dict[tuple[str, str], common.Case]] = {}
    compile_seconds: dict[tuple[str, str, str], tuple[float, bool]] = {}
    for backend in backends:
        for kind, model in models.items():
            for case in common.cases(model, backend, setup):
                if not case.name.startswith(tuple(phases)):
                    continue
                hits, began = measure.cache_hits(), time.perf_counter()
                case.step()
                taken = time.perf_counter() - began
                compile_seconds[case.name, backend, kind] = (taken, measure.cache_hits() > hits)
                note = f"{setup.model} {setup.dtype} {case.name}: {backend} {kind} ready ({taken:.1f} s)"
                print(note, file=sys.stderr, flush=True)
                case.step()
                cases.setdefault(case.name, {})[backend, kind] = case
    rows = []
    for name, variants in cases.items():
        graphs = measure.graphs_compiled()
        steppers = {f"{backend} {kind}": case.step for (backend, kind), case in variants.items()}
        guarded = [title for title in steppers if not title.startswith(common.UNCOMPILED)]
        samples, guardless = measure.interleave(steppers, rounds, steps, guarded)
        recompiled = measure.graphs_compiled() - graphs
        for backend, kind in variants:
            title = f"{backend} {kind}"
            seconds, cached = compile_seconds[name, backend, kind]
            rows.append(
                {
                    **asdict(setup),
                    "case": name,
                    "backend": backend,
                    "adapter": kind,
                    "ms": asdict(measure.Timing.of(samples[title])),
                    "ms_without_guards": asdict(measure.Timing.of(guardless[title])) if title in guardless else None,
                    "compile_s": None if backend in common.UNCOMPILED else seconds,
                    "compile_cached": cached,
                    "recompiled_while_timed": recompiled,
                }
            )
    torch.compiler.reset()
    return rows


def setups(options: argparse.Namespace) -> list[Setup]:
    """Every model in every dtype asked for."""
    return [
        Setup(
            model,
            dtype,
            options.rank,
            options.cast_adapters,
            options.kv,
            options.device,
            options.layers,
            quantize,
        )
        for model in options.model
        for dtype in options.dtype
        for quantize in options.quantize
    ]


def run_processes(argv: list[str], count: int) -> list[Row]:
    """The same command in `count` fresh processes; a row's timings become medians of their medians."""
    runs = [common.in_fresh_process("benchmarks.runtime", child_arguments(argv))["rows"] for _ in range(count)]
    return [merge(list(same)) for same in zip(*runs, strict=True)]


def child_arguments(argv: list[str]) -> list[str]:
    """The command line `argv` as one of several processes gets it: without what only the parent does."""
    dropped = ("--processes", "--json", "--markdown", "--plot")
    kept: list[str] = []
    value_follows = False
    for word in argv:
        if not value_follows and word != "--memory" and word.partition("=")[0] not in dropped:
            kept.append(word)
        value_follows = word in dropped
    return kept


def merge(rows: list[Row]) -> Row:
    """One row for the same variant in several processes: medians of medians, with their smallest and largest."""
    merged = dict(rows[0])
    for key in ("ms", "ms_without_guards"):
        if rows[0][key] is not None:
            each = [row[key] for row in rows]
            medians = [timing["median"] for timing in each]
            # The spread between processes decides whether two rows differ, so it takes the quartiles' place.
            merged[key] = {
                "median": statistics.median(medians),
                "low": min(medians),
                "high": max(medians),
                "minimum": min(timing["minimum"] for timing in each),
                "maximum": max(timing["maximum"] for timing in each),
                "count": sum(timing["count"] for timing in each),
            }
    merged["recompiled_while_timed"] = sum(row["recompiled_while_timed"] for row in rows)
    merged["processes"] = len(rows)
    return merged


def runtime_tables(rows: list[Row], markdown: bool) -> str:
    """One table for each model, dtype and case, with the tax of each backend under it."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((common.title(row), row["dtype"], row["case"]), []).append(row)
    parts = []
    for (model, dtype, case), members in groups.items():
        title = f"{model}, {dtype}, {case}"
        parts.append((f"### {title}\n\n" if markdown else f"{title}\n") + _table(members, markdown))
        parts.append("\n".join(_remarks(members)))
    return "\n\n".join(part for part in parts if part)


def _table(members: list[Row], markdown: bool) -> str:
    median = {(row["backend"], row["adapter"]): row["ms"]["median"] for row in members}
    spread = "medians' range" if "processes" in members[0] else "quartiles"
    headers = ["", "ms", "min", spread, "no guards", "guards", "× Inductor base", "× own base", "compile s"]
    body = []
    for row in sorted(members, key=lambda row: row["adapter"]):
        timing, bare = row["ms"], row["ms_without_guards"]
        reference = median.get(("inductor", "base"))
        compile_s = "" if row["compile_s"] is None else f"{row['compile_s']:.1f}" + "*" * row["compile_cached"]
        body.append(
            [
                f"{row['backend']} {row['adapter']}",
                f"{timing['median']:.2f}",
                f"{timing['minimum']:.2f}",
                f"{timing['low']:.2f}-{timing['high']:.2f}",
                f"{bare['median']:.2f}" if bare else "",
                f"{timing['median'] - bare['median']:.2f}" if bare else "",
                f"{timing['median'] / reference:.2f}" if reference else "",
                f"{timing['median'] / median[row['backend'], 'base']:.2f}" if row["adapter"] != "base" else "",
                compile_s,
            ]
        )
    return measure.table(headers, body, markdown)


def _remarks(members: list[Row]) -> list[str]:
    """The adapter's cost over gaws's base in words, and whether anything was compiled during the timing."""
    median = {(row["backend"], row["adapter"]): row["ms"]["median"] for row in members}
    remarks = []
    base = median.get(("gaws", "base"))
    for (backend, kind), ours in median.items():
        if backend == "gaws" and kind != "base" and base:
            what = "" if kind == "lora" else f" of {kind}"
            remarks.append(f"Tax{what} over gaws base: {ours - base:+.2f} ms ({ours / base:.2f}×).")
    recompiled = sum(row["recompiled_while_timed"] for row in members)
    remarks.append(
        "No graph was compiled during the timed rounds."
        if not recompiled
        else "WARNING: graphs were compiled during the timed rounds; do not trust these numbers."
    )
    if any(row["compile_cached"] for row in members):
        remarks.append("* from Inductor's cache on disk.")
    return remarks


def measure_memory(setup: Setup, backends: list[str]) -> list[Row]:
    """A memory row for each variant, each from a process of its own."""
    rows = []
    for backend in backends:
        for kind in ("base", "lora"):
            flags = ["--setup", json.dumps(asdict(setup)), "--backend", backend] + ["--adapted"] * (kind == "lora")
            found = common.in_fresh_process("benchmarks.memory", flags)
            rows.append({**asdict(setup), "backend": backend, "adapter": kind, **found})
    return rows


def memory_table(rows: list[Row], markdown: bool) -> str:
    """MB of tensors held before and after compiling, and peak resident MB."""
    columns = ["tensors_before", "tensors_after", "peak_running", "peak_compiling"]
    columns += ["gpu_peak_running"] * any("gpu_peak_running" in row for row in rows)
    headers = ["MB", "tensors", "after compile", "peak resident", "while compiling", "GPU peak"][: 1 + len(columns)]
    body = [
        [f"{common.title(row)} {row['dtype']}, {row['backend']} {row['adapter']}"]
        + ["" if row.get(column) is None else f"{row[column] / 2**20:.0f}" for column in columns]
        for row in rows
    ]
    return measure.table(headers, body, markdown)


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    argv = sys.argv[1:] if argv is None else argv
    options = arguments(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    facts = measure.machine()
    if options.processes > 1:
        rows = run_processes(argv, options.processes)
    else:
        rows = [
            row
            for setup in setups(options)
            for row in measure_setup(
                setup, options.backends, options.rounds, options.steps, options.adapters, options.phases
            )
        ]
    if not rows:
        raise SystemExit(f"no model here has a call of {', '.join(options.phases)}: leave --phases out")
    probed = setups(options) if options.memory else []
    memory = [row for setup in probed for row in measure_memory(setup, options.backends)]

    def report(markdown: bool) -> str:
        parts = [measure.describe(facts), runtime_tables(rows, markdown)]
        return "\n\n".join(parts + ([memory_table(memory, markdown)] if memory else []))

    common.publish("Runtime", "runtime", argv, options.markdown, report)
    common.write(options.json, json.dumps({"machine": facts, "rows": rows, "memory": memory}, indent=1))


if __name__ == "__main__":
    main()
