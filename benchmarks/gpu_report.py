"""The tables of `benchmarks.gpu`: bars, models, kernels, the cost model's error, and all that was left out."""

from __future__ import annotations

import math
import statistics
from typing import Any

from benchmarks import gpu_cells
from gawscompile.calibration import measure

Row = dict[str, Any]

TAX, OVER_INDUCTOR, OF_COPY, LARGE = 1.03, 1.00, 0.85, 64e6
"""The bars: an adapted token over gaws' base and over Inductor's, and what kernels of groups beyond so many bytes reach
of a copy's bandwidth."""
BAR_MODELS = ("llama-3.2-1b", "llama-3.2-3b")


LEFT = ("failed", "skipped")
REHEARSED = "**A rehearsal on a CPU, by a stand-in: no number here says anything about a GPU.**"


def report(rows: list[Row], facts: dict[str, str], seconds: float, rehearsal: bool = False) -> str:
    """Everything as Markdown."""
    kept = latest(rows)
    parts = [
        REHEARSED * rehearsal,
        measure.describe(facts),
        f"All times with CUDA graphs, bf16, factors in bf16; {seconds:.0f} s in all. Times of models are of one replay"
        " among several; operands of kernels come from memory: copies in turn that together exceed the second cache.",
        "## Bars\n\n" + "\n".join(f"- {line}" for line in bars(kept)),
        _facts(kept),
        _models(kept),
        _kernels(kept),
        _left(kept),
    ]
    return "\n\n".join(part for part in parts if part)


def latest(rows: list[Row]) -> list[Row]:
    """The last row about each thing."""
    return list({_about(row): row for row in rows}.values())


def _about(row: Row) -> tuple[Any, ...]:
    """What a row is about, whatever became of it."""
    names = ("name", "cell", "model", "case", "batch", "backend", "adapter", "rank", "group", "tokens", "what")
    return tuple(row.get(name) for name in names)


def bars(rows: list[Row]) -> list[str]:
    """Each bar: met, missed or not measured, and the figure."""
    lines = []
    for model in BAR_MODELS:
        ms = _medians(rows, model, "decode", 1)
        adapted = ms.get(("gaws", "lora", gpu_cells.RANK))
        for what, over, most in (("gaws", "gaws' base", TAX), ("inductor", "Inductor's base", OVER_INDUCTOR)):
            base = ms.get((what, "base", gpu_cells.RANK))
            ratio = adapted / base if adapted and base else None
            named = f"{model}, decode, batch 1, LoRA r={gpu_cells.RANK} over {over}"
            lines.append(_bar(named, ratio, f"≤ {most:.2f}×", most, True))
    chosen = [row for row in rows if row["kind"] == "kernel" and row.get("chosen") and row["tokens"] == 1]
    for row in (row for row in chosen if row["bytes"] > LARGE and "us" in row):
        named = f"{row['model']}, {row['group']}, {row['adapter']}, {row['what']}: of a copy's bandwidth"
        lines.append(_bar(named, _share(row, rows), f"≥ {OF_COPY:.0%}", OF_COPY, False))
    if not any("us" in row and row["bytes"] > LARGE for row in chosen):
        lines.append(f"decode kernels of groups above {LARGE / 1e6:.0f} MB ≥ {OF_COPY:.0%} of a copy: not measured")
    return lines


def _bar(name: str, value: float | None, text: str, bar: float, below: bool) -> str:
    if value is None:
        return f"{name} {text}: not measured"
    met = value <= bar if below else value >= bar
    return f"{name} {text}: {value:.3f}, {'met' if met else 'MISSED'}"


def _medians(rows: list[Row], model: str, case: str, batch: int) -> dict[tuple[str, str, int], float]:
    """Milliseconds by variant; in turns where a row has that."""
    mine = (row for row in rows if row["kind"] == "model" and "ms" in row)
    wanted = (model, case, batch)
    return {
        (row["backend"], row["adapter"], row["rank"]): row["ms"]["median"]
        for row in mine
        if (row["model"], row["case"], row["batch"]) == wanted
    }


def _share(row: Row, rows: list[Row]) -> float | None:
    """Of a copy's bandwidth, where that was measured."""
    copied = next((r["value"] for r in rows if r["kind"] == "fact" and r["name"] == "copy bandwidth"), None)
    return row["bytes"] / (row["us"]["median"] * 1e-6) / copied if copied else None


