"""Runs `benchmarks.gpu` on the stand-in, with models of a handful of features, so that every line of it runs once.

    python -m tests.gpu.rehearse --out FOLDER

Nothing of what it writes says anything about a GPU.
"""

from __future__ import annotations

import os
import sys

os.environ |= {"TRITON_INTERPRET": "1", "GAWS_GPU_STAND_IN": "1", "CUDA_VISIBLE_DEVICES": ""}  # before Triton's import

import torch

from benchmarks import gpu
from tests.gpu import stand_in
from tests.gpu.small import shrink


def main() -> int:
    torch.set_num_threads(1)
    stand_in.install()
    shrink()
    gpu.WORKER = ["-m", "tests.gpu.rehearse"]
    return gpu.main()


if __name__ == "__main__":
    sys.exit(main())
