"""Compiling SmolLM2 with LoRA whole, or one decoder layer for all: seconds of the first call, cold, and of later ones.

    python -m benchmarks.regions --markdown benchmarks/results/regions.md

Each row is a process of its own with empty caches. Forwards of 64 tokens without a cache of keys: with one, a layer
reads its own entry, and Dynamo compiles each layer anew under any backend. Our op's library, which a machine builds
once, is built before and told apart. Columns: seconds until the first logits are there; over the same backend's whole
model; graphs; milliseconds of a later call; whether the greedy text of 8 more tokens is eager's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from gawscompile.calibration import measure
from gawscompile.demo import packaged

TOKENS, NEW, TIMED = 64, 8, 9
WAYS = [(backend, way) for backend in ("inductor", "gaws") for way in ("whole", "regions")]


@torch.no_grad()
def first_call(backend: str, way: str) -> dict[str, Any]:
    """Compiles in this process."""
    base = common.load_base(setup := common.Setup("smollm2"))
    model = common.with_adapter(base, setup, share=False)
    prompt = common._ids(model, TOKENS)

    def greedy() -> list[int]:
        ids = prompt
        for _ in range(NEW):
            following = model(ids, use_cache=False, logits_to_keep=1).logits.argmax(-1)
            ids = torch.cat([ids, following], 1)
        return [int(token) for token in ids[0, TOKENS:]]

    want = greedy()
    library = 0.0
    if backend == "gaws":
        from gawscompile.runtime import ops

        began = time.perf_counter()
        ops.ensure_loaded()
        library = time.perf_counter() - began
    settings: dict[str, Any] = {"backend": backend, "dynamic": None}
    if way == "whole":
        model.forward = torch.compile(model.forward, **settings)
    else:
        for layer in model.get_base_model().model.layers:
            layer.compile(**settings)

    def call() -> None:
        model(prompt, use_cache=False, logits_to_keep=1)

    began = time.perf_counter()
    call()
    taken, graphs = time.perf_counter() - began, measure.graphs_compiled()
    call()
    later = statistics.median(measure.timed(call) for _ in range(TIMED))
    return {"seconds": taken, "library": library, "graphs": graphs, "ms": later, "equal": greedy() == want}


def in_empty_caches(backend: str, way: str) -> dict[str, Any]:
    """`first_call` in a fresh process."""
    kept = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="gaws-regions-") as scratch:
        (Path(scratch) / "gaws").mkdir(mode=0o700)
        (Path(scratch) / "gaws" / "models").symlink_to(packaged.cache_dir().resolve())
        os.environ |= {"GAWS_CACHE_DIR": f"{scratch}/gaws", "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor"}
        try:
            found: dict[str, Any] = common.in_fresh_process("benchmarks.regions", ["--cell", backend, way])
        finally:
            os.environ.clear()
            os.environ.update(kept)
    print(backend, way, found, file=sys.stderr, flush=True)
    return found


def main() -> None:
    """The table, on stdout and into ``--markdown``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=1, help="processes for each row")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        return common.write(options.json, json.dumps(first_call(*options.cell)))
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in WAYS}
    for _ in range(options.repeat):
        for key, found in runs.items():
            found.append(in_empty_caches(*key))
    seconds = {key: statistics.median(run["seconds"] for run in found) for key, found in runs.items()}
    rows = []
    for (backend, way), found in runs.items():
        ms = statistics.median(run["ms"] for run in found)
        equal = "yes" if all(run["equal"] for run in found) else "no"
        over = f"{seconds[backend, way] / seconds[backend, 'whole']:.2f}"
        rows.append([backend, way, f"{seconds[backend, way]:.1f}", over, str(found[0]["graphs"]), f"{ms:.0f}", equal])
    headers = ["backend", "", "first call, s", "× whole", "graphs", "later, ms", "eager's text"]
    library = statistics.median(run["library"] for run in runs["gaws", "whole"] + runs["gaws", "regions"])
    facts = measure.machine()

    def report(markdown: bool) -> str:
        once = f"Before, once per machine: our op's library, {library:.0f} s."
        return f"{measure.describe(facts)}\n\n{once}\n\n{measure.table(headers, rows, markdown)}"

    common.publish("Compiling by regions", "regions", sys.argv[1:], options.markdown, report)


if __name__ == "__main__":
    main()
