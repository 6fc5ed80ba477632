"""``model.generate`` as users call it: tokens a second and the time to the first one, with and without a LoRA.

    python -m benchmarks.generate --dtype bfloat16 float32 --markdown benchmarks/results/generate.md \
        --plot benchmarks/results/generate.png

Every variant writes as many tokens after the same prompt, greedily, in turns. *eager* is PEFT and transformers as they
are. *Inductor* is what a user can do with torch alone: the forward of the model inside is compiled, and a static cache
is asked for. *gaws* is ``model = gawscompile.compile(model)`` and no more. *llama.cpp* runs the same weights and the
same LoRA (``--lora``), where llama-cpp-python is installed; its loop is this file's. *OpenVINO* (GenAI, a dynamic
adapter) runs a model of its own format, whose folder ``--openvino`` names (`benchmarks/genai.py`).

transformers' own loop is timed apart, around a forward that computes nothing. Tokens are compared: the last column says
how many are eager's before the first that differs (in bf16 a near tie of two logits falls one way or the other).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import gawscompile
from benchmarks import common, genai, ggml, runtime
from benchmarks.common import LLAMA_CPP, Setup
from benchmarks.genai import OPENVINO
from gawscompile.calibration import measure
from gawscompile.demo.decoding import cache_keyword

Row = dict[str, Any]
BACKENDS = ("eager", "inductor", "gaws", LLAMA_CPP, OPENVINO)
PEERS = {LLAMA_CPP, OPENVINO}
"""Other engines: one row."""


@dataclass
class Run:
    """One call of ``generate``: the tokens of the first row, and the seconds after which each of them was there."""

    tokens: list[int]
    times: list[float]
    rows: int = 1

    @property
    def first(self) -> float:
        """ms until the first token."""
        return 1e3 * self.times[0]

    @property
    def rate(self) -> float:
        """Tokens a second after the first, of all rows."""
        return self.rows * (len(self.times) - 1) / (self.times[-1] - self.times[0])


class Stamps:
    """A streamer of transformers: it is given the prompt, then every token as soon as it is chosen."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._start = time.perf_counter()
        self._prompt = True

    def put(self, tokens: Any) -> None:
        if not self._prompt:
            self.times.append(time.perf_counter() - self._start)
        self._prompt = False

    def end(self) -> None:
        pass


def variant(model: Any, backend: str, ids: torch.Tensor, new: int, folder: Path | None = None) -> Callable[[], Run]:
    """A function that generates `new` tokens. Raises `ImportError` for an engine that is not installed. `folder`: of
    OpenVINO's model."""
    if backend == LLAMA_CPP:
        return _llama_cpp(model, ids, new)
    if backend == OPENVINO:
        assert folder is not None
        peer = genai.Peer(model, folder)
        return lambda: Run(*peer.generate(ids, new))
    run: Any = measure.sharing_copy(model)
    more = {}
    if backend == "inductor":
        inner = run.get_base_model() if hasattr(run, "get_base_model") else run
        inner.forward = torch.compile(inner.forward)
        more = {"cache_implementation": "static"}
    if backend == "gaws":
        run = gawscompile.compile(run)
    return lambda: _generated(run, ids, new, **more)


def _generated(model: Any, ids: torch.Tensor, new: int, **more: Any) -> Run:
    settings: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    stamps = Stamps()
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=stamps, **settings, **more)
    return Run(made[0, ids.shape[1] :].tolist(), stamps.times, len(ids))


def _llama_cpp(model: Any, ids: torch.Tensor, new: int) -> Callable[[], Run]:
    prompt = ids[0].tolist()
    peer = ggml.Peer(model, len(prompt) + new)

    def generate() -> Run:
        start, tokens, times = time.perf_counter(), [], []
        logits = peer.logits(prompt)
        while True:
            tokens.append(int(logits.argmax()))
            times.append(time.perf_counter() - start)
            if len(tokens) == new:
                return Run(tokens, times)
            logits = peer.logits(tokens[-1:], len(prompt) + len(tokens) - 1)

    return generate


