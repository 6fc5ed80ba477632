"""What `benchmarks.gpu` measures, cell by cell, in the order of importance. A cell gives rows as it gets them.

A row is plain data: its ``kind`` is ``fact`` (one number of the card), ``model`` (one variant of a model in one case),
``kernel`` (one way to run one group), ``skipped`` or ``failed``, the latter two with ``why``.
"""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import MERGED, Setup
from benchmarks.shapes import SHAPES
from gawscompile.calibration import fit_gpu, gpu_timing, measure
from gawscompile.codegen import triton
from gawscompile.demo.decoding import Decoder
from gawscompile.ir.spec import KernelSpec
from gawscompile.observe.store import RECORDS
from gawscompile.planning import cost, devices, gpu_cost

Row = dict[str, Any]
Variant = tuple[str, str, int]
"""Backend, adapter, rank of the LoRA (or of the one whose size the adapter has)."""

RANK = 16
VARIANTS: tuple[Variant, ...] = (
    ("inductor", "base", RANK),
    ("gaws", "base", RANK),
    ("gaws", "lora", RANK),
    ("inductor", "lora", RANK),
    ("inductor", MERGED, RANK),
    ("gaws", "gaws", RANK),
    ("gaws", "zflora", RANK),
    ("gaws", "lora", 64),
    ("gaws", "lora", 8),
)
ROUNDS = 7
REPLAYS = {"decode": 8, "prefill": 2}
"""Replays between two events; a decoder's cache has room for as many tokens."""


@dataclass
class Budget:
    """When a cell, and everything, must be done (`time.time`)."""

    until: float

    def left(self) -> float:
        return self.until - time.time()


@dataclass(frozen=True)
class Cell(ABC):
    """A piece of the benchmark: at most so many seconds, by its own accord."""

    seconds: float

    @property
    @abstractmethod
    def name(self) -> str:
        """What the tables call it."""

    @abstractmethod
    def run(self, budget: Budget) -> Iterator[Row]:
        """Rows, as they are measured, until `budget` is spent."""


def agenda(variants: tuple[Variant, ...] = VARIANTS, layers: int = 2) -> list[Cell]:
    """Every cell, the most important first. Models that no bar is about are cut to `layers`, without their heads."""
    small, large, gpt2 = "llama-3.2-1b", "llama-3.2-3b", "gpt2-large"
    whole: list[Cell] = [Models(110, m, "decode", 1, None, variants) for m in (small, large)]
    order = [(small, "prefill", 1), (gpt2, "decode", 1), (small, "decode", 8), (large, "prefill", 1)]
    order += [(large, "decode", 8), (gpt2, "prefill", 1), (gpt2, "decode", 8), (small, "prefill", 8)]
    order += [(large, "prefill", 8), (gpt2, "prefill", 8)]
    cut: list[Cell] = [Models(60, model, case, batch, layers, variants) for model, case, batch in order]
    kernels: list[Cell] = [Kernels(45, model, 1) for model in (large, small)]
    later: list[Cell] = [Kernels(45, gpt2, 1), *(Kernels(45, large, tokens) for tokens in (8, 128))]
    return [Card(25), *kernels, *whole, *cut[:4], later[0], *cut[4:], *later[1:]]


@dataclass(frozen=True)
class Card(Cell):
    """What the card gives, and whether it starts programs in the order of their ids."""

    name = "card"

    def run(self, budget: Budget) -> Iterator[Row]:
        from benchmarks.start_order import lateness, seats

        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        yield _fact("copy bandwidth", gpu_timing.copy_bandwidth(ROUNDS), "bytes per second, read and written")
        yield _fact("multiprocessors", properties.multi_processor_count, "")
        yield _fact("second cache", getattr(properties, "L2_cache_size", 0), "bytes")
        yield _fact("seats", seats(), "programs of four warps at once; one later than that would break single_launch")
        for tokens, blocks in ((1, 16384), (8, 4096)) if gpu_timing.DEVICE == "cuda" else ((1, 3),):
            late = lateness(tokens, blocks)
            yield _fact(f"lateness, {tokens} × {blocks}", late, "places that a program started after its turn, at most")


def _fact(name: str, value: float, unit: str) -> Row:
    return {"kind": "fact", "name": name, "value": value, "unit": unit}


