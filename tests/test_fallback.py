"""Faults in code generation, compilers and the cache: a right answer or a clear error, and a clean next run."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import shutil
import tempfile

import pytest
import torch

from gawscompile import cache, explain
from gawscompile.cli import main
from gawscompile.codegen import build, cpp
from gawscompile.codegen import triton as triton_emitter
from gawscompile.ir.spec import KernelSpec

SIZES = itertools.count(40)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A cache of our own, and no graph from Inductor's."""
    monkeypatch.setenv("GAWS_CACHE_DIR", str(tmp_path / "cache"))
    build._pending.clear()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
    build._pending.clear()


@pytest.fixture
def model():
    """A linear of a size that no kernel of this process has had."""
    return torch.nn.Linear(32, next(SIZES)).eval()


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "gawscompile" and r.levelno >= logging.WARNING]


@torch.no_grad()
def right_answer(model, **options):
    torch._dynamo.reset()
    x = torch.randn(2, 32)
    torch.testing.assert_close(torch.compile(model, backend="gaws", options=options)(x), model(x))


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def read_only(*_, **__):
    raise OSError(errno.EROFS, "Read-only file system")


def broken_emitter(*_):
    raise KeyError("broken emitter")


INJECTED = {
    "emitter": (cpp, "emit", broken_emitter, "broken emitter"),
    "emitter writes nonsense": (cpp, "emit", lambda spec, *_: f"int main( // {spec}", "failed on"),
    "compiler refuses": (build, "_command", lambda *_: ["false"], "failed on"),
    "compiler vanished": (build, "_command", lambda *_: ["/no/such/compiler"], "no/such/compiler"),
    "disk full": (tempfile, "mkstemp", no_space, "No space left"),
    "disk full at the last step": (os, "replace", no_space, "No space left"),
    "read-only": (tempfile, "mkstemp", read_only, "Read-only"),
    "lock cannot be taken": (cache, "FileLock", read_only, "Read-only"),
}


@pytest.mark.parametrize("name", INJECTED)
def test_a_fault_costs_a_warning_and_no_answer(name, model, monkeypatch, caplog):
    where, attribute, replacement, says = INJECTED[name]
    with monkeypatch.context() as patch:
        patch.setattr(where, attribute, replacement)
        compiled_by = torch._inductor.config.patch(fx_graph_cache=False)
        # Inductor writes files too: only our own calls are broken
        if where in (os, tempfile):
            patch.undo()
            real = getattr(where, attribute)
            ours = str(cache.root())

            def selective(*args, **kwargs):
                if any(str(value).startswith(ours) for value in (*args, *kwargs.values())):
                    replacement()
                return real(*args, **kwargs)

            patch.setattr(where, attribute, selective)
        with compiled_by:
            right_answer(model)
    found = warnings(caplog)
    assert any(says in message and "left to Inductor" in message for message in found), found
    assert all("GAWS_STRICT=1" in message for message in found if "left to Inductor" in message)
    caplog.clear()
    right_answer(model, strict=True)
    assert not warnings(caplog)
    assert len(explain(model, torch.randn(2, 32)).fused) == 1
    assert not [path for path in cache.root().rglob(".*") if path.is_file()]


@pytest.mark.parametrize("name", ["emitter", "compiler refuses"])
def test_strict_raises(name, model, monkeypatch):
    where, attribute, replacement, says = INJECTED[name]
    monkeypatch.setattr(where, attribute, replacement)
    with pytest.raises(Exception, match=says):
        right_answer(model, strict=True)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def empty(path):
    path.write_bytes(b"")


def forget_sum(path):
    path.with_name(path.name + cache.SUM).unlink()


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, flip, empty, forget_sum, remove])
def test_a_damaged_kernel_is_built_again(damage):
    source = f'extern "C" int answer() {{ return {next(SIZES)}; }}'
    library = build.start(source).result()
    good = library.read_bytes()
    damage(library)
    build._pending.clear()
    assert build.start(source).result() == library
    assert cache.get(library) is not None and len(library.read_bytes()) == len(good)
    assert build.load(source).answer() > 0


def test_a_vanished_folder_comes_back(model, caplog):
    right_answer(model)
    shutil.rmtree(cache.root())
    right_answer(model)
    assert len(explain(model, torch.randn(2, 32)).fused) == 1
    assert not warnings(caplog)


def test_inductors_cpp_wrapper_is_left_alone(model, caplog):
    right_answer(model, cpp_wrapper=True)
    assert any("cpp_wrapper" in message and "left to Inductor" in message for message in warnings(caplog))
    torch._dynamo.reset()
    report = explain(model, torch.randn(2, 32), options={"cpp_wrapper": True})
    assert not report.fused and "cpp_wrapper is on" in str(report)


