"""Weights on huge pages: the memory of nobody but this process moves, and nothing about it changes."""

from __future__ import annotations

import mmap
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import gawscompile
from gawscompile.runtime import pages

MIB = 2**20


def collapses() -> bool:
    probe = torch.ones(8 * MIB // 4)
    return pages.enlarge([probe]).huge > 0


needs_pages = pytest.mark.skipif(not collapses(), reason="this system puts no memory on huge pages when asked")


def resident() -> int:
    return int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024


def on_huge_pages(tensor: torch.Tensor) -> int:
    """Bytes on huge pages of the mapping that holds a tensor."""
    found = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    for mapping in found:
        start, end = (int(side, 16) for side in mapping.split(" ")[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return int(re.findall(r"AnonHugePages:\s+(\d+)", mapping)[0]) * 1024
    raise AssertionError("a tensor in no mapping")


@needs_pages
def test_pages_grow_and_nothing_else_changes():
    weights = [torch.randn(1000, 1100) for _ in range(12)]
    before = [weight.clone() for weight in weights]
    addresses, memory = [weight.data_ptr() for weight in weights], resident()
    outcome = pages.enlarge(weights)
    grown = resident() - memory
    assert outcome.asked == 12 * 4_400_000
    if not outcome.huge and not collapses():
        pytest.skip("the system has no huge pages left")
    assert outcome.huge > outcome.asked / 2, outcome
    assert sum(on_huge_pages(weight) > 0 for weight in weights) > 6
    assert [weight.data_ptr() for weight in weights] == addresses and grown < MIB
    assert all(map(torch.equal, weights, before))
    weights[0].add_(1)
    assert torch.equal(weights[0], before[0] + 1)
    assert pages.enlarge(weights).huge == outcome.huge  # and once more does no harm


def test_a_block_that_the_system_refuses_holds_nobody_else_back(monkeypatch):
    weight, size = torch.ones(32 * MIB // 4), 2 * MIB
    refused = weight.data_ptr() // size * size + 4 * size

    def refuses(start: int, length: int) -> bool:
        return not start <= refused < start + length

    monkeypatch.setattr(pages, "_unavailable", str)
    monkeypatch.setattr(pages, "_page_size", lambda: size)
    monkeypatch.setattr(pages, "_ours", lambda block, size: True)
    monkeypatch.setattr(pages, "_madvise", refuses)
    outcome = pages.enlarge([weight])
    assert 28 * MIB <= outcome.huge <= 30 * MIB and "refused" in outcome.why


@needs_pages
def test_views_of_a_storage_count_once_and_others_are_passed_over():
    whole = torch.ones(16 * MIB // 4)
    others = [torch.ones(4, device="meta"), nn.Parameter(torch.ones(0))]
    assert pages.enlarge([whole, whole[100:], *others]).asked == 16 * MIB


def test_what_a_quantised_weight_wraps_is_found():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = nn.Sequential(nn.Linear(64, 32))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    inner = model[0].weight.qdata.untyped_storage()
    spans = pages._spans(model.parameters())
    assert (inner.data_ptr(), inner.data_ptr() + inner.nbytes()) in spans


def test_mapped_files_stay_mapped(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(16 * MIB))
    mapped = torch.from_file(str(file), shared=False, size=4 * MIB, dtype=torch.float32)
    mapped.sum()
    outcome = pages.enlarge([mapped])
    assert outcome.huge == 0 and outcome.why


def test_own_memory_copies_what_is_mapped_and_keeps_what_is_shared(tmp_path):
    file = tmp_path / "weights"
    torch.randn(1024 * 1024).numpy().tofile(file)
    mapped = torch.from_file(str(file), shared=False, size=1024 * 1024, dtype=torch.float32)
    model = nn.ModuleDict({"a": nn.Linear(1024, 512), "b": nn.Linear(512, 1024), "c": nn.Linear(8, 8)})
    model["a"].weight.data = mapped[: 512 * 1024].view(512, 1024)
    model["b"].weight.data = mapped[: 512 * 1024].view(512, 1024).t()
    parameters, before = list(model.parameters()), [p.detach().clone() for p in model.parameters()]
    strides, stays = [p.stride() for p in parameters], model["c"].weight.data_ptr()
    assert gawscompile.own_memory(model) == 4 * MIB
    assert list(map(id, model.parameters())) == list(map(id, parameters))
    assert [p.stride() for p in parameters] == strides
    assert all(map(torch.equal, parameters, before)) and model["c"].weight.data_ptr() == stays
    with torch.no_grad():
        model["a"].weight[3, 5] = 7
    assert model["b"].weight[5, 3] == 7 and mapped[3 * 1024 + 5] != 7
    assert gawscompile.own_memory(model) == 0


def test_untouched_memory_is_not_brought_in():
    anonymous = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    untouched = torch.frombuffer(anonymous, dtype=torch.float32)
    memory = resident()
    assert pages.enlarge([untouched]).huge < 4 * MIB and resident() - memory < 4 * MIB


def test_memory_that_a_fork_shares_stays_shared():
    weights = torch.ones(16 * MIB // 4)
    wait, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go)
        os.read(wait, 1)
        os._exit(0)
    try:
        assert pages.enlarge([weights]).huge == 0
    finally:
        os.close(go)
        os.close(wait)
        os.waitpid(child, 0)


@pytest.mark.parametrize("text, reason", [("always madvise [never]", "never"), (None, "none")])
def test_the_machines_own_setting_counts(text, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "SETTINGS", tmp_path)
    if text:
        (tmp_path / "enabled").write_text(text)
    outcome = pages.enlarge([torch.ones(16 * MIB // 4)])
    assert outcome.huge == 0 and reason in outcome.why


@needs_pages
def test_a_compile_does_it_unless_told_not_to():
    for wanted in (False, True):
        model = nn.Linear(1024, 4096)
        report = gawscompile.explain(model, torch.randn(1, 1024), options={"huge_pages": wanted})
        assert any("huge pages" in note for note in report.notes) == wanted
        assert on_huge_pages(model.weight) > 0 or not wanted
