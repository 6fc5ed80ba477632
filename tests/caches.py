"""Caches of their own for processes that tests start: empty, but for the op and the headers of kernels.

No test is about what their builds take, of which the op's is the longest of all: both come from this process's cache.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from gawscompile.codegen import build
from gawscompile.runtime import ops


def seeded(folder: Path) -> Path:
    """`folder` as a cache of ours that holds the op and headers, and nothing else."""
    made = [build.start(ops._op_source()).result(), build._headers()]
    (kernels := folder / "kernels").mkdir(mode=0o700, parents=True)
    folder.chmod(0o700)
    for path in filter(None, made):
        for part in path.parent.glob(f"{path.stem}*"):
            shutil.copy(part, kernels)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Of processes whose caches lie in `folder`; made at its first use."""
    ours = folder / "gaws"
    if not ours.exists():
        seeded(ours)
    return {**os.environ, "GAWS_CACHE_DIR": str(ours), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
