"""Two processes of one model, started as users do: right, fused, and with as many collectives as the bare model has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.caches import environment

CACHES = ("static", "dynamic")
SLOW = [pytest.param((name, *CACHES), marks=pytest.mark.slow) for name in ("llama", "qwen2", "mistral", "smollm2")]


def right(tmp_path: Path, *command: str) -> None:
    """Two processes of a module of tests, by ``torchrun``, find that all is right."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*run, "-m", *command],
        env={**os.environ, **environment(tmp_path), "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=2400,  # all of SmolLM2 is compiled six times, on one thread
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count(" right") == 2


@pytest.mark.parametrize("case", [("llama",), *SLOW], ids=" ".join)
def test_adapters_of_a_sharded_model_are_fused_and_add_no_collective(case, tmp_path, request):
    """With the caches that are named, 64 tokens are eager PEFT's on one process."""
    folder = request.getfixturevalue("smollm2_dir") if "smollm2" in case else tmp_path
    right(tmp_path, "tests.distributed.sharded", str(folder), *case)


@pytest.mark.slow
def test_torchs_own_ways_to_spread_a_model(tmp_path):
    right(tmp_path, "tests.distributed.ways", "by_hand", "replicated", "sequence", "fsdp", "ddp", "ddp_steps")


@pytest.mark.slow
def test_a_bank_on_a_sharded_model(tmp_path):
    """Right, with as many collectives as the base has; of 100 tokens each of one adapter on all ranks."""
    right(tmp_path, "tests.distributed.banks", str(tmp_path), "100")
