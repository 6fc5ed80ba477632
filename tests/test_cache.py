"""The cache folder: where it is, whom it trusts, and how it is written."""

from __future__ import annotations

import os
import threading

import pytest

from gawscompile import cache
from gawscompile.codegen import build


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GAWS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_placed_by_the_variable_and_private(folder, monkeypatch, tmp_path):
    assert cache.root() == folder and folder.stat().st_mode & 0o777 == 0o700
    assert cache.folder("kernels").stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("GAWS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.root() == tmp_path / "xdg" / "gawscompile"


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_a_folder_that_others_can_write_is_refused(folder, mode):
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(cache.CacheError, match=r"writable by others.*chmod go-w"):
        cache.root()


def test_a_folder_of_someone_else_is_refused(folder, monkeypatch):
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(cache.CacheError, match="belongs to another user"):
        cache.root()


def test_a_folder_that_cannot_be_made_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GAWS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(cache.CacheError, match=r"cannot create the cache folder.*GAWS_CACHE_DIR"):
        cache.root()


def test_writes_are_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "entry"
    cache.write_atomic(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        cache.write_atomic(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["entry"] and path.read_text() == "old"


def test_digests_do_not_run_parts_together():
    assert cache.digest("ab", "c") != cache.digest("a", "bc") != cache.digest("abc")
    assert cache.digest("ab") == cache.digest(b"ab")


def test_equal_sources_share_one_build(folder, monkeypatch):
    runs = []
    real = build._build
    monkeypatch.setattr(build, "_build", lambda *a: (runs.append(a), real(*a))[1])
    source = 'extern "C" int answer() { return 4200; }'
    results = []
    threads = [threading.Thread(target=lambda: results.append(build.start(source).result())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == len(runs) == 1
    assert not [p for p in (folder / "kernels").iterdir() if p.name.startswith(".")]


def test_a_source_that_does_not_compile_says_where_it_lies(folder):
    with pytest.raises(build.BuildError, match=r"failed on .*\.cpp:\n.*no_such_type"):
        build.start("no_such_type x;").result()
    assert {p.suffix for p in (folder / "kernels").iterdir()} - {".h", ".gch", ".sha256"} == {".cpp"}
    assert not list((folder / "kernels").glob("*.so*"))
