"""How a case is compiled: for which device, by which plans, how much of the pipeline; and all of it without kernels."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import sympy

from gawscompile import cache
from gawscompile.codegen import triton
from gawscompile.ir.spec import KernelSpec
from gawscompile.passes import PIPELINE, choose_plan
from gawscompile.planning import cost, devices
from gawscompile.planning.table import PlanTable
from gawscompile.planning.targets import CPP, TRITON
from gawscompile.runtime import attention, ops
from gawscompile.verify import proof
from tests.fuzz import data, graphs
from tests.fuzz.programs import Program

STAGES = {stage.__name__.rpartition(".")[2]: stage for stage in PIPELINE}

CPUS = tuple(
    devices._cpu(2, *kind)
    for kind in (
        ("AuthenticAMD", "26", "AVX512", "dot"),
        ("AuthenticAMD", "25", "AVX512", "dot"),
        ("GenuineIntel", "6", "AVX512", "amx"),
        ("GenuineIntel", "6", "AVX2", ""),
    )
)


@dataclass(frozen=True)
class Config:
    """How a program is compiled and called."""

    seed: int = 0
    device: str = "cpu"
    plans: str = "any"
    """``any``: a random table of the plans that can run a group; else the name of a device that it is planned for."""

    symbolic: tuple[str, ...] = ()
    shared: bool = False
    fuel: int | None = None
    disable: tuple[str, ...] = ()
    barred: int | None = None
    """Which of its rewrites may not go ahead, as one that failed (`gawscompile.verify.containment`)."""

    stored: bool = True
    """Whether Dynamo would know parameters for what they are."""

    one_module: bool = False
    """Whether all nodes are of one module (else none has a name)."""

    way: str = "plain"
    """How numbers are drawn (`data.WAYS`)."""

    twice: bool = False
    proven: bool = False

    @staticmethod
    def of(seed: int, program: Program) -> Config:
        rng = random.Random(f"config {seed}")
        choice = rng.random()
        cut = choice < 0.2  # a part of the pipeline, which is spelled out by tracing: no fake tensor computes on a GPU
        gpu = not cut and rng.random() < 0.35
        names = [gpu.name for gpu in devices.GPUS.values()] if gpu else [cpu.name for cpu in CPUS]
        return Config(
            seed=seed,
            device="cuda" if gpu else "cpu",
            plans=rng.choice(names) if rng.random() < 0.1 else "any",
            symbolic=tuple(graphs.may_be_symbolic(program)) if rng.random() < 0.08 else (),
            shared=rng.random() < 0.5,
            fuel=rng.randrange(12) if choice < 0.08 else None,
            disable=tuple(rng.sample(sorted(STAGES), rng.choice((1, 1, 2)))) if 0.08 < choice < 0.16 else (),
            barred=rng.randrange(20) if 0.16 < choice < 0.2 else None,
            stored=rng.random() < 0.95,
            one_module=rng.random() < 0.3,
            way=rng.choice(data.WAYS),
            twice=rng.random() < 0.15,
            proven=rng.random() < 0.05,
        )

    def __str__(self) -> str:
        default = Config()
        said = {name: value for name, value in vars(self).items() if value != getattr(default, name)}
        return f"Config({', '.join(f'{name}={value!r}' for name, value in said.items())})"


@contextmanager
def without_kernels(config: Config) -> Iterator[None]:
    """Nothing is built; groups are planned as `config` says."""
    known = devices.GPUS | {cpu.name: cpu for cpu in CPUS}
    device = known.get(config.plans) or (devices.GPUS["H100"] if config.device == "cuda" else CPUS[0])
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(ops, "prepare", lambda program: None))
        stack.enter_context(mock.patch.object(devices, "of", lambda kind: device))
        for module, name in ((proof, "_kernel_fault"), (proof, "_attention_fault"), (attention, "start")):
            stack.enter_context(mock.patch.object(module, name, lambda *_: None))
        if config.plans == "any":

            def planned(spec: KernelSpec, device: Any) -> cost.Planned:
                return _any_plans(spec, config)

            stack.enter_context(mock.patch.object(choose_plan, "plan", planned))
        yield


def _any_plans(spec: KernelSpec, config: Config) -> cost.Planned:
    rng = random.Random(f"{config.seed} {spec}")
    if config.device == "cuda":
        names = [str(plan) for plan in triton.plans(spec)]
    else:
        names = CPP.plans(spec)
    chosen = rng.sample(names, min(len(names), rng.choice((1, 2, 3))))
    bounds = sorted(rng.sample(range(1, 9), len(chosen) - 1))
    table = PlanTable(tuple(zip(chosen, (*bounds, None), strict=True)))
    target = TRITON if config.device == "cuda" else CPP
    return cost.Planned(table, target, cache.digest(str(spec))[:12], {name: sympy.Float(1e-6) for name in names})
