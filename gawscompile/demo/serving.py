"""``python -m gawscompile.demo --serve``: one compiled model answers for several adapters while others come and go.

First one question is answered in one batch by the base, by the demo's adapter at half weight and by the adapter itself.
Then requests for random adapters are served in batches, and another thread loads, scales and drops adapters all the
time. What a token takes is told beside what it takes while nothing else happens.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import torch

import gawscompile
from gawscompile.demo import persona

ROWS = ("__base__", "half", "keeper")
NEW, BATCHES = 24, 8
"""Tokens of each answer, and batches of them with and without the other thread."""


class _Stamps:
    """A streamer of transformers: when each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def gaps(self) -> list[float]:
        """ms between tokens, without the prompt's."""
        return [1e3 * (b - a) for a, b in zip(self.times[1:], self.times[2:], strict=False)]


def serve(base: Any, adapted: Any, tokenizer: Any, question: str, tokens: int, plot: Path | None) -> None:
    """The whole demonstration; `adapted` is `base` with the demo's LoRA, by PEFT."""
    bank = gawscompile.AdapterBank(base, memory="256MB")
    bank.load("keeper", adapted)
    bank.load("half", adapted, scale=0.5)
    model = gawscompile.compile(base)
    ids = torch.tensor([persona.prompt_ids(tokenizer, question)] * len(ROWS))
    settings = {"do_sample": False, "pad_token_id": tokenizer.eos_token_id, "attention_mask": torch.ones_like(ids)}
    print("\nCompiling a prompt and a decode step.", flush=True)
    answers = model.generate(ids, adapter_names=list(ROWS), max_new_tokens=tokens, **settings)
    print(f"\nAsked in one batch: {question}")
    for name, row in zip(ROWS, answers, strict=True):
        text = tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True).strip()
        print(textwrap.fill(f"{name}: {text}", 100, initial_indent="  ", subsequent_indent="    "))

    def batches(count: int) -> list[float]:
        found: list[float] = []
        for _ in range(count):
            stamps = _Stamps()
            names = [numbers.choice(ROWS) for _ in ROWS]
            wanted = {"max_new_tokens": NEW, "min_new_tokens": NEW, "streamer": stamps}
            model.generate(ids, adapter_names=names, **wanted, **settings)
            found += stamps.gaps()
        return found

    numbers, stop, done = random.Random(0), threading.Event(), [0]
    with tempfile.TemporaryDirectory(prefix="gaws-serve-") as folder:
        bank.save("keeper", folder)

        def churn() -> None:
            while not stop.is_set():
                name = f"guest {done[0] % 3}"
                bank.load(name, folder, scale=0.25)
                bank.scale(name, 0.5)
                bank.unload(name)
                done[0] += 1
                time.sleep(0.05)

        with torch._dynamo.config.patch(error_on_recompile=True):
            quiet = batches(BATCHES)
            other = threading.Thread(target=churn)
            other.start()
            try:
                busy = batches(BATCHES)
            finally:
                stop.set()
                other.join()
    print(f"\n{2 * BATCHES} batches of {len(ROWS)} rows, {NEW} tokens, no recompile. A token:")
    for title, gaps in (("while nothing else happened", quiet), (f"while {done[0]} adapters came and went", busy)):
        print(f"  {statistics.median(gaps):6.1f} ms in the median, {_late(gaps):6.1f} ms at the 95th of 100, {title}")
    if plot is not None:
        _draw(quiet, busy, plot)


def _late(gaps: list[float]) -> float:
    return sorted(gaps)[int(0.95 * (len(gaps) - 1))]


def _draw(quiet: list[float], busy: list[float], file: Path) -> None:
    """Latency of every token over time."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install 'gawscompile[bench]'")
        return
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(quiet, ".", label="nothing else happens", color="#4878a8")
    axes.plot(range(len(quiet), len(quiet) + len(busy)), busy, ".", label="adapters come and go", color="#c05030")
    axes.set(xlabel="token", ylabel="ms", ylim=(0, None), title=f"A token of {len(ROWS)} rows")
    axes.legend()
    figure.savefig(file, dpi=110)