def _facts(rows: list[Row]) -> str:
    facts = [[row["name"], f"{row['value']:.4g}", row["unit"]] for row in rows if row["kind"] == "fact"]
    return "## The card\n\n" + measure.table(["", "value", ""], facts, markdown=True) if facts else ""


def _models(rows: list[Row]) -> str:
    parts = []
    mine = [row for row in rows if row["kind"] == "model" and "ms" in row]
    for model, case, batch in dict.fromkeys((row["model"], row["case"], row["batch"]) for row in mine):
        ms = _medians(rows, model, case, batch)
        body = []
        for row in (row for row in mine if (row["model"], row["case"], row["batch"]) == (model, case, batch)):
            timing, bases = row["ms"], [ms.get((backend, "base", gpu_cells.RANK)) for backend in ("inductor", "gaws")]
            rank = f" r={row['rank']}" if row["adapter"] == "lora" else ""
            body.append(
                [
                    f"{row['backend']} {row['adapter']}{rank}{'' if row['in_turns'] else ' (alone)'}",
                    f"{timing['median']:.3f}",
                    f"{timing['low']:.3f}-{timing['high']:.3f}",
                    *(f"{timing['median'] / base:.3f}" if base else "" for base in bases),
                    f"{row['ready_s']:.0f}",
                    row["plans"],
                ]
            )
        heads = ["", "ms", "quartiles", "× Inductor base", "× gaws base", "ready after s", "plans"]
        parts.append(f"### {model}, {case}, batch {batch}\n\n{measure.table(heads, body, markdown=True)}")
    if not parts:
        return ""
    told = "Variants took turns, but for those marked (alone), which were timed as soon as they were ready."
    return "\n\n".join(["## Models", told, *parts])


def _kernels(rows: list[Row]) -> str:
    mine = [row for row in rows if row["kind"] == "kernel" and "us" in row]
    parts = []
    for model, tokens in dict.fromkeys((row["model"], row["tokens"]) for row in mine):
        body = []
        for row in (row for row in mine if (row["model"], row["tokens"]) == (model, tokens)):
            share, predicted = _share(row, rows), row.get("predicted_us")
            body.append(
                [
                    f"{row['group']}, {row['adapter']}",
                    row["what"] + " (chosen)" * bool(row.get("chosen")),
                    f"{row['bytes'] / 1e6:.1f}",
                    f"{row['us']['median']:.1f}",
                    f"{row['us']['low']:.1f}-{row['us']['high']:.1f}",
                    f"{predicted:.1f}" if predicted else "",
                    f"{share:.0%}" if share else "",
                    row["resources"],
                ]
            )
        heads = ["group", "run by", "MB", "µs", "quartiles", "predicted µs", "of a copy", "resources"]
        parts.append(f"### {model}, tokens: {tokens}\n\n{measure.table(heads, sorted(body), markdown=True)}")
    if not parts:
        return ""
    return "\n\n".join(["## Kernels", *parts, *_errors(mine)])


def _errors(rows: list[Row]) -> list[str]:
    """By what factor the cost model is off, by plan."""
    off: dict[str, list[float]] = {}
    for row in rows:
        if row.get("predicted_us"):
            ratio = abs(math.log(row["predicted_us"] / row["us"]["median"]))
            off.setdefault(row["what"].partition("[")[0], []).append(ratio)
    body = [[plan, f"{math.exp(statistics.fmean(found)):.2f}", str(len(found))] for plan, found in off.items()]
    if not body:
        return []
    heads = ["plan", "off by a factor of", "groups"]
    told = "`gawscompile calibrate --device cuda` fits the constants to this card."
    return ["### The cost model against these times", measure.table(heads, body, markdown=True), told]


def _named(row: Row) -> str:
    """What a row is about, in words."""
    names = ("cell", "model", "group", "adapter", "case", "backend", "what", "rank", "batch", "tokens")
    found = ((name, row.get(name)) for name in names)
    return ", ".join(
        f"{name} {value}" if isinstance(value, int) else str(value) for name, value in found if value is not None
    )


def _left(rows: list[Row]) -> str:
    parts = []
    for kind in LEFT:
        mine = [row for row in rows if row["kind"] == kind]
        lines = [f"- {_named(row)}: {' '.join(str(row['why']).split())[:400]}" for row in mine]
        parts.append(f"## {kind.capitalize()}\n\n" + ("\n".join(lines) or "Nothing."))
    return "\n\n".join(parts)
