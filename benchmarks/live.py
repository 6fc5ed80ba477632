"""Adapter banks: one adapter, switches, and batches whose rows have different adapters.

    python -m benchmarks.live --dtype float32 bfloat16 --markdown benchmarks/results/live.md

Four tables, on SmolLM2; what the first two compare takes turns:

- *one adapter*: a decode step with a LoRA of PEFT's modules, with the same LoRA in a bank, and with a bank of which
  nothing is active, over the base without adapters;
- *batches*: decode and prefill of several rows with as many distinct adapters, each row's own, in a bank, over one
  adapter for all; beside it, for decode, PEFT's ``adapter_names`` in eager mode and under Inductor, and a merged model
  for each adapter under Inductor, called with its rows one after the other;
- *residency*: a token with an adapter drawn among many on disk, in a bank of 64 MB;
- *switches* among resident adapters of rank 4 to 64: ``activate`` alone, what the schedule for it adds to the
  next forward, and a step after each switch over the next of the same adapter, pair by pair.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import gawscompile
from benchmarks import common
from benchmarks.common import PAST, Setup
from gawscompile.calibration import measure
from gawscompile.calibration.measure import Timing
from gawscompile.demo.decoding import Decoder

Step = Callable[[], float]
Sizes = dict[str, tuple[int, int]]
"""Inputs and outputs by path."""
BESIDE = {"eager": "PEFT adapter_names, eager", "inductor": "the same, Inductor", "merged": "merged models, Inductor"}
"""What else serves rows with adapters of their own."""


def decoder(model: Any, backend: str, rows: int = 1) -> Step:
    """A decode step of `rows` behind `PAST` tokens."""
    run = measure.compiled(model, backend, dynamic=False)
    found = Decoder(model, run, 2 * PAST, batch=rows)
    found.fill(common._ids(model, PAST)[0].tolist())
    return found.timed_step


def in_turns(steps: dict[str, Step], rounds: int) -> dict[str, Timing]:
    for name, step in steps.items():
        began = time.perf_counter()
        for _ in range(3):
            step()
        print(f"{name} ready ({time.perf_counter() - began:.1f} s)", file=sys.stderr)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(rounds):
            for name, step in steps.items():
                step()
                samples[name] += [step() for _ in range(3)]
    return {name: Timing.of(found) for name, found in samples.items()}


def adapters(sizes: Sizes, rank: int, count: int, dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
    """State dicts of random LoRAs on linears of `sizes`, as PEFT spells them."""
    generator = torch.Generator().manual_seed(rank)
    found = {}
    for number in range(count):
        state = {}
        for path, (k, n) in sizes.items():
            for name, shape in (("lora_A", (rank, k)), ("lora_B", (n, rank))):
                numbers = torch.randn(shape, generator=generator) * 0.02
                state[f"base_model.model.{path}.{name}.weight"] = numbers.to(dtype)
        found[f"r{rank}_{number}"] = state
    return found


def config(rank: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")


def one_adapter(setup: Setup, rounds: int) -> list[list[str]]:
    """Rows: what runs, ms, quartiles, over the base, over PEFT's parameters."""
    base = common.load_base(setup)
    peft = common.with_adapter(base, setup)
    banked = common.with_adapter(base, setup)
    bank = gawscompile.AdapterBank(banked, memory="256MB")
    empty = measure.sharing_copy(base)
    none = gawscompile.AdapterBank(empty, memory="64MB")
    models = {"base": base, "PEFT": peft, "bank": banked, "bank, none active": empty}
    times = in_turns({name: decoder(model, "gaws") for name, model in models.items()}, rounds)
    assert len(bank) == 1 and not len(none)
    share = next(iter(bank)).bytes / sum(p.numel() * p.element_size() for p in base.parameters())
    print(f"the adapter is {share:.1%} of the model's bytes", file=sys.stderr)
    rows = []
    for name, timing in times.items():
        over = timing.median / times["base"].median
        peft_ = timing.median / times["PEFT"].median if name.startswith("bank") else None
        spread = f"{timing.low:.2f}-{timing.high:.2f}"
        rows.append([name, f"{timing.median:.2f}", spread, f"{over:.2f}", f"{peft_:.2f}" if peft_ else ""])
    rows.append([f"(the adapter's bytes: {share:.1%} of the model's)", "", "", "", ""])
    return rows


