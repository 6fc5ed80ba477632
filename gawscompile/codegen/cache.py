"""The user's private cache folder: generated sources, compiled kernels, records of compiled graphs.

Placed by ``GAWS_CACHE_DIR``, by default ``~/.cache/gawscompile``. The folder runs code, so it must belong to the
user and be writable by nobody else; one that is not is refused. Every write is atomic (a temporary file in the
same folder, then a rename), so any number of processes may share it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import tempfile
from pathlib import Path


class CacheError(RuntimeError):
    """The cache folder cannot be used; the message says why and what to do."""


def root() -> Path:
    """The cache folder, created with mode 0700 at first use.

    Raises `CacheError` where it belongs to someone else, is writable by others, or cannot be created.
    """
    named = os.environ.get("GAWS_CACHE_DIR")
    base = Path(named).expanduser() if named else _user_cache() / "gawscompile"
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = base.stat()
    except OSError as error:
        raise CacheError(f"cannot create the cache folder {base}: {error}; set GAWS_CACHE_DIR") from error
    if hasattr(os, "getuid") and info.st_uid != os.getuid():
        raise CacheError(f"the cache folder {base} belongs to another user (uid {info.st_uid}); set GAWS_CACHE_DIR")
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CacheError(f"the cache folder {base} is writable by others and will not be trusted; chmod go-w {base}")
    return base


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def folder(name: str) -> Path:
    """A subfolder of the cache, created at first use."""
    path = root() / name
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def digest(*parts: str | bytes) -> str:
    """A 32-digit hex key of `parts`; no two lists of parts share their bytes by concatenation."""
    state = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        state.update(len(raw).to_bytes(8, "little"))
        state.update(raw)
    return state.hexdigest()[:32]


def write_atomic(path: Path, content: str | bytes) -> None:
    """Put `content` at `path` so that a reader sees either the old file or all of the new one."""
    raw = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@functools.cache
def source_hash() -> str:
    """A hash of every source file of the package: passes, emitters, runtime. Any edit moves every key."""
    package = Path(__file__).parent.parent
    files = sorted(
        path for where in (package, package / "passes") for path in where.rglob("*") if path.suffix in (".py", ".cpp")
    )
    parts: list[bytes] = []
    for path in dict.fromkeys(files):
        parts += [path.relative_to(package).as_posix().encode(), path.read_bytes()]
    return digest(*parts)
