"""Where the time of a compiled call on a CPU goes, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable

import torch

REGION, GUARDS = "Torch-Compiled Region", "TorchDynamo Cache Lookup"  # as torch names them

PARTS: dict[str, tuple[str, ...]] = {
    "guards": (GUARDS,),
    "entry: what the graph reads is gathered, results are put together": (REGION, "AOTDispatcher", "Pregraph bytecode"),
    "wrapper around the kernels": ("gaws::execute", "## Call CompiledFxGraph"),
    "projections": ("gaws::project",),
    "attention": ("gaws::attend", "aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention"),
    "products by the library": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::", "quantized::"),
    "Inductor's kernels: norms, rotary embedding, cache": ("cpp_fused",),
}
"""The parts of a call on a CPU, and how the names of their events begin."""

OTHERS = "other operators"


def seconds(call: Callable[[], object], calls: int = 20) -> dict[str, float]:
    """Seconds that each part takes of a call, in the order of `PARTS`; nothing where no compiled code runs.

    A mean of `calls`, in which the profiler costs about a microsecond an event. Where Inductor's wrapper runs in
    Python, its kernels are no events, and their time is the wrapper's.
    """
    call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(calls):
            call()
    spent: dict[str, float] = dict.fromkeys([*PARTS, OTHERS], 0.0)
    for event in profile.events() or ():
        outer = event
        while outer.cpu_parent is not None:
            outer = outer.cpu_parent
        if outer.name.startswith((REGION, GUARDS)):
            spent[_part(event.name)] += event.self_cpu_time_total / 1e6 / calls
    return {part: taken for part, taken in spent.items() if taken}


def _part(name: str) -> str:
    return next((part for part, names in PARTS.items() if name.startswith(names)), OTHERS)