# --- Models ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Models(Cell):
    """All variants of a model in one case, each captured into a CUDA graph; in turns, once as many are ready as the
    time allows."""

    model: str
    case: str
    batch: int
    layers: int | None
    variants: tuple[Variant, ...]

    @property
    def name(self) -> str:
        return f"{self.title}, {self.case}, batch {self.batch}"

    @property
    def title(self) -> str:
        return common.title({"model": self.model, "layers": self.layers}) + ", no head" * (self.layers is not None)

    def run(self, budget: Budget) -> Iterator[Row]:
        torch._dynamo.config.recompile_limit = 64  # all variants share their forward's code
        base = self._base()
        graphs: dict[Variant, gpu_timing.Recorded] = {}
        rows: dict[Variant, Row] = {}
        last = 0.0  # seconds that a variant took
        for variant in self.variants:
            if budget.left() < 1.3 * last:
                why = f"{budget.left():.0f} s were left, and the last variant took {last:.0f}"
                yield self._row(variant) | {"kind": "skipped", "why": why}
                continue
            began = time.time()
            try:
                graphs[variant], plans = self._record(base, variant)
                taken = gpu_timing.samples(graphs[variant], min(3, ROUNDS), REPLAYS[self.case])
            except Exception as error:
                yield self._row(variant) | {"kind": "failed", "why": f"{type(error).__name__}: {error}"}
                continue
            last = time.time() - began
            rows[variant] = self._row(variant) | {"plans": plans, "ready_s": last}
            yield rows[variant] | {"ms": asdict(measure.Timing.of(taken)), "in_turns": False}
        if graphs:
            steps = {str(v): lambda g=graph: g.milliseconds(REPLAYS[self.case]) for v, graph in graphs.items()}
            taken_in_turns, _ = measure.interleave(steps, ROUNDS, 2)
            for variant, row in rows.items():
                yield row | {"ms": asdict(measure.Timing.of(taken_in_turns[str(variant)])), "in_turns": True}
        graphs.clear()
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()  # what the graphs had

    def _row(self, variant: Variant) -> Row:
        backend, adapter, rank = variant
        names = {"model": self.title, "case": self.case, "batch": self.batch, "whole": self.layers is None}
        return {"kind": "model", **names, "backend": backend, "adapter": adapter, "rank": rank}

    def _base(self) -> Any:
        setup = self._setup(RANK)
        with torch.device(gpu_timing.DEVICE):  # random weights are drawn there, in a moment
            base = common.load_base(setup)
            if self.layers is not None:
                base.set_output_embeddings(torch.nn.Identity())
        return base

    def _setup(self, rank: int) -> Setup:
        device = gpu_timing.DEVICE
        return Setup(self.model, "bfloat16", rank, cast_adapters=True, device=device, layers=self.layers)

    def _record(self, base: Any, variant: Variant) -> tuple[gpu_timing.Recorded, str]:
        """The variant in a graph, and which plans its groups have."""
        backend, adapter, rank = variant
        model = base if adapter == "base" else common.with_adapter(base, self._setup(rank), adapter)
        options = {"options": {"strict": True}} if backend == "gaws" else {}
        compiled = measure.compiled(model, backend, dynamic=False, fullgraph=True, **options)
        mark = len(RECORDS)
        ids = common._ids(model, common.PREFILL if self.case == "prefill" else common.PAST)
        if self.case == "decode":
            decoder = Decoder(model, compiled, 2 * common.PAST, batch=self.batch)
            decoder.fill(ids[0].tolist())
            recorded = gpu_timing.Recorded(decoder.step_again, decoder.seek)
        else:
            ids = ids.repeat(self.batch, 1)

            @torch.no_grad()
            def prefill() -> Any:
                return compiled(input_ids=ids, use_cache=True, logits_to_keep=1)

            recorded = gpu_timing.Recorded(prefill)
        plans = Counter(group.plan for record in RECORDS.since(mark) for group in record.groups)
        return recorded, ", ".join(f"{count} {plan}" for plan, count in plans.most_common())


# --- Kernels -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernels(Cell):
    """The groups of one layer, bare and with LoRA: our plans, what torch does, and how much of a copy's bandwidth they
    reach with operands from memory."""

    model: str
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.model}, kernels, {self.tokens} token{'s' * (self.tokens != 1)}"

    def run(self, budget: Budget) -> Iterator[Row]:
        queue = [way for name, spec in groups(self.model) for way in self._ways(name, spec)]
        queue.sort(key=lambda way: (way[0], -way[1]["bytes"]))  # what is chosen comes first, for the largest groups
        for _, row, call, spec in queue:
            if budget.left() < 5:
                yield row | {"kind": "skipped", "why": "the time for this cell was over"}
                continue
            try:
                taken = fit_gpu.cold(spec, self.tokens, call)(ROUNDS)
                plan = None if row["what"] in TORCH else triton.Plan.parse(row["what"])
                yield row | {
                    "us": asdict(measure.Timing.of([1e3 * sample for sample in taken])),
                    "resources": resources(spec, plan) if plan else "",
                }
            except Exception as error:
                yield row | {"kind": "failed", "why": f"{type(error).__name__}: {error}"}

    def _ways(self, name: str, spec: KernelSpec) -> Iterator[tuple[int, Row, Callable[..., Any], KernelSpec]]:
        """(importance, row, call, spec) of every way to run a group; 0 is the most important."""
        gpu = devices.of("cuda")
        assert isinstance(gpu, devices.Gpu)
        adapted = any(p.adapted for p in spec.projections)
        row = {
            **{"kind": "kernel", "model": self.model, "group": name, "tokens": self.tokens},
            "adapter": f"LoRA r={RANK}" if adapted else "none",
            "bytes": sum(gpu_cost.operand_bytes(spec)),
        }
        planned = cost.plan(spec, gpu)
        best: dict[str, triton.Plan] = {}
        for plan in sorted(triton.plans(spec), key=lambda plan: planned.seconds(str(plan), self.tokens)):
            best.setdefault(plan.name, plan)
        for plan in best.values():
            chosen = str(plan) == planned.table.pick(self.tokens)
            if self.tokens > 16 and plan.rows:
                continue  # decode plans read W once for every token
            program = f"triton {plan} | {spec}"
            mine = {"what": str(plan), "chosen": chosen, "predicted_us": 1e6 * planned.seconds(str(plan), self.tokens)}
            yield 0 if chosen else 2, row | mine, lambda x, o, p=program: torch.ops.gaws.project(x, o, p), spec
        for what, call in TORCH.items():
            if adapted or what == MM:
                yield 1, row | {"what": what}, lambda x, o, call=call: call(spec, x, o), spec