def loop_of(eager: Any, names: list[str], size: int) -> Callable[[Any], Callable[[int], Step]]:
    """Decode steps of PEFT's ``adapter_names`` through a model or its compiled form, by how many are distinct."""

    def through(run: Any) -> Callable[[int], Step]:
        loop = Decoder(eager, run, 2 * PAST, batch=size)
        loop.fill(common._ids(eager, PAST)[0].tolist())

        def of(count: int) -> Step:
            chosen = [names[row % count] for row in range(size)]

            def step() -> float:
                loop.seek()
                with torch.no_grad():
                    return measure.timed(lambda: run(**loop.inputs(), adapter_names=chosen))

            return step

        return of

    return through


def prefill(model: Any, compiler: str, rows: int) -> Step:
    """A forward of `rows` prompts of `PAST` tokens."""
    run = measure.compiled(model, compiler, dynamic=False)
    ids = torch.stack([common._ids(model, PAST)[0]] * rows)

    @torch.no_grad()
    def step() -> float:
        return measure.timed(lambda: run(input_ids=ids, use_cache=False))

    return step


def batches(setup: Setup, rounds: int, given: argparse.Namespace) -> list[list[str]]:
    """Rows: phase, batch, distinct adapters, ms, over one adapter, and what else does it, in ms."""
    base, dtype = common.load_base(setup), getattr(torch, setup.dtype)
    states = adapters(common.linear_sizes(base), setup.rank, max(given.distinct), dtype)
    inner = measure.sharing_copy(base)
    bank = gawscompile.AdapterBank(inner, memory="512MB")
    from peft import get_peft_model
    from peft.utils import set_peft_model_state_dict

    first, *rest = states
    plain = measure.sharing_copy(base)
    eager: Any = get_peft_model(plain, config(setup.rank), adapter_name=first, autocast_adapter_dtype=False)
    for name in rest:
        eager.add_adapter(name, config(setup.rank), autocast_adapter_dtype=False)
    for name, state in states.items():
        bank.load(name, state, config=config(setup.rank))
        set_peft_model_state_dict(eager, state, adapter_name=name)
    eager.eval()
    names, rows = list(states), []
    for phase, size in [(phase, size) for phase in given.phases for size in given.batch]:
        counts = [count for count in given.distinct if count <= size]
        run = decoder(inner, "gaws", size) if phase == "decode" else prefill(inner, "gaws", size)

        def many(count: int, run: Step = run, size: int = size) -> Step:
            def step() -> float:
                bank.activate([names[row % count] for row in range(size)] if count else None)
                return run()

            return step

        steps = {f"{count}": many(count) for count in [0, *counts]}
        if phase == "decode" and "eager" in given.beside:
            loop = loop_of(eager, names, size)(eager)
            steps |= {f"eager {count}": loop(count) for count in counts}
        if phase == "decode" and "inductor" in given.beside:
            loop = loop_of(eager, names, size)(measure.compiled(eager, "inductor", dynamic=False))
            steps |= {f"inductor {count}": loop(count) for count in counts}
        if phase == "decode" and "merged" in given.beside:  # a model for each adapter, called with its rows
            single = {part: decoder(base, "inductor", part) for part in {size // count for count in counts}}
            steps |= {f"merged {count}": _times(single[size // count], count) for count in counts}
        times = in_turns(steps, rounds)
        for count in [0, *counts]:
            mine = times[f"{count}"].median
            beside = [times[name].median if (name := f"{kind} {count}") in times else None for kind in BESIDE]
            cells = [f"{ms:.1f} ({ms / mine:.1f}×)" if ms else "" for ms in beside]
            rows.append([phase, f"{size}", f"{count}", f"{mine:.2f}", f"{mine / times['1'].median:.2f}", *cells])
    return rows


def _times(step: Step, count: int) -> Step:
    return lambda: sum(step() for _ in range(count))


def hot_swap(base: Any, linears: Sizes, dtype: torch.dtype) -> float:
    """PEFT's way to another adapter of the same rank without recompiling, in µs: its factors are copied."""
    from peft import get_peft_model
    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    model: Any = get_peft_model(measure.sharing_copy(base), config(16), autocast_adapter_dtype=False)
    found = adapters(linears, 16, 2, dtype).values()
    states = [{key.replace(".weight", ".default.weight"): one for key, one in state.items()} for state in found]
    spent = []
    for number in range(20):
        began = time.perf_counter()
        hotswap_adapter_from_state_dict(model, dict(states[number % 2]), "default", config(16))
        spent.append(1e6 * (time.perf_counter() - began))
    return statistics.median(spent)


def switches(setup: Setup, rounds: int, count: int) -> list[list[str]]:
    """Rows: what, µs or ms."""
    base, dtype = common.load_base(setup), getattr(torch, setup.dtype)
    linears = common.linear_sizes(base)
    swap = hot_swap(base, linears, dtype)
    bank = gawscompile.AdapterBank(base, memory="4GB")
    ranks = (4, 8, 16, 32, 64)
    for rank in ranks:
        for name, state in adapters(linears, rank, count // len(ranks), dtype).items():
            bank.load(name, state, config=config(rank))
    names = [info.name for info in bank]
    step = decoder(base, "gaws")
    bank.activate(names[0])
    step()
    first = []
    # ranks cost differently: a step after a switch is compared with the next, of the same adapter
    found: dict[str, list[float]] = {"switched": [], "steady": [], "ratio": []}
    spent: dict[str, list[float]] = {"activate": [], "schedule": []}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in names:
            bank.activate(name)
            first.append(step())
        for number in range(8 * rounds):
            name = names[number * 7 % len(names)]  # from rank to rank
            spent["activate"].append(_micros(partial(bank.activate, name)))
            switched, again = step(), step()
            for kind, time_ in (("switched", switched), ("steady", again), ("ratio", switched / again)):
                found[kind].append(time_)
            bank.activate(names[(number * 7 + 3) % len(names)])
            spent["schedule"].append(_micros(lambda: bank.snapshot(1)))
    resident = sum(info.bytes for info in bank) / 2**20
    ratio = Timing.of(found["ratio"])
    return [
        [f"activate, {len(names)} adapters of rank 4 to 64 ({resident:.0f} MB)", _median(spent["activate"], "µs")],
        ["a new schedule, in the next forward", _median(spent["schedule"], "µs")],
        ["PEFT's hotswap_adapter, rank 16", f"{swap:.0f} µs"],
        ["decode step after the first switch to an adapter", _median(first, "ms")],
        ["decode step after a later switch", f"{statistics.median(found['switched']):.2f} ms"],
        ["the next, with the same adapter", f"{statistics.median(found['steady']):.2f} ms"],
        ["ratio of two such steps, median (quartiles)", f"{ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f})"],
    ]


AMONG = (1, 8, 16, 32, 64, 250, 1000)
DRAWN = 40


def residency(setup: Setup, count: int) -> list[list[str]]:
    """Rows: among how many of `count` adapters on disk each token's is drawn, tokens a second, the switch in ms, and
    how much memory the process has taken since its first token. The bank has 64 MB."""
    from safetensors.torch import save_file

    base, dtype = common.load_base(setup), getattr(torch, setup.dtype)
    states = list(adapters(common.linear_sizes(base), 4, 8, dtype).values())
    with tempfile.TemporaryDirectory() as disk:
        for number in range(count):
            folder = Path(disk) / f"{number}"
            config(4).save_pretrained(str(folder))
            save_file(states[number % len(states)], folder / "adapter_model.safetensors")
        bank = gawscompile.AdapterBank(base, memory="64MB")
        for number in range(count):
            bank.load(f"{number}", Path(disk) / f"{number}", lazy=True)
        step, rows, generator = decoder(base, "gaws"), [], random.Random(0)
        for _ in range(3):
            step()
        gc.collect()
        before = _resident()
        for among in [among for among in AMONG if among <= count]:
            for number in range(min(among, DRAWN)):  # those that stay are there
                bank.activate(f"{number}")
            spent, began = [], time.perf_counter()
            for _ in range(DRAWN):
                at = time.perf_counter()
                bank.activate(f"{generator.randrange(among)}")
                spent.append(1e3 * (time.perf_counter() - at))
                step()
            rate = DRAWN / (time.perf_counter() - began)
            held = sum(info.bytes for info in bank if info.resident) / 2**20
            cells = [f"{rate:.1f}", f"{statistics.median(spent):.2f}", f"{held:.1f}", f"{_resident() - before:.0f}"]
            rows.append([f"{among}", *cells])
    return rows


def _resident() -> float:
    """MB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def plot(tables: dict[str, list[list[str]]], file: Path) -> None:
    """Tokens a second over the number of adapters that they are drawn among, a line for each of `tables`."""
    figure = common.figure(6, 4)
    if figure is None:
        return
    axes = figure.subplots()
    for name, rows in tables.items():
        axes.plot([int(row[0]) for row in rows], [float(row[1]) for row in rows], marker="o", label=name)
    axes.set(xscale="log", xlabel="adapters on disk that each token's is drawn among", ylabel="tokens a second", ylim=0)
    axes.set_title("A bank of 64 MB, another adapter for every token")
    axes.legend()
    common.save(figure, file)


def _micros(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - began)


def _median(samples: list[float], unit: str) -> str:
    return f"{statistics.median(samples):.1f} {unit}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.live", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, nargs="*", default=[8], help="rows")
    parser.add_argument("--phases", nargs="+", default=["decode"], choices=["decode", "prefill"])
    parser.add_argument("--beside", nargs="*", default=["eager"], choices=list(BESIDE), help="what else to time")
    parser.add_argument("--distinct", type=int, nargs="+", default=[1, 2, 4, 8], help="distinct adapters in a batch")
    parser.add_argument("--resident", type=int, default=100, help="adapters to switch among; 0: no switches")
    parser.add_argument("--disk", type=int, default=1000, help="adapters on disk")
    parser.add_argument("--parts", nargs="+", default=["one", "batches", "switches", "residency"])
    parser.add_argument("--plot", type=Path, help="of residency; needs matplotlib: pip install 'gawscompile[bench]'")
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args(argv)
    facts = measure.machine()
    found: list[tuple[str, list[str], list[list[str]]]] = []
    for dtype in arguments.dtype:
        setup = Setup(arguments.model, dtype, arguments.rank, cast_adapters=True)
        title = f"{common.title({'model': setup.model})}, {dtype}"
        if "one" in arguments.parts:
            head = ["decode, one adapter", "ms", "quartiles", "× base", "× PEFT's parameters"]
            found.append((title, head, one_adapter(setup, arguments.rounds)))
        if "batches" in arguments.parts and arguments.batch:
            others = [f"{kind}, ms" for kind in BESIDE.values()]
            head = ["phase", "rows", "distinct adapters", "ms", "× one adapter", *others]
            found.append((title, head, batches(setup, arguments.rounds, arguments)))
        if "switches" in arguments.parts and arguments.resident:
            found.append((title, ["switching", ""], switches(setup, arguments.rounds, arguments.resident)))
        if "residency" in arguments.parts:
            head = ["drawn among", "tokens a second", "activate, ms", "MB of factors", "MB of the process"]
            found.append((title, head, residency(setup, arguments.disk)))
    if arguments.plot:
        plot({title: rows for title, head, rows in found if head[0] == "drawn among"}, arguments.plot)

    def report(markdown: bool) -> str:
        bold = "**" if markdown else ""
        parts = [f"{bold}{name}{bold}\n\n{measure.table(head, rows, markdown)}" for name, head, rows in found]
        return "\n\n".join([measure.describe(facts), *parts])

    common.publish("Adapter banks", "live", argv if argv is not None else sys.argv[1:], arguments.markdown, report)


if __name__ == "__main__":
    main()