def loop(model: Any, ids: torch.Tensor, new: int) -> float:
    """ms a step of transformers' loop, around a forward that computes nothing."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    keyword = cache_keyword(model)
    logits = torch.zeros(len(ids), 1, model.config.vocab_size, dtype=model.dtype)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model

    def nothing(**given: Any) -> Any:
        return CausalLMOutputWithPast(logits=logits, **{keyword: given.get(keyword)})

    inner._compiled_call_impl = nothing
    try:
        return 1e3 * len(ids) / _generated(model, ids, new).rate
    finally:
        inner._compiled_call_impl = None


def measured(
    setup: Setup, backends: list[str], shape: tuple[int, int], new: int, rounds: int, folder: Path | None = None
) -> tuple[list[Row], float]:
    """A row for each variant of one dtype, and what the loop takes. `shape`: rows and tokens of the prompt."""
    base = common.load_base(setup)
    models = {"base": base, "lora": common.with_adapter(base, setup)}
    ids = torch.randint(0, base.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    variants = {}
    for backend in backends:
        for adapter, model in models.items():
            variants[backend, adapter] = run = variant(model, backend, ids, new, folder)
            run()
            run()
            print(f"{setup.dtype}: {backend} {adapter} is ready", file=sys.stderr, flush=True)
    graphs = measure.graphs_compiled()
    runs: dict[tuple[str, str], list[Run]] = {key: [] for key in variants}
    for turn in range(rounds):
        keys = list(variants)
        for key in keys[turn % len(keys) :] + keys[: turn % len(keys)]:
            runs[key].append(variants[key]())
    assert measure.graphs_compiled() == graphs, "something was compiled in the timed rounds"
    rows = []
    for (backend, adapter), found in runs.items():
        eager = runs.get(("eager", adapter))
        pairs = zip(eager[0].tokens, found[0].tokens, strict=True) if eager else ()
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), new) if eager else None
        rates, firsts = [run.rate for run in found], [run.first for run in found]
        rows.append(
            {
                **asdict(setup),
                "backend": backend,
                "adapter": adapter,
                "rate": statistics.median(rates),
                "rates": rates,
                "first": statistics.median(firsts),
                "firsts": firsts,
                "same": same,
            }
        )
    return rows, loop(base, ids, new)


def merged(runs: list[list[Row]]) -> list[Row]:
    """Medians of several processes' medians, with those as spread."""
    rows = []
    for same in zip(*runs, strict=True):
        row = dict(same[0])
        for name, each in (("rate", "rates"), ("first", "firsts")):
            row[each] = [one[name] for one in same]
            row[name] = statistics.median(row[each])
        row["same"] = None if row["same"] is None else min(one["same"] for one in same)
        rows.append(row)
    return rows


def table(rows: list[Row], loops: dict[str, float], new: int, markdown: bool) -> str:
    parts = []
    heads = ["", "tokens/s", "range", "× Inductor, LoRA", "first token, ms", "range", "eager's tokens"]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        mine = [row for row in rows if row["dtype"] == dtype]
        theirs = next((r["rate"] for r in mine if (r["backend"], r["adapter"]) == ("inductor", "lora")), None)
        body = [
            [
                f"{row['backend']} {row['adapter']}",
                f"{row['rate']:.1f}",
                f"{min(row['rates']):.1f}-{max(row['rates']):.1f}",
                f"{row['rate'] / theirs:.2f}" if theirs else "",
                f"{row['first']:.0f}",
                f"{min(row['firsts']):.0f}-{max(row['firsts']):.0f}",
                "" if row["same"] is None else f"{row['same']} of {new}",
            ]
            for row in mine
        ]
        title = f"{common.title(mine[0])}, {dtype}"
        parts.append((f"### {title}\n\n" if markdown else f"{title}\n") + measure.table(heads, body, markdown))
        parts.append(f"transformers' loop alone: {loops[dtype]:.2f} ms a step.")
    return "\n\n".join(parts)


