"""What is active, where a GPU can read it: the table that graphs captured there take their schedules from.

A CUDA graph replays kernels and no Python, so what it is to see of a bank has to lie at one address. A forward takes a
schedule of its own from there when it begins, by operations of its stream.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gawscompile.banks.opening import BankError


class Table:
    """Schedules of up to `rows` rows on `device`: ``[modules, rows + 1, width, FIELDS]`` of int32, of which the first
    header says how many are chosen (`runtime.banked.taken`)."""

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device) -> None:
        with torch.inference_mode(False):
            self.tensor = torch.zeros(shape, dtype=torch.int32, device=device)
        self.rows = shape[1] - 1
        self._last: np.ndarray | None = None

    def check(self, rows: int) -> None:
        """Raises `BankError` where the table has no place for so many."""
        if rows > self.rows:
            what = f"adapters for {rows} rows, and the bank has places for {self.rows}"
            raise BankError(f"{what}: AdapterBank(max_rows=…)")

    def write(self, schedule: np.ndarray) -> None:
        """Kernels that this thread's stream launches from now on, replays too, see `schedule`."""
        if self._last is not None and np.array_equal(self._last, schedule):
            return
        self._last = schedule
        with torch.inference_mode():
            self.tensor[:, : schedule.shape[1]].copy_(self._host(schedule), non_blocking=True)

    def own(self, schedule: np.ndarray) -> Tensor:
        """`schedule` as a tensor of its own."""
        return self._host(schedule).to(self.tensor.device, non_blocking=True, copy=True)

    def _host(self, schedule: np.ndarray) -> Tensor:
        """Where a device copies from while the caller goes on, who may hold the bank's lock."""
        made = torch.from_numpy(schedule)
        return made.pin_memory() if self.tensor.is_cuda else made
