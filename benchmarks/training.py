"""A training step: PEFT's LoRA on every linear, eager, under Inductor, and under us.

    python -m benchmarks.training [--model smollm2] [--dtype float32 bfloat16] [--rounds 3] [--markdown FILE]

All variants train the same base, in one process and in turns: forward, loss, backward, fused AdamW. "without adapters"
is the base alone under Inductor with the gradient of every activation: what a step took if adapters cost nothing.
`--memory` adds the peak of resident memory in a step, each backend in a process of its own; `--plot` draws the losses.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import Setup
from benchmarks.memory import forget_peak, resident
from benchmarks.shapes import SHAPES
from gawscompile.calibration import measure

BACKENDS = ("eager", "inductor", "gaws", "without adapters")


class Trainer:
    """One variant, under a backend, with an optimizer of its own: an adapted model in training, or the base with the
    embedded tokens in the adapters' place."""

    def __init__(self, base: Any, setup: Setup, backend: str, batch: int, tokens: int, autocast: bool) -> None:
        adapted = backend != "without adapters"
        self.model = common.with_adapter(base, setup).train() if adapted else base
        settings: dict[str, Any] = {} if backend == "eager" else {"dynamic": False}
        self.run = measure.compiled(self.model, backend if adapted else "inductor", **settings)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, base.config.vocab_size, (batch, tokens), generator=generator)
        self.inputs = {"input_ids": ids} if adapted else {"inputs_embeds": base.get_input_embeddings()(ids)}
        self.inputs["labels"] = ids
        if adapted:
            trained = [p for p in self.model.parameters() if p.requires_grad]
        else:
            trained = [self.inputs["inputs_embeds"].requires_grad_()]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.autocast = autocast
        self.losses: list[float] = []

    def step(self) -> float:
        """Milliseconds."""
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = self.run(**self.inputs, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(float(loss.detach()))
        return (time.perf_counter() - began) * 1e3


def load(setup: Setup) -> Any:
    """The frozen base, its last layers cut where the setup says so."""
    base = common.load_base(setup).requires_grad_(False)
    if setup.layers and setup.model not in SHAPES:
        base.model.layers = base.model.layers[: setup.layers]
        base.config.num_hidden_layers = setup.layers
    return base


def times(setup: Setup, options: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of a step of each variant, seconds of its first, and its losses."""
    base = load(setup)
    trainers, first = {}, {}
    for backend in options.backends:
        trainers[backend] = Trainer(base, setup, backend, options.batch, options.tokens, options.autocast)
        first[backend] = trainers[backend].step() / 1e3
        trainers[backend].step()
    taken: dict[str, list[float]] = {backend: [] for backend in trainers}
    for _ in range(options.rounds):
        for backend, trainer in trainers.items():
            taken[backend].append(trainer.step())
    return {
        "ms": {backend: statistics.median(all_) for backend, all_ in taken.items()},
        "first": first,
        "losses": {backend: trainer.losses for backend, trainer in trainers.items()},
    }


def peak(setup: Setup, options: argparse.Namespace) -> dict[str, int | None]:
    """Peak resident bytes of a step under the one backend, and what was resident before it."""
    base = load(setup)
    trainer = Trainer(base, setup, options.backends[0], options.batch, options.tokens, options.autocast)
    for _ in range(2):
        trainer.step()
    gc.collect()
    forget_peak()
    before = resident("VmRSS")
    for _ in range(2):
        trainer.step()
    return {"before": before, "peak": resident("VmHWM")}


def table(rows: dict[str, Any], backends: list[str], markdown: bool) -> str:
    """Milliseconds of a step, and its share of Inductor's."""
    lines = []
    for name, row in rows.items():
        ms, memory = row["times"]["ms"], row.get("memory", {})
        base = ms.get("inductor")
        for backend in backends:
            share = f"{ms[backend] / base:.2f}" if base else "-"
            peak = memory.get(backend, {}).get("peak")
            part = f"{peak / memory['inductor']['peak']:.2f}" if peak and memory.get("inductor") else "-"
            first, loss = row["times"]["first"][backend], row["times"]["losses"][backend][-1]
            lines.append([f"{name}, {backend}", f"{ms[backend]:.0f}", share, part, f"{first:.0f}", f"{loss:.4f}"])
    heads = ["variant", "ms a step", "of Inductor", "peak of Inductor's", "first step, s", "last loss"]
    return measure.table(heads, lines, markdown)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--autocast", action="store_true", help="bf16 autocast over an fp32 model")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="needs matplotlib: pip install 'gawscompile[bench]'")
    options = parser.parse_args(argv)
    if options.probe:
        setup = Setup(options.model, options.dtype[0], options.rank, layers=options.layers)
        return common.write(options.json, json.dumps(peak(setup, options)))
    facts, rows = measure.machine(), {}
    for dtype in options.dtype:
        setup = Setup(options.model, dtype, options.rank, layers=options.layers)
        cut = f", {options.layers} layers" if options.layers and options.model not in SHAPES else ""
        name = f"{common.title(vars(setup))}{cut}, {dtype}{' autocast to bf16' * options.autocast}"
        rows[name] = {"times": times(setup, options)}
        if options.memory:
            rows[name]["memory"] = {backend: _probe(options, dtype, backend) for backend in options.backends}
    common.write(options.json, json.dumps({"machine": facts, "rows": rows}, indent=1))
    what = f"Batch {options.batch} of {options.tokens} tokens, LoRA r = {options.rank} on every linear.\n\n"
    common.publish(
        "A training step",
        "training",
        argv if argv is not None else sys.argv[1:],
        options.markdown,
        lambda markdown: f"{measure.describe(facts)}\n\n{what}{table(rows, options.backends, markdown)}",
    )
    if options.plot:
        plot(rows, options.plot)


def plot(rows: dict[str, Any], file: Path) -> None:
    """Losses over steps: a panel for each dtype, a line for each backend."""
    if (figure := common.figure(4.4 * len(rows), 3.2)) is None:
        return
    for axes, (name, row) in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows.items(), strict=True):
        for number, (backend, losses) in enumerate(row["times"]["losses"].items()):
            if backend != "without adapters":
                axes.plot(losses, label=backend, linewidth=4 - number, alpha=0.7)
        axes.set(xlabel="step", title=name)
        axes.title.set_fontsize(8)
        axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("loss, the same batch in every step")
    common.save(figure, file)


def _probe(options: argparse.Namespace, dtype: str, backend: str) -> Any:
    flags = ["--probe", "--model", options.model, "--dtype", dtype, "--backends", backend, "--rank", str(options.rank)]
    flags += ["--batch", str(options.batch), "--tokens", str(options.tokens)]
    flags += ["--layers", str(options.layers)] if options.layers else []
    flags += ["--autocast"] if options.autocast else []
    return common.in_fresh_process("benchmarks.training", flags)


if __name__ == "__main__":
    main()
