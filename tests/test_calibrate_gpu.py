"""calibration/fit_gpu.py: constants of a card are recovered from times that they make; cards are told apart."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gawscompile import cli
from gawscompile.calibration import fit_gpu
from gawscompile.calibration.fit_gpu import Sample
from gawscompile.codegen import triton
from gawscompile.ir.spec import KernelSpec
from gawscompile.planning import cost, devices, gpu_cost
from gawscompile.planning.devices import GPUS, Gpu


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GAWS_CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    devices._gpu.cache_clear()


def times(gpu: Gpu) -> list[Sample]:
    """What the cost model says that the calibration's groups take on `gpu`."""
    return [
        Sample(text, str(plan), tokens, float(gpu_cost.seconds(KernelSpec.parse(text), plan, gpu, tokens)))
        for text in fit_gpu.SPECS
        for plan in fit_gpu.plans_of(KernelSpec.parse(text))
        for tokens in (fit_gpu.FEW if plan.rows else fit_gpu.MANY)
    ]


ANOTHER = dataclasses.replace(
    GPUS["H100"], bandwidth=2.6e12, launch=1.1e-6, publish=2.5e-6, latency=1.3e-6, tensor_share=0.6, library_share=0.5
)


def test_constants_are_recovered():
    samples = times(ANOTHER)
    made = fit_gpu.Calibration(GPUS["H100"], fit_gpu.fitted(GPUS["H100"], samples, 2.5e12), tuple(samples))
    for plan in ("stream", "single_launch", "two_launch", "redundant_shrink", "fused_tile", "gemm_accumulate"):
        assert made.error(made.after, plan) < 1.03 < made.error(made.before, plan), plan
    for name in ("bandwidth", "launch", "tensor_share"):
        assert getattr(made.after, name) == pytest.approx(getattr(ANOTHER, name), rel=0.1), name
    bandwidth = f"{made.after.bandwidth / 1e9:.2f}"
    for text in ("bandwidth, GB/s", bandwidth, "library_share, of 1", f"{len(samples)} timings"):
        assert text in made.summary()


def test_what_no_time_shows_stays_where_it_was():
    default = GPUS["A100"]
    bare = [sample for sample in times(default) if sample.plan.startswith("stream")]
    found = fit_gpu.fitted(default, [dataclasses.replace(s, seconds=1.5 * s.seconds) for s in bare])
    assert found.bandwidth < default.bandwidth
    for name in ("publish", "tensor_share", "tile_share", "library_share", "matrix_rate", "multiprocessors"):
        assert getattr(found, name) == getattr(default, name)


def test_numbers_and_expressions_are_one_model():
    for sample in times(ANOTHER):
        planned = cost.plan(KernelSpec.parse(sample.spec), ANOTHER)
        assert planned.seconds(sample.plan, sample.tokens) == pytest.approx(sample.seconds)


def card(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], multiprocessors: int) -> None:
    known = SimpleNamespace(multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: known)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    devices._gpu.cache_clear()


@pytest.mark.parametrize(
    ("name", "capability", "like"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), "H100"),
        ("NVIDIA H200", (9, 0), "H200"),
        ("NVIDIA A100-SXM4-40GB", (8, 0), "A100"),
        ("NVIDIA L40S", (8, 9), "A100"),
        ("NVIDIA GeForce RTX 5090", (12, 0), "B200"),
    ],
)
def test_a_card_is_known_by_its_name_or_by_the_nearest(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], like: str
):
    card(monkeypatch, name, capability, 77)
    assert devices.of("cuda") == dataclasses.replace(GPUS[like], name=name, multiprocessors=77)


def test_a_calibration_is_kept_for_its_card_alone(monkeypatch: pytest.MonkeyPatch, folder: Path):
    card(monkeypatch, "NVIDIA H100 PCIe", (9, 0), 114)
    default = devices.of("cuda")
    cpu = devices.cpu()
    made = devices.store(dataclasses.replace(default, bandwidth=1.6e12))
    assert devices.of("cuda") == made != default and made.name.startswith("NVIDIA H100 PCIe:calibrated=")
    assert devices.cpu() == cpu and list(json.loads((folder / devices.GPU_CALIBRATIONS).read_text())) == [default.name]
    card(monkeypatch, "NVIDIA H100 80GB HBM3", (9, 0), 132)
    assert devices.of("cuda").bandwidth == GPUS["H100"].bandwidth


@pytest.mark.parametrize(
    "damage", [lambda t: t[:40], lambda t: t.replace("1.6e12", "0").replace("1600000000000.0", "0.0")]
)
def test_a_damaged_calibration_is_said_and_not_used(
    damage, monkeypatch: pytest.MonkeyPatch, folder: Path, caplog: pytest.LogCaptureFixture
):
    card(monkeypatch, "NVIDIA H100 PCIe", (9, 0), 114)
    default = devices.of("cuda")
    devices.store(dataclasses.replace(default, bandwidth=1.6e12))
    path = folder / devices.GPU_CALIBRATIONS
    path.write_text(damage(path.read_text()))
    devices._stored.cache_clear()
    devices._gpu.cache_clear()
    assert devices.of("cuda") == default and "is no calibration" in caplog.text


def test_every_timed_plan_is_one_that_the_table_may_choose():
    for text in fit_gpu.SPECS:
        spec = KernelSpec.parse(text)
        assert set(fit_gpu.plans_of(spec)) < set(triton.plans(spec))
        names = {plan.name for plan in fit_gpu.plans_of(spec)}
        assert names == {plan.name for plan in triton.plans(spec)}


def test_the_command_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["calibrate", "--device", "cuda"]) == 2
    assert "--device cuda: torch sees no GPU here" in capsys.readouterr().err


def test_the_command_with_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    failed = ("stream[4], 1 tokens: out of memory",)
    made = fit_gpu.Calibration(GPUS["H100"], ANOTHER, tuple(times(ANOTHER)), failed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fit_gpu, "calibrate", lambda: made)
    assert cli.main(["calibrate", "--device", "cuda"]) == 0
    printed = capsys.readouterr().out
    assert "publish, µs" in printed and "not timed: stream[4], 1 tokens: out of memory" in printed
