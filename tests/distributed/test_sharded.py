"""Two processes of one model, started as users do: right, fused, and with as many collectives as the bare model has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.caches import environment

MODELS = [
    "llama",
    pytest.param("qwen2", marks=pytest.mark.slow),
    pytest.param("mistral", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", MODELS)
def test_adapters_of_a_sharded_model_are_fused_and_add_no_collective(name, tmp_path):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*run, "-m", "tests.distributed.sharded", str(tmp_path), name],
        env={**os.environ, **environment(tmp_path), "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count(" right: ") == 2
