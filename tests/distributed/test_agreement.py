"""Ranks compile alike: one that fails, has other caches or another machine, or is gone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.caches import environment


@pytest.mark.slow  # tests/runtime/test_ranks.py asks one process the same
def test_ranks_go_on_alike(tmp_path):
    """One pair of processes goes through all cases: starting them takes longer than most."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        port = str(one.getsockname()[1])
    at = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.agreement", str(tmp_path)],
            env={**os.environ, **environment(tmp_path), **at, "RANK": rank},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        (out, errors), (_, others) = [rank.communicate(timeout=400) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], (errors + others)[-6000:]
    assert "right" in out
