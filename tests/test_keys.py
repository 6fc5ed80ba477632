"""Cache keys: whatever decides what is compiled, or what is built, moves them; where a dump goes does not."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gawscompile import backend, cache
from gawscompile.codegen import build
from gawscompile.options import Options

OTHER: dict[str, Any] = {
    "strict": True,
    "verify": True,
    "autotune": True,
    "transparent": True,
    "disable": ("group_siblings",),
    "fuel": 3,
    "training": True,
}
"""Another value of every option that decides what is compiled."""


def uuid(*args: Any, **kwargs: Any) -> bytes:
    return backend.GawsPass(*args, **kwargs).uuid()


def test_every_option_moves_both_keys_but_where_a_dump_goes():
    names = {field.name for field in dataclasses.fields(Options)}
    outside = {"dump", "huge_pages", "executor", "watch", "bind"}
    assert names == OTHER.keys() | outside, "a new option: does it decide what is compiled?"
    changed = [Options(**{name: value}) for name, value in OTHER.items()]
    keys = [options.key(False) for options in (Options(), *changed)] + [Options().key(True)]
    assert len(set(keys)) == len(keys)
    other = Options(dump="here", huge_pages=False, executor=False, watch=False, bind=False)
    assert other.key(False) == Options().key(False)
    assert len({uuid(options, "") for options in (Options(), *changed)}) == 1 + len(changed)
    assert uuid(Options(), "", traced=True) != uuid(Options(), "")


@pytest.mark.parametrize("change", ["_torch_version", "_triton_version", "_device", "source_hash", "fingerprint"])
def test_torch_triton_the_machine_our_sources_and_the_compiler_move_the_key(change, monkeypatch):
    before = uuid(Options(), "")
    owner = {"source_hash": cache, "fingerprint": build}.get(change, backend)
    monkeypatch.setattr(owner, change, lambda *_: "another")
    assert uuid(Options(), "") != before


def test_which_inputs_are_stored_moves_the_key():
    assert uuid(Options(), "", stored=frozenset({1, 2})) != uuid(Options(), "", stored=frozenset({1}))


def record_key(
    function: Callable[..., Any] = torch.sin, x: Any = None, inductor: dict[str, Any] | None = None, ours: str = ""
) -> str:
    gm = torch.fx.symbolic_trace(lambda x: function(x))
    return backend._key(gm, [torch.zeros(4, 4) if x is None else x], ours, inductor or {}, "cpu")


def test_what_a_graph_is_compiled_for_moves_its_records_key():
    square = torch.zeros(4, 4)
    keys = [
        record_key(),
        record_key(torch.cos),
        record_key(ours="verify"),
        record_key(inductor={"max_autotune": True}),
        record_key(inductor={"max_autotune": False}),
        *(record_key(x=x) for x in (square[:3], square.double(), square[:, :3], square[::2], torch.ones(4, 8)[:, ::2])),
        record_key(x=torch.zeros(4, 4, requires_grad=True)),
        record_key(x=square.to("meta")),
        record_key(x=4),
    ]
    assert record_key() == keys[0]
    for mode in (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu"), _autocast_to_half):
        with mode():
            keys.append(record_key())
    assert [a == b for a, b in itertools.combinations(keys, 2)].count(True) == 0


def _autocast_to_half() -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.float16)


def test_a_librarys_key_moves_with_source_and_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("GAWS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_build", lambda source, path: path)
    first = build.start("int a;").result()
    assert build.start("int a;").result() == first != build.start("int b;").result()
    monkeypatch.setattr(build, "fingerprint", lambda: "another compiler")
    assert build.start("int a;").result() != first


def test_the_hash_of_our_sources_moves_with_each_kind_of_file(tmp_path, monkeypatch):
    (tmp_path / "codegen").mkdir()
    (tmp_path / "passes").mkdir()
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "cache.py"))
    hashes = [cache.source_hash.__wrapped__()]
    for name in ("backend.py", "codegen/prelude.cpp", "passes/lower.py"):
        (tmp_path / name).write_text("1")
        hashes.append(cache.source_hash.__wrapped__())
        (tmp_path / name).write_text("2")
        hashes.append(cache.source_hash.__wrapped__())
    assert len(set(hashes)) == len(hashes)
    (tmp_path / "notes.txt").write_text("no source")
    assert cache.source_hash.__wrapped__() == hashes[-1]