def _mm(spec: KernelSpec, x: torch.Tensor, operands: list[torch.Tensor]) -> list[torch.Tensor]:
    """The weights' products alone, one launch for each."""
    weights = [w for o, w in zip(spec.operands(), operands, strict=True) if o.role == "weight"]
    return [x @ (w if p.transposed else w.t()) for p, w in zip(spec.projections, weights, strict=True)]


def _shrink_expand(spec: KernelSpec, x: torch.Tensor, operands: list[torch.Tensor]) -> list[torch.Tensor]:
    """Those products, then for every projection one launch that shrinks and one that expands in place."""
    named = {o.name: t for o, t in zip(spec.operands(), operands, strict=True)}
    outputs = _mm(spec, x, operands)
    for i, (p, y) in enumerate(zip(spec.projections, outputs, strict=True)):
        for j, term in enumerate(p.lowrank):
            scale = 1.0 if term.scale is None else term.scale
            y.addmm_(x @ named[f"a{i}_{j}"].t(), named[f"b{i}_{j}"].t(), alpha=scale)
    return outputs


MM, SHRINK_EXPAND = "torch.mm, no adapter", "torch.mm, shrink, expand"
TORCH: dict[str, Callable[..., Any]] = {MM: _mm, SHRINK_EXPAND: _shrink_expand}


def groups(model: str) -> list[tuple[str, KernelSpec]]:
    """The groups of one layer of a shape, and the head of a Llama, in bf16: bare, and with LoRA of rank `RANK`."""
    sizes = SHAPES[model].sizes
    if "n_embd" in sizes:
        width, words = sizes["n_embd"], "wt=bf16 out=bf16 bias=bf16"
        bare = {
            "c_attn": _spec(width, [3 * width], words),
            "attention's c_proj": _spec(width, [width], f"{words} residual=bf16"),
            "c_fc": _spec(width, [4 * width], words),
            "mlp's c_proj": _spec(4 * width, [width], f"{words} residual=bf16"),
        }
    else:
        width, inner, words = sizes["hidden_size"], sizes["intermediate_size"], "w=bf16 out=bf16"
        queries, keys = (sizes[name] * sizes["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
        bare = {
            "q, k, v": _spec(width, [queries, keys, keys], words),
            "o": _spec(queries, [width], f"{words} residual=bf16"),
            "gate, up": _spec(width, [inner, inner], words, " swiglu"),
            "down": _spec(inner, [width], f"{words} residual=bf16"),
        }
    adapted = {name: _with_lora(spec) for name, spec in bare.items()}
    head = {"head": _spec(width, [sizes["vocab_size"]], words)} if "n_embd" not in sizes else {}
    return [*adapted.items(), *bare.items(), *head.items()]


def _with_lora(spec: KernelSpec) -> KernelSpec:
    start, *rows = str(spec).split("; ")
    return KernelSpec.parse("; ".join([start, *(f"{row} lora(r={RANK} bf16 s=2.0)" for row in rows)]))


def _spec(k: int, widths: list[int], words: str, swiglu: str = "") -> KernelSpec:
    return KernelSpec.parse("; ".join([f"k={k} x=bf16{swiglu}", *(f"n={n} {words}" for n in widths)]))


def resources(spec: KernelSpec, plan: triton.Plan) -> str:
    """Of the kernels as compiled for the current device: registers and spilled bytes, and how many programs of each a
    multiprocessor holds by its registers and threads (NVIDIA's 65,536 and 2,048)."""
    found = []
    for kernel in getattr(triton.load(spec, plan), "KERNELS", ()):
        caches = getattr(kernel, "device_caches", {}).get(torch.cuda.current_device(), ({},))
        for compiled in (made for made in caches[0].values() if getattr(made, "n_regs", None)):
            warps = int(compiled.metadata.num_warps)
            fit = min(65536 // (-(-compiled.n_regs // 8) * 8 * 32 * warps), 2048 // (32 * warps), 32)
            found.append(f"{compiled.n_regs} registers, {compiled.n_spills} spilled, {fit} resident")
    return "; ".join(dict.fromkeys(found))
