"""Embedding a thousand sentences of mixed length with MiniLM and a LoRA, by `SentenceTransformer.encode`.

    python -m benchmarks.sentences --dtype float32

Sentences are words drawn at random, 3 to 60 of them; `encode` sorts them by length, and batches and pads them. Columns:
seconds for all, over Inductor's base; graphs compiled in the timed rounds; the norm of the difference to eager, over
its own. Needs sentence-transformers: pip install 'gawscompile[test]'.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import Setup
from gawscompile.calibration import measure
from gawscompile.demo import persona


def sentences(count: int) -> list[str]:
    """Of three to sixty words, the same in every run."""
    drawn = random.Random(0)
    words = persona.TEXT.read_text().split()
    return [" ".join(drawn.choices(words, k=drawn.randint(3, 60))) for _ in range(count)]


def encoder(folder: Path, model: Any, backend: str) -> Any:
    """A SentenceTransformer around `model`, with mean pooling as MiniLM has it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    first = Transformer(str(folder), max_seq_length=128)
    first.model = model = measure.sharing_copy(model)
    if backend != "eager":
        model.forward = torch.compile(model.forward, backend=backend, dynamic=True)
    return SentenceTransformer(modules=[first, Pooling(model.config.hidden_size)], device="cpu")


def main() -> None:
    """The table, on stdout and into ``--markdown``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    texts, setup = sentences(options.count), Setup("minilm", options.dtype)
    folder, base = common.folder_of("minilm"), common.load_base(setup)
    models = {"base": base, "lora": common.with_adapter(base, setup)}
    variants = {(b, kind): encoder(folder, model, b) for b in common.BACKENDS for kind, model in models.items()}

    def encode(one: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = one.encode(texts, convert_to_tensor=True, batch_size=32, show_progress_bar=False)
        return found.float()

    made: dict[tuple[str, str], torch.Tensor] = {}
    for key, one in variants.items():
        made[key] = encode(one)
        print(*key, "ready", file=sys.stderr, flush=True)
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in variants}
    graphs = dict.fromkeys(variants, 0)
    for _ in range(options.rounds):
        for key, one in variants.items():
            before = measure.graphs_compiled()
            samples[key].append(measure.timed(functools.partial(encode, one)) / 1e3)
            graphs[key] += measure.graphs_compiled() - before
    reference = statistics.median(samples["inductor", "base"])
    rows = []
    for key, taken in samples.items():
        eager = made["eager", key[1]]
        error = f"{((made[key] - eager).norm() / eager.norm()).item():.1e}"
        ratio = statistics.median(taken) / reference
        spread = f"{min(taken):.2f}-{max(taken):.2f}"
        median = f"{statistics.median(taken):.2f}"
        rows.append([" ".join(key), median, spread, f"{ratio:.2f}", str(graphs[key]), error])
    headers = ["", "s", "range", "× Inductor base", "graphs", "error"]
    facts = measure.machine()

    def report(markdown: bool) -> str:
        return f"{measure.describe(facts)}\n\n{measure.table(headers, rows, markdown)}"

    common.publish("Sentences", "sentences", sys.argv[1:], options.markdown, report)


if __name__ == "__main__":
    main()
