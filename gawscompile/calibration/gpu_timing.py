"""Timing on a GPU: work captured into a CUDA graph, replayed between two events.

Guards, Python and launches from the host are not in such a time: what is left is what the device does. Everything
here works on the current device.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

DEVICE = "cuda"
"""Where tensors are made; the rehearsal without a GPU (`tests/gpu/rehearse.py`) has another."""

COPIED = 1 << 30
"""Bytes of the buffer whose copy shows what the memory gives: far more than any second cache."""


class Recorded:
    """`run`, warmed up and then captured into a CUDA graph, both on one stream of its own.

    The same stream, because what a library keeps for each stream, its workspace say, is then there when the capture
    begins. `result` is what the captured call returned; every replay writes it anew. `prepare`
    runs before each warm-up, before the capture and before a timing, outside of the graph.
    """

    def __init__(
        self, run: Callable[[], Any], prepare: Callable[[], object] | None = None, warmups: int = 2
    ) -> None:
        self._run = run  # compiled code owns constants, which must outlive the graph
        self._prepare = prepare or (lambda: None)
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(warmups):
                self._prepare()
                run()
            self._prepare()
        torch.cuda.current_stream().wait_stream(self.stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.result = run()

    def replay(self) -> Any:
        """Runs the graph on the current stream; the result is there once that stream is done."""
        self.graph.replay()
        return self.result

    def milliseconds(self, times: int = 1) -> float:
        """Of one replay, as the mean of `times` that follow each other, so that only the first waits for the host."""
        self._prepare()
        torch.cuda.synchronize()
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        for _ in range(times):
            self.graph.replay()
        ended.record()
        torch.cuda.synchronize()
        return float(began.elapsed_time(ended)) / times


def samples(recorded: Recorded, rounds: int, times: int = 1) -> list[float]:
    """Milliseconds of one replay: `rounds` timings, after one that is not counted."""
    recorded.milliseconds(times)
    return [recorded.milliseconds(times) for _ in range(rounds)]


def copy_bandwidth(rounds: int = 5) -> float:
    """Bytes per second, read and written, of a copy from device memory to device memory."""
    source = torch.zeros(COPIED, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2e3 * COPIED / statistics.median(samples(Recorded(lambda: target.copy_(source)), rounds, times=4))


def cold_copies(size: int, least: int = 2, most: int = 64) -> int:
    """How many copies of operands of `size` bytes, used in turn, each find the others in the second cache instead."""
    cache = int(getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 64 << 20))
    return max(least, min(most, -(-4 * cache // max(1, size))))
