"""Memory of one model under one backend, measured in a process of its own (``benchmarks.runtime --memory`` runs it)."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.common import Setup


def tensor_bytes() -> int:
    """Bytes of all storages that live tensors hold, each storage once."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        # Subclasses beside Parameter are fakes and wrappers, which have no memory of their own to count.
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    storages.pop(0, None)
    return sum(storages.values())


def resident(field: str) -> int | None:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (peak) of this process; None where there is no /proc."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def forget_peak() -> None:
    """Sets the kernel's note of the peak back to the present, where it lets us."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def probe(setup: Setup, backend: str, adapted: bool) -> dict[str, int | None]:
    """Bytes: tensors before and after compiling and running; peak resident while compiling, and while running after."""
    model = common.load_base(setup)
    if adapted:
        model = common.with_adapter(model, setup, share=False)
    found: dict[str, int | None] = {"tensors_before": tensor_bytes()}
    forget_peak()
    made = common.cases(model, backend, setup)
    for case in made:
        case.step()
    found["peak_compiling"] = resident("VmHWM")
    gc.collect()
    forget_peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for case in made:
        for _ in range(3):
            case.step()
    found["peak_running"] = resident("VmHWM")
    found["tensors_after"] = tensor_bytes()
    if torch.cuda.is_available():
        found["gpu_peak_running"] = torch.cuda.max_memory_allocated()
    return found


def main() -> None:
    """One probe; see `benchmarks.runtime` for what the flags mean."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setup", required=True, help="a Setup as JSON")
    parser.add_argument("--backend", required=True)
    parser.add_argument("--adapted", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    found = probe(Setup(**json.loads(options.setup)), options.backend, options.adapted)
    common.write(options.json, json.dumps(found))


if __name__ == "__main__":
    main()