COLOURS = {"eager": "#b0b0b0", "inductor": "#e0a030", "gaws": "#2060c0", LLAMA_CPP: "#60a060", OPENVINO: "#8060a0"}


def plot(rows: list[Row], file: Path) -> None:
    """A panel for each dtype, a bar for each variant. Says so and draws nothing without matplotlib."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    if (figure := common.figure(5 * len(dtypes), 2.8)) is None:
        return
    for axes, dtype in zip(figure.subplots(1, len(dtypes), squeeze=False).flat, dtypes, strict=True):
        mine = sorted((row for row in rows if row["dtype"] == dtype), key=lambda row: -row["rate"])
        names = [f"{row['backend']}, {row['adapter']}" for row in mine]
        bars = axes.barh(names, [row["rate"] for row in mine], color=[COLOURS[row["backend"]] for row in mine])
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
        axes.set(title=f"{common.title(mine[0])}, {dtype}", xlabel="tokens a second of generate")
        axes.tick_params(labelsize=7)
        axes.invert_yaxis()
    common.save(figure, file)


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, a shape, or a directory: a causal model")
    parser.add_argument("--layers", type=int, help="cut a shape to its first N layers")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--backends", help=f"comma-separated (default {','.join(BACKENDS)}, where that is installed)")
    parser.add_argument("--openvino", type=Path, metavar="FOLDER", help="an OpenVINO model of the same weights")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt (default 64)")
    parser.add_argument("--batch", type=int, default=1, help="rows that are written at a time (default 1)")
    parser.add_argument("--new", type=int, default=128, help="tokens to write (default 128)")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each variant (default 4)")
    parser.add_argument("--processes", type=int, default=1, help="repeat in this many fresh processes")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--plot", type=Path, help="needs matplotlib: pip install 'gawscompile[bench]'")
    argv = sys.argv[1:] if argv is None else argv
    given = parser.parse_args(argv)
    if min(given.prompt, given.batch, given.rounds, given.processes) < 1 or given.new < 4:
        parser.error("--prompt, --batch, --rounds and --processes must be at least 1, and --new at least 4")
    installed = {LLAMA_CPP: importlib.util.find_spec("llama_cpp"), OPENVINO: given.openvino}
    there = [name for name in BACKENDS if name not in PEERS or (given.batch == 1 and installed[name])]
    backends = given.backends.split(",") if given.backends else there
    if given.batch > 1 and not PEERS.isdisjoint(backends):
        parser.error("llama.cpp and OpenVINO are run with one row")
    if OPENVINO in backends and given.openvino is None:
        parser.error("OpenVINO needs --openvino FOLDER: see benchmarks/genai.py on how to write it")
    facts = measure.machine()
    found: list[Any] = []
    if given.processes > 1:
        arguments = runtime.child_arguments(argv)
        found = [common.in_fresh_process("benchmarks.generate", arguments) for _ in range(given.processes)]
    else:
        setups = [Setup(given.model, dtype, given.rank, layers=given.layers) for dtype in given.dtype]
        shape = (given.batch, given.prompt)
        each = [measured(setup, backends, shape, given.new, given.rounds, given.openvino) for setup in setups]
        found = [
            {
                "rows": [row for rows, _ in each for row in rows],
                "loops": {setup.dtype: took for setup, (_, took) in zip(setups, each, strict=True)},
            }
        ]
    rows = merged([one["rows"] for one in found]) if len(found) > 1 else found[0]["rows"]
    loops = {dtype: statistics.median(one["loops"][dtype] for one in found) for dtype in found[0]["loops"]}

    def report(markdown: bool) -> str:
        return f"{measure.describe(facts)}\n\n{table(rows, loops, given.new, markdown)}"

    common.publish("generate", "generate", argv, given.markdown, report)
    common.write(given.json, json.dumps({"machine": facts, "rows": rows, "loops": loops}, indent=1))
    if given.plot:
        plot(rows, given.plot)


if __name__ == "__main__":
    main()
