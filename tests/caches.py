"""Caches of their own for processes that tests start: empty, but for the op.

The op takes the longest of all to build, and no test is about what its build takes: it comes from this process's cache.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from gawscompile.codegen import build
from gawscompile.runtime import ops


def seeded(folder: Path) -> Path:
    """`folder` as a cache of ours that holds the op and nothing else."""
    op = build.start(ops._op_source()).result()
    (kernels := folder / "kernels").mkdir(mode=0o700, parents=True)
    folder.chmod(0o700)
    for path in op.parent.glob(f"{op.stem}*"):
        shutil.copy(path, kernels)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Of processes whose caches lie in `folder`; made at its first use."""
    ours = folder / "gaws"
    if not ours.exists():
        seeded(ours)
    return {**os.environ, "GAWS_CACHE_DIR": str(ours), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
