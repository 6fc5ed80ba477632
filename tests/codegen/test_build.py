"""The headers that g++ reads once for all kernels, and what happens where it cannot."""

import ctypes
import subprocess

import pytest
from torch._inductor.cpp_builder import is_gcc

from gawscompile import cache
from gawscompile.codegen import build

pytestmark = pytest.mark.skipif(not is_gcc(), reason="only g++ is asked")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GAWS_CACHE_DIR", str(tmp_path / "cache"))
    build._headers.cache_clear()
    yield
    build._headers.cache_clear()


def library(number):
    """Builds a kernel that gives `number`, and loads it."""
    source = f'{build.HEADERS}\nextern "C" int number() {{ return std::array<int, 1>{{{number}}}[0]; }}\n'
    return ctypes.CDLL(str(build.start(source).result()))


def reads(tmp_path):
    """What g++ reads for a source that begins with the headers, by its own list (`-H`: `!` are read once for all)."""
    source = tmp_path / "kernel.cpp"
    source.write_text(build.HEADERS)
    options = ["-include", str(build._headers()), "-H", "-fsyntax-only"]
    done = subprocess.run([*build._command(source, tmp_path / "k.so"), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_headers_are_read_once_for_all_kernels(tmp_path):
    listed = reads(tmp_path)
    assert f"! {build._headers()}.gch" in listed and "xmmintrin.h" not in listed
    assert library(3).number() == 3


@pytest.mark.parametrize("harm", ["another g++'s", "cut off", "cleared away"])
def test_without_them_kernels_are_built_all_the_same(tmp_path, harm):
    header = build._headers()
    read = header.with_suffix(".h.gch")
    if harm == "cleared away":
        cache.clear()
    else:
        cache.put(read, b"gpch.014" + bytes(4096) if harm == "another g++'s" else read.read_bytes()[:4096])
    assert library(len(harm)).number() == len(harm)


def test_what_is_not_as_it_was_put_is_read_again(tmp_path):
    read = build._headers().with_suffix(".h.gch")
    read.write_bytes(read.read_bytes()[:4096])
    build._headers.cache_clear()
    assert f"! {read}" in reads(tmp_path)


def test_a_small_cache_is_left_to_kernels(monkeypatch):
    monkeypatch.setenv("GAWS_CACHE_MB", "255")
    assert build._headers() is None
    assert library(5).number() == 5 and not list(cache.folder("kernels").glob("*.gch"))
