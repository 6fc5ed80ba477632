"""The user's private cache folder: generated sources, compiled kernels, records of compiled graphs.

Placed by ``GAWS_CACHE_DIR``, by default ``~/.cache/gawscompile``. The folder runs code, so it must belong to the
user and be writable by nobody else; one that is not is refused. Every write is atomic (a temporary file in the same
folder, then a rename), every entry has its SHA-256 beside it, and one that does not match is made again. Any number of
processes may share the folder: locks let the first of them make an entry while the others wait for it. It holds at
most ``GAWS_CACHE_MB`` (default 1024) of entries; the longest unused go first.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import stat
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

ENTRIES = ("kernels", "records", "triton")
"""Subfolders of entries that can be made again. ``models`` lies beside them and is not counted."""

LOCKS = 64
SUM = ".sha256"


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


def check_writable() -> None:
    """Raises `CacheError` where nothing can be kept, before the work for it is done."""
    try:
        with tempfile.TemporaryFile(dir=root()):
            pass
    except OSError as error:
        raise CacheError(f"cannot write to the cache folder {root()}: {error}; set GAWS_CACHE_DIR") from error


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def folder(name: str) -> Path:
    """A subfolder of the cache, created at first use. Raises `CacheError`."""
    path = root() / name
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise CacheError(f"cannot create the cache folder {path}: {error}; set GAWS_CACHE_DIR") from error
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


def put(path: Path, content: str | bytes) -> None:
    """Make an entry: `content` with its checksum beside it."""
    raw = content.encode() if isinstance(content, str) else content
    _sum(path).unlink(missing_ok=True)  # a reader between the two writes finds no sum, and makes the entry anew
    write_atomic(path, raw)
    write_atomic(_sum(path), hashlib.sha256(raw).hexdigest())


def get(path: Path) -> bytes | None:
    """An entry's content as it was put, or None where it is missing, truncated or changed."""
    try:
        raw, expected = path.read_bytes(), _sum(path).read_text()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    if hashlib.sha256(raw).hexdigest() != expected:
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # used: not the next to go
    return raw


def _sum(path: Path) -> Path:
    return path.with_name(path.name + SUM)


@contextlib.contextmanager
def locked(key: str) -> Iterator[None]:
    """Hold the lock of an entry's key: one process makes it, others wait. A killed process leaves no lock behind."""
    with FileLock(folder("locks") / f"{int(key[:8], 16) % LOCKS:02d}"):
        yield


def limit_bytes() -> int:
    """The most that entries may take. Raises `CacheError` where ``GAWS_CACHE_MB`` is no number."""
    text = os.environ.get("GAWS_CACHE_MB", "1024")
    if not text.isdecimal() or len(text) > 12:
        raise CacheError(f"GAWS_CACHE_MB={text!r} is not a whole number of megabytes")
    return int(text) << 20


def trim(spare: Path | None = None) -> None:
    """Drop the longest unused entries until the rest fits four fifths of the limit, if the limit is passed.

    The entry `spare` stays: it was made just now, to be used.
    """
    found: dict[str, list[tuple[float, int, str]]] = defaultdict(list)
    for name in ENTRIES:
        with os.scandir(folder(name)) as entries:  # after each build: Path objects take longer
            for entry in entries:
                if spare is not None and entry.name.startswith(spare.stem):
                    continue
                with contextlib.suppress(OSError):
                    if not entry.is_dir():
                        key, info = entry.name.lstrip(".").partition(".")[0], entry.stat()
                        found[key].append((info.st_mtime, info.st_size, entry.path))
    total = sum(size for files in found.values() for _, size, _ in files)
    if total <= limit_bytes():
        return
    for files in sorted(found.values(), key=max):
        for _, size, path in files:
            Path(path).unlink(missing_ok=True)
            total -= size
        if total <= 0.8 * limit_bytes():
            break


def usage() -> dict[str, tuple[int, int]]:
    """(files, bytes) of every subfolder there is."""
    found = {}
    for path in sorted(root().iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
            found[path.name] = (len(sizes), sum(sizes))
    return found


def clear(models: bool = False) -> None:
    """Remove all entries, and with `models` the fetched models too. Raises `CacheError` for what cannot be removed."""
    for name in (*ENTRIES, *(["models"] if models else [])):
        _remove(root() / name)


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:  # never made, or another process removes it too
        shutil.rmtree(path, ignore_errors=True)
    except OSError as error:
        raise CacheError(f"cannot remove {path}: {error}; remove it by hand") from error


@functools.cache
def source_hash() -> str:
    """A hash of every source file of the package: passes, emitters, runtime. Any edit moves every key."""
    package = Path(__file__).parent
    files = sorted(
        path for where in (package, package / "passes") for path in where.rglob("*") if path.suffix in (".py", ".cpp")
    )
    parts: list[bytes] = []
    for path in dict.fromkeys(files):
        parts += [path.relative_to(package).as_posix().encode(), path.read_bytes()]
    return digest(*parts)
