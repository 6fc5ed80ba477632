"""Targets and their plans, as objects: what a group may run by on a kind of device, and how that is built.

Whoever plans, lowers, calibrates or reports asks these. A CPU plan is a line of `CPP`; a GPU plan is a line of
`codegen.triton.PLANS`, which names the class that prints its kernels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy

from gawscompile.codegen import build, cpp, triton
from gawscompile.codegen.triton_kernels import Style
from gawscompile.ir.spec import KernelSpec, Operand
from gawscompile.ir.sums import Sum
from gawscompile.ir.types import SpecError
from gawscompile.planning import cpu_cost, gpu_cost
from gawscompile.planning.devices import Device, Gpu


@dataclass(frozen=True)
class PlanKind:
    """A way to run a group. A plan is a kind by its `name`, with its rows on a GPU: ``single_launch[8]``.

    `plans` are those of this kind that can run a spec; `kernels` counts the generated kernels that one call launches;
    `cost` is seconds of a call in m, the number of tokens; with `keeps_state` something is kept between calls; with
    `uses_library` the vendor library multiplies the bases; with `takes_sums` the kernel takes the checksums of what it
    reads.
    """

    name: str
    plans: Callable[[KernelSpec], list[str]]
    kernels: Callable[[KernelSpec, str], int]
    cost: Callable[[KernelSpec, str, Any, Any], Any]
    keeps_state: bool = False
    uses_library: bool = False
    takes_sums: bool = False


class Target(ABC):
    """What prints, builds and runs the kernels of one kind of device."""

    name: ClassVar[str]
    device: ClassVar[str]  # torch's name of the kind
    prefix: ClassVar[str]  # of a program's text
    hoists: ClassVar[bool]  # whether its op derives what parameters alone determine
    tunes: ClassVar[bool]  # whether it has an autotuner
    kinds: dict[str, PlanKind]

    def kind(self, plan: str) -> PlanKind:
        """Of a plan's text. Raises `SpecError` for one that this target does not have."""
        found = self.kinds.get(plan)
        if found is None:
            raise SpecError(f"not a plan of the emitter {self.name}: {plan}")
        return found

    def plans(self, spec: KernelSpec) -> list[str]:
        """Those that can run `spec`. Raises `SpecError` where there is none."""
        found = [plan for kind in self.kinds.values() for plan in kind.plans(spec)]
        if not found:
            raise SpecError(f"no grid can hold the programs of {spec}")
        return found

    def costs(self, spec: KernelSpec, device: Any, m: sympy.Symbol) -> dict[str, sympy.Expr]:
        """Each plan that can run `spec`, with its time in `m`. Raises `SpecError` where there is none."""
        return {plan: self.kind(plan).cost(spec, plan, device, m) for plan in self.plans(spec)}

    def launches(self, spec: KernelSpec, plan: str) -> int:
        """Of one call: generated kernels, and products of the vendor library."""
        kind = self.kind(plan)
        return kind.kernels(spec, plan) + kind.uses_library * sum(p.opaque is None for p in spec.projections)

    def no_swiglu(self, sums: Sequence[Sum]) -> str | None:
        """Why no kernel forms the product of this gate and its partner, if none does."""
        return None

    @abstractmethod
    def sources(self, spec: KernelSpec, plans: Sequence[str], summed: Sequence[Operand], tuned: bool) -> dict[str, str]:
        """The generated code of `plans`, by file name."""

    def start(self, spec: KernelSpec, plans: Sequence[str], summed: Sequence[Operand]) -> None:
        """Begin to build that in the background, where it takes long."""
        return None

    @abstractmethod
    def finish(self, spec: KernelSpec, plans: Sequence[str], summed: Sequence[Operand], tuned: bool) -> None:
        """Wait until that is built."""


class Cpp(Target):
    """Generated C++ for CPUs."""

    name, device, prefix, hoists, tunes = "cpp", "cpu", "", True, False

    def __init__(self) -> None:
        one, panels, library = cpp.PLANS
        self.kinds = {
            one: PlanKind(one, lambda _: [one], lambda *_: 1, _on_cpu(cpu_cost.gemv), takes_sums=True),
            panels: PlanKind(
                panels, lambda spec: [panels] * cpp.takes_panels(spec), lambda *_: 1, _on_cpu(cpu_cost.panels)
            ),
            library: PlanKind(
                library,
                lambda spec: [library] * spec.library_takes,
                _accumulated,
                _on_cpu(cpu_cost.gemm),
                uses_library=True,
            ),
        }

    def no_swiglu(self, sums: Sequence[Sum]) -> str | None:
        return cpp.no_swiglu(sums)

    def sources(self, spec: KernelSpec, plans: Sequence[str], summed: Sequence[Operand], tuned: bool) -> dict[str, str]:
        return {"kernel.cpp": cpp.emit(spec, plans, summed)}

    def start(self, spec: KernelSpec, plans: Sequence[str], summed: Sequence[Operand]) -> None:
        build.start(cpp.emit(spec, plans, summed))

    def finish(self, spec: KernelSpec, plans: Sequence[str], summed: Sequence[Operand], tuned: bool) -> None:
        build.start(cpp.emit(spec, plans, summed)).result()


def _on_cpu(cost: Callable[[KernelSpec, Device, Any], Any]) -> Callable[[KernelSpec, str, Any, Any], Any]:
    return lambda spec, plan, device, m: cost(spec, device, m)


def _accumulated(spec: KernelSpec, plan: str) -> int:
    """Whether the library's products are all."""
    return int(spec.swiglu or not all(p.plain for p in spec.projections))


class Triton(Target):
    """Generated Triton for GPUs. Kernels are printed and imported here, and compile when they are first called."""

    name, device, prefix, hoists, tunes = "triton", "cuda", "triton ", False, True

    def __init__(self) -> None:
        self.kinds = {name: _on_gpu(name, kind.style) for name, kind in triton.PLANS.items()}

    def kind(self, plan: str) -> PlanKind:
        return self.kinds[triton.Plan.parse(plan).name]

    def sources(self, spec: KernelSpec, plans: Sequence[str], summed: Sequence[Operand], tuned: bool) -> dict[str, str]:
        return {f"{plan}.py": triton.emit(spec, triton.Plan.parse(plan), tuned) for plan in plans}

    def finish(self, spec: KernelSpec, plans: Sequence[str], summed: Sequence[Operand], tuned: bool) -> None:
        for plan in plans:
            triton.load(spec, triton.Plan.parse(plan), tuned)


def _on_gpu(name: str, style: type[Style]) -> PlanKind:
    return PlanKind(
        name,
        plans=lambda spec: [str(p) for p in triton.plans(spec) if p.name == name and triton.fits(spec, p)],
        kernels=lambda spec, plan: len(triton.launches(spec, triton.Plan.parse(plan))),
        cost=lambda spec, plan, device, m: gpu_cost.seconds(spec, triton.Plan.parse(plan), device, m),
        keeps_state=style.keeps_state,
        uses_library=style.uses_library,
    )


CPP, TRITON = Cpp(), Triton()
TARGETS: tuple[Target, ...] = (CPP, TRITON)


def target_of(device: Device | Gpu) -> Target:
    """What runs on a device that the cost model knows."""
    return TRITON if isinstance(device, Gpu) else CPP