@pytest.mark.parametrize("damage", [truncate, flip, empty, forget_sum, remove])
def test_a_damaged_record_is_said_and_not_believed(damage):
    from gawscompile.ir.records import GraphRecord
    from gawscompile.observe.store import Store

    Store().compiled("k" * 32, GraphRecord("k" * 32, notes=["true"]))
    damage(cache.folder("records") / f"{'k' * 32}.json")
    record = Store().compiled("k" * 32, None)
    assert record.notes != ["true"] and "record is gone" in record.notes[0]


@pytest.mark.parametrize("damage", [truncate, flip, empty, forget_sum, remove])
def test_a_damaged_triton_module_is_written_again(damage):
    spec = KernelSpec.parse("k=16 x=f32; n=8 w=f32 out=f32 lora(r=2 f32 s=2.0)")
    triton_emitter.load.cache_clear()
    plan = triton_emitter.Plan("single_launch", 4)
    path = cache.folder("triton") / f"{triton_emitter.load(spec, plan).__name__}.py"
    text = path.read_text()
    damage(path)
    triton_emitter.load.cache_clear()
    assert hasattr(triton_emitter.load(spec, plan), "launch") and path.read_text() == text


def test_a_refused_folder_leaves_the_graph_to_inductor(model, caplog):
    folder = cache.root()
    folder.chmod(0o777)
    right_answer(model)
    assert any("writable by others" in message for message in warnings(caplog))
    folder.chmod(0o700)
    caplog.clear()
    right_answer(model)
    assert not warnings(caplog)


def test_the_cache_is_bounded_and_the_longest_unused_go_first(monkeypatch):
    monkeypatch.setenv("GAWS_CACHE_MB", "1")
    folder = cache.folder("kernels")
    for i in range(8):
        cache.put(folder / f"{i:032x}.so", bytes(200_000))
        os.utime(folder / f"{i:032x}.so", (i, i))
        os.utime(folder / f"{i:032x}.so.sha256", (i, i))
    assert cache.get(folder / f"{0:032x}.so")  # used now: the oldest no more
    cache.trim()
    left = sorted(path.name[:32] for path in folder.glob("*.so"))
    assert left == [f"{i:032x}" for i in (0, 5, 6, 7)]
    assert len(list(folder.iterdir())) == 2 * len(left)


def test_a_limit_that_is_no_number_is_said(monkeypatch):
    monkeypatch.setenv("GAWS_CACHE_MB", "plenty")
    with pytest.raises(cache.CacheError, match="GAWS_CACHE_MB='plenty'"):
        cache.limit_bytes()


def test_the_command_shows_and_clears(capsys):
    cache.put(cache.folder("kernels") / f"{1:032x}.so", bytes(3_000_000))
    (cache.folder("models") / "precious").write_text("x")
    assert main(["cache", "info"]) == 0
    out = capsys.readouterr().out
    assert str(cache.root()) in out and "at most 1024 MB" in out and "3.0 MB" in out
    assert main(["cache", "clear"]) == 0
    assert "3.0 MB removed" in capsys.readouterr().out
    assert not (cache.root() / "kernels").exists() and (cache.root() / "models" / "precious").exists()


def test_every_part_of_the_key_moves_it(monkeypatch):
    """torch and CPU features are in the compile command and Inductor's own key; ours cover the rest."""
    from gawscompile import backend
    from gawscompile.options import Options

    def key(options=Options()):  # noqa: B008
        return backend.GawsPass(options, "").uuid()

    keys = [key(), key(Options(verify=True))]
    flags = build._flags()
    for changed in ((flags[0] + " -mno-avx512f", flags[1]), (flags[0], "another compiler 1.0")):
        with monkeypatch.context() as patch:
            patch.setattr(build, "_flags", lambda changed=changed: changed)
            keys.append(key())
    for attribute in ("_torch_version", "_triton_version"):
        with monkeypatch.context() as patch:
            patch.setattr(backend, attribute, lambda: "9.9.9")
            keys.append(key())
    package = cache.Path(cache.__file__).parent
    for file in ("passes/lower.py", "codegen/cpp.py", "codegen/prelude.cpp", "runtime/dispatch.cpp", "options.py"):
        with monkeypatch.context() as patch:
            edited = package / file
            real = cache.Path.read_bytes
            patch.setattr(
                cache.Path, "read_bytes", lambda p, edited=edited, real=real: real(p) + b" " * (p == edited)
            )
            cache.source_hash.cache_clear()
            keys.append(key())
    cache.source_hash.cache_clear()
    assert len(set(keys)) == len(keys) and key() == keys[0]
