"""Compiles generated C++ into shared libraries, once per source, in the user's cache, in the background.

Flags come from Inductor's own builder, so our kernels are built for the same instruction set as the code around
them. Builds run on a small thread pool while Inductor goes on compiling; whoever needs a library waits for it.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions, get_cpp_compiler, is_gcc
from torch._inductor.cpu_vec_isa import pick_vec_isa

from gawscompile import cache

log = logging.getLogger("gawscompile")


class CompilerMissing(RuntimeError):
    """There is no C++ compiler; the message says what to install."""


class BuildError(RuntimeError):
    """The C++ compiler refused a generated source; the message holds its output and where the source lies."""


@functools.cache
def compiler() -> str:
    """The C++ compiler's command. Raises `CompilerMissing` where there is none."""
    try:
        found = get_cpp_compiler()
    except Exception as error:
        raise CompilerMissing(_MISSING) from error
    if shutil.which(found) is None:
        raise CompilerMissing(_MISSING)
    return found


_MISSING = "no C++ compiler was found: install g++ or clang++ (Debian: apt-get install g++), or set CXX to one"


@functools.cache
def _flags() -> tuple[str, str]:
    """The compile command with placeholders for source and target, and the compiler's version line."""
    options = CppTorchOptions(vec_isa=pick_vec_isa(), warning_all=False)
    command = CppBuilder(name="gaws_target", sources="gaws_source.cpp", output_dir="", BuildOption=options)
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout.split("\n")[0]
    return command.get_command_line(), version


LINKS_TORCH = "`links torch`"
"""Stands in sources that call functions of torch's libraries. Other kernels are built sooner without them."""


def _command(source: Path, target: Path) -> list[str]:
    flags, text = _flags()[0], source.read_text(encoding="utf-8")
    words = shlex.split(flags)
    if LINKS_TORCH not in text and "CPU_CAPABILITY_AVX" in flags:  # on other machines vectors are ATen's
        words = [word for word in words if not word.startswith("-ltorch")]
    words[words.index("gaws_source.cpp")] = str(source)
    words[words.index("-o") + 1] = str(target)
    if target.suffix == ".gch":
        words[1:1] = ["-x", "c++-header"]
        words = [word for word in words if word != "-shared" and not word.startswith("-l")]  # nothing is linked
    return [*words, "-w"]


def fingerprint() -> str:
    """What besides the source decides a library: the command line (CPU features included), the compiler, and torch,
    whose headers say where a tensor's fields lie."""
    compiler()
    return "\n".join([torch.__version__, *_flags()])


def _compile(source: Path, target: Path, *options: str) -> None:
    """Compiles `source` and makes an entry of it. Raises `BuildError`."""
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}.", suffix=target.suffix)
    os.close(handle)
    try:
        command, *words = _command(source, Path(temporary))
        done = subprocess.run([command, *options, *words], capture_output=True, text=True)
        if done.returncode != 0:
            raise BuildError(f"{compiler()} failed on {source}:\n{done.stderr[-4000:]}")
        cache.put(target, Path(temporary).read_bytes())
    finally:
        Path(temporary).unlink(missing_ok=True)


HEADERS = (Path(__file__).parent / "headers.cpp").read_text(encoding="utf-8")
HEADERS_NEED = 256 << 20
"""Read once, headers take 41 MB of the cache. A small one has better uses for them."""

_reading = threading.Lock()
_known: Path | None = None
"""Where this process has found headers before."""


def _headers() -> Path | None:
    """A file of `HEADERS` beside which g++ finds them as it has read them before: reading them anew is half of a small
    kernel's build. None where that is not to be had, or while another thread is at it. It fails no build: what is in
    its way is logged.

    Only g++ is asked: it passes over what no longer fits (another g++, other flags), where clang stops. Without AVX
    headers are ATen's, which would take 117 MB.
    """
    global _known
    flags, version = _flags()
    unfit = not is_gcc() or "clang" in version.lower() or "CPU_CAPABILITY_AVX" not in flags
    if unfit or cache.limit_bytes() < HEADERS_NEED or not _reading.acquire(blocking=False):
        return None
    try:
        if _known is None or not _read(_known).exists():
            _known = cache.folder("kernels") / f"{cache.digest(HEADERS, fingerprint())}.h"
            with cache.locked(_known.stem):
                if not _read(_known).exists():
                    for left in _known.parent.glob(f".{_known.name}.*"):  # by a process that was killed
                        left.unlink(missing_ok=True)
                    cache.write_atomic(_known, HEADERS)
                    _compile(_known, _read(_known))
        os.utime(_read(_known))  # used: not the next to go
        return _known
    except (BuildError, OSError) as error:
        log.info("each kernel reads its headers anew: %s", error)
        return None
    finally:
        _reading.release()


def _read(headers: Path) -> Path:
    """What g++ has made of a file of headers, where it looks for it."""
    return headers.with_suffix(".h.gch")


def _compile_with(headers: Path | None, source: Path, target: Path) -> None:
    """As `_compile`. What is wrong with `headers` alone is made up for, and they are read again another time."""
    if headers is not None:
        try:
            return _compile(source, target, "-include", str(headers))
        except BuildError as error:
            if not any(word in str(error) for word in (headers.name, "PCH", "precompiled", "internal compiler error")):
                raise
            log.info("headers that were read before are of no use, and go: %s", error)
            _read(headers).unlink(missing_ok=True)
    _compile(source, target)


_pool: ThreadPoolExecutor | None = None
_pending: dict[str, Future[Path]] = {}
_lock = threading.Lock()


def _forget_pool() -> None:
    """After a fork the pool's threads are gone; a new one is made at need."""
    global _pool, _lock, _reading
    _pool, _lock, _reading = None, threading.Lock(), threading.Lock()
    _pending.clear()


os.register_at_fork(after_in_child=_forget_pool)


def start(source: str) -> Future[Path]:
    """Build `source`, or find it built: the future of the library's path. Equal sources share one build."""
    global _pool
    key = cache.digest(source, fingerprint())
    path = cache.folder("kernels") / f"{key}.so"
    with _lock:
        known = _pending.get(key)
        if known is None or (known.done() and (known.exception() is not None or not path.exists())):
            # one that failed may succeed now (a full disk), and one that was built may have been cleared away
            _pool = _pool or ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="gaws-build")
            _pending[key] = _pool.submit(_build, source, path)
        return _pending[key]


def load(source: str) -> ctypes.CDLL:
    """The library of `source`, built if need be and loaded."""
    path = start(source).result()
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # another process trimmed the cache between the two lines above
        return ctypes.CDLL(str(_build(source, path)))


def _build(source: str, path: Path) -> Path:
    if cache.get(path) is not None:
        return path
    headers = _headers()  # its lock may be this kernel's
    with cache.locked(path.stem):
        if cache.get(path) is not None:  # by the process that held the lock before
            return path
        with _lock:
            counters["gaws"]["built"] += 1
        text = path.with_suffix(".cpp")
        cache.write_atomic(text, source)
        _compile_with(headers, text, path)
    cache.trim(spare=path)
    return path
