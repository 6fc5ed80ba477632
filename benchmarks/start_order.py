"""In which order the programs of a launch start: what `single_launch` relies on.

Its programs that wait for u must not take every seat of the device before those that compute u have one. If programs
get their seats in the order of their ids, nobody is ahead of those, as they come first. `lateness` measures how far
from that order they begin to run. Programs that have seats at the same time may begin in any order: what would break
the plan is one that is late by more places than there are `seats`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gawscompile.calibration import gpu_timing

READ = 4096
"""Elements that a program reads before it ends, so that it keeps its seat for a while."""


WARPS = 4


def seats() -> int:
    """Programs of so many warps that the current device can hold at once, by their threads."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    threads = int(getattr(properties, "max_threads_per_multi_processor", 2048))
    return int(properties.multi_processor_count) * (threads // (32 * WARPS))


@triton.jit
def take_tickets(counter, tickets, source, sums, BLOCK: tl.constexpr):
    """Every program draws the next number as it starts, and then reads as a program of a decode kernel does."""
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    ticket = tl.atomic_add(counter, 1, sem="relaxed")
    tl.store(tickets + program, ticket)
    offset = program.to(tl.int64) * BLOCK
    tl.store(sums + program, tl.sum(tl.load(source + offset + tl.arange(0, BLOCK))))


def lateness(tokens: int, blocks: int, rounds: int = 5) -> int:
    """By how many places, at most, a program started after its turn, in launches of ``tokens × blocks`` programs with
    tokens on the fast axis, as decode plans have it."""
    programs = tokens * blocks
    source = torch.zeros(programs * READ, device=gpu_timing.DEVICE)
    sums = torch.empty(programs, device=gpu_timing.DEVICE)
    ids = torch.arange(programs, device=gpu_timing.DEVICE)
    worst = 0
    for _ in range(rounds):
        counter = torch.zeros(1, dtype=torch.int32, device=gpu_timing.DEVICE)
        tickets = torch.empty(programs, dtype=torch.int32, device=gpu_timing.DEVICE)
        take_tickets[(tokens, blocks)](counter, tickets, source, sums, BLOCK=READ, num_warps=WARPS)
        if sorted(tickets.tolist()) != list(range(programs)):
            raise RuntimeError(f"{programs} programs did not draw each number once: the counter is not atomic")
        worst = max(worst, int((tickets - ids).max()))
    return worst
