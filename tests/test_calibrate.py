"""calibration/fit_cpu.py: constants are recovered from times that they make, kept, named in keys, and distrusted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from gawscompile import cache, cli
from gawscompile.calibration import fit_cpu
from gawscompile.calibration.fit_cpu import Sample
from gawscompile.planning import cost, devices
from gawscompile.planning.targets import CPP


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GAWS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def times(device: devices.Device, noise: float = 0.0) -> list[Sample]:
    """What the cost model says that projections take on `device`."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for dtype in ("f32", "bf16"):
        for plan in CPP.kinds:
            for shape in fit_cpu.SHAPES:
                for tokens in fit_cpu.TOKENS:
                    sample = Sample(dtype, plan, shape, tokens, 0.0)
                    seconds = cost.plan(sample.spec, device).seconds(plan, tokens)
                    factor = 1 + noise * float(torch.randn((), generator=generator))
                    found.append(dataclasses.replace(sample, seconds=seconds * factor))
    return found


def another_machine() -> devices.Device:
    default = devices.default_cpu()
    return dataclasses.replace(
        default,
        bandwidth=33e9,
        launch=7e-6,
        library_launch=20e-6,
        kernel_rate={"f32": 210e9, "bf16": 555e9, "f16": default.kernel_rate["f16"]},
        library_rate={"f32": 190e9, "bf16": 900e9, "f16": default.library_rate["f16"]},
        library_bandwidth={"f32": 21e9, "bf16": 9e9, "f16": default.library_bandwidth["f16"]},
    )


@pytest.mark.parametrize(("noise", "off"), [(0.0, 1e-3), (0.03, 0.15)])
def test_constants_are_recovered(noise: float, off: float):
    wanted = another_machine()
    found = fit_cpu.fitted(devices.default_cpu(), times(wanted, noise))
    for _, _, (got, want) in fit_cpu._constants(found, wanted):
        if want > 1e-4:  # a few microseconds drown in the noise
            assert got == pytest.approx(want, rel=off)
    assert found.kernel_rate["f16"] == devices.default_cpu().kernel_rate["f16"]


def test_what_the_times_do_not_show_keeps_its_default():
    default = devices.default_cpu()
    flat = [dataclasses.replace(sample, seconds=1e-3) for sample in times(default)]
    found = fit_cpu.fitted(default, flat)
    assert found.launch == pytest.approx(1e-3) and found.bandwidth == default.bandwidth
    assert found.kernel_rate["f32"] == default.kernel_rate["f32"]


def test_a_calibration_is_kept_used_and_moves_the_keys():
    default = devices.cpu()
    assert default == devices.default_cpu()
    made = fit_cpu.calibrate(rounds=1, shapes=[(64, 32), (32, 96)], tokens=(1, 8), cold=1 << 14)
    assert devices.cpu() == made.after and made.after.name.startswith(f"{default.name}:calibrated=")
    assert len(made.samples) == 16 and all(sample.seconds > 0 for sample in made.samples)
    for text in ("bandwidth, GB/s", "gemv_cpp, bf16", "16 timings"):
        assert text in made.summary()
    devices._stored.cache_clear()
    assert devices.cpu() == made.after, "another process reads the same"
    other = devices.store(dataclasses.replace(default, bandwidth=1e9))
    assert other.name != made.after.name
    spec = Sample("f32", "gemv_cpp", (64, 32), 1, 0.0).spec
    assert cost.plan(spec).costs != cost.plan(spec, default).costs


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"bandwidth": 5.0', '"bandwidth": -5.0'),
        lambda text: text.replace('"bandwidth": 5.0', '"bandwidth": NaN'),
        lambda text: text.replace('"launch"', '"lunch"'),
        lambda text: text.replace('"kernel_rate"', '"colonel_rate"'),
    ],
)
def test_a_damaged_calibration_is_said_and_not_used(damage, folder: Path, caplog: pytest.LogCaptureFixture):
    default = devices.default_cpu()
    devices.store(dataclasses.replace(default, bandwidth=5.0))
    path = folder / devices.CALIBRATIONS
    path.write_text(damage(path.read_text()))
    devices._stored.cache_clear()
    assert devices.cpu() == default
    assert "is no calibration" in caplog.text and "gawscompile calibrate" in caplog.text


def test_two_machines_share_a_folder(folder: Path):
    default = devices.default_cpu()
    devices.store(dataclasses.replace(default, name="cpu:another", bandwidth=1e9))
    assert devices.cpu() == default
    mine = devices.store(dataclasses.replace(default, bandwidth=2e9))
    assert devices.cpu() == mine and len(json.loads((folder / devices.CALIBRATIONS).read_text())) == 2


def test_a_folder_that_is_refused_leaves_the_defaults(monkeypatch: pytest.MonkeyPatch):
    def refuse() -> Path:
        raise cache.CacheError("not yours")

    monkeypatch.setattr(cache, "root", refuse)
    assert devices.cpu() == devices.default_cpu()


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    made = fit_cpu.Calibration(devices.default_cpu(), another_machine(), tuple(times(another_machine())))
    monkeypatch.setattr(fit_cpu, "calibrate", lambda: made)
    assert cli.main(["calibrate"]) == 0
    printed = capsys.readouterr().out
    assert "fitted" in printed and "gemm_accumulate, f32" in printed and "1.00" in printed
    assert cli.main(["calibrate", "--threads", "0"]) == 2
