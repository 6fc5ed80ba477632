"""The headers that g++ reads once for all kernels, and what happens where it cannot."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from gawscompile import cache
from gawscompile.codegen import build

FLAGS, VERSION = build._flags()
pytestmark = pytest.mark.skipif(
    "g++" not in VERSION or "CPU_CAPABILITY_AVX" not in FLAGS, reason="g++ alone is asked, for vectors of our own"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds headers and nothing else."""
    folder = tmp_path_factory.mktemp("made") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GAWS_CACHE_DIR", str(folder))
        patch.setattr(build, "_known", None)
        assert build._headers() is not None
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAWS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_known", None)


@pytest.fixture
def headers(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "cache")
    found = build._headers()
    assert found is not None and found.is_relative_to(tmp_path)
    return found


def source(number: int) -> str:
    return f'{build.HEADERS}\nextern "C" int number() {{ return std::array<int, 1>{{{number}}}[0]; }}\n'


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The options of every g++ that is run."""
    found, real = [], build._compile

    def compile(source: Path, target: Path, *options: str) -> None:
        found.append(options)
        real(source, target, *options)

    monkeypatch.setattr(build, "_compile", compile)
    return found


def right(number: int) -> bool:
    return ctypes.CDLL(str(build.start(source(number)).result())).number() == number


def test_headers_are_read_once_for_all_kernels(headers, tmp_path, builds):
    """By g++'s own list of what it reads (`-H`), in which those of before have a `!`."""
    (tmp_path / "kernel.cpp").write_text(build.HEADERS)
    command = build._command(tmp_path / "kernel.cpp", tmp_path / "kernel.so")
    listed = subprocess.run(
        [*command, "-include", str(headers), "-H", "-fsyntax-only"], capture_output=True, text=True, check=True
    ).stderr
    assert f"! {headers}.gch" in listed and "xmmintrin.h" not in listed
    assert right(3) and right(4) and builds == [("-include", str(headers))] * 2


@pytest.mark.parametrize("harm", ["cut off", pytest.param("spoilt", marks=pytest.mark.slow)])
def test_harm_to_them_is_made_up_for(headers, builds, harm, caplog):
    caplog.set_level("INFO", "gawscompile")
    whole = (read := build._read(headers)).read_bytes()
    read.write_bytes(whole[:4096] if harm == "cut off" else whole[:20_000_000] + bytes(len(whole) - 20_000_000))
    assert right(1) and builds == [("-include", str(headers)), ()] and "are of no use" in caplog.text
    assert right(2) and builds[2:] == [(), ("-include", str(headers))]  # read again, and used


def test_others_are_passed_over(headers, builds):
    """As another g++ has written them."""
    build._read(headers).write_bytes(b"gpch+000" + bytes(4096))
    assert right(3) and builds == [("-include", str(headers))]


def test_cleared_away_they_are_read_again(headers, builds):
    cache.clear()
    assert right(3) and builds == [(), ("-include", str(headers))]


def test_a_source_that_is_wrong_is_compiled_once(headers, builds):
    with pytest.raises(build.BuildError, match="no_such_type"):
        build.start("no_such_type x;").result()
    assert builds == [("-include", str(headers))]


def test_what_a_killed_process_leaves_goes(headers):
    build._read(headers).unlink()
    (left := headers.with_name(f".{headers.name}.abc.gch")).write_bytes(bytes(10))
    assert build._headers() == headers and not left.exists()


def test_a_kernel_waits_for_no_other_thread_that_reads_them(headers, builds):
    with build._reading:
        assert right(5) and builds == [()]


def test_a_disk_that_is_full_of_them_fails_no_build(monkeypatch, builds, caplog):
    caplog.set_level("INFO", "gawscompile")
    real = cache.put

    def put(path, content):
        if path.suffix == ".gch":
            raise OSError(28, os.strerror(28))
        real(path, content)

    monkeypatch.setattr(cache, "put", put)
    assert right(6) and builds == [(), ()] and "reads its headers anew" in caplog.text


def test_a_small_cache_is_left_to_kernels(monkeypatch, builds):
    monkeypatch.setenv("GAWS_CACHE_MB", "255")
    assert right(7) and builds == [()] and not list(cache.folder("kernels").glob("*.gch"))


def test_after_a_fork_they_can_be_asked_for(headers):
    with build._reading:  # by a thread that the child does not have
        child = os.fork()
        if child == 0:
            os._exit(0 if build._headers() == headers else 1)
    ended: list[int] = []
    waiting = threading.Thread(target=lambda: ended.append(os.waitpid(child, 0)[1]))
    waiting.start()
    waiting.join(60)
    assert ended == [0]
