"""Our passes alone, on the graphs of adapted Llamas of 8 to 128 layers, by pytest-benchmark.

    python -m pytest benchmarks/test_passes.py --benchmark-columns=median,iqr,rounds

Graphs are traced once per size (half a second a layer) and kept in memory. A round is the whole of `GawsPass`: its
copy of the graph, every pass, records, and the graph put back; each pass's own milliseconds are in `extra_info`
(``--benchmark-json FILE``).
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch._dynamo.utils import compilation_time_metrics

from gawscompile.backend import GawsPass
from gawscompile.options import Options
from gawscompile.runtime import ops
from tests.graphs import Captured, capture, small_llama, tokens

LAYERS = (8, 16, 32, 64, 128)
ROUNDS = 5


@functools.cache
def graph_of(layers: int) -> Captured:
    """What AOTAutograd makes of a decode step of an adapted model."""
    ops.ensure_loaded()
    return capture(small_llama(layers=layers), tokens(1, 1), use_cache=False)


def fresh(captured: Captured) -> torch.fx.Graph:
    """A copy for the passes to rewrite."""
    graph = torch.fx.Graph()
    graph.owning_module = captured.module
    graph.output(graph.graph_copy(captured.graph, {}))
    return graph


@pytest.mark.parametrize("layers", LAYERS)
def test_passes(benchmark: Any, layers: int) -> None:
    captured = graph_of(layers)
    before = {name: len(seconds) for name, seconds in compilation_time_metrics.items()}

    def setup() -> tuple[tuple[GawsPass, torch.fx.Graph], dict[str, Any]]:
        return (GawsPass(Options(strict=True), "", "cpu", False, captured.stored), fresh(captured)), {}

    benchmark.pedantic(GawsPass.__call__, setup=setup, rounds=ROUNDS, warmup_rounds=1)
    for name, seconds in compilation_time_metrics.items():
        if name.startswith("gaws."):
            mine = sorted(seconds[before.get(name, 0) :])
            benchmark.extra_info[f"{name} ms"] = round(1e3 * mine[len(mine) // 2], 2)
