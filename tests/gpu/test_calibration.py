"""The cost model's calibration on the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gawscompile import cli
from gawscompile.calibration import fit_gpu
from gawscompile.planning import devices
from tests.gpu.conftest import STAND_IN

SMALL = ("k=16 x=bf16; n=16 w=bf16 out=bf16", "k=16 x=bf16; n=16 w=bf16 out=bf16 lora(r=4 bf16 s=2.0)")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GAWS_CACHE_DIR", str(tmp_path))
    devices._gpu.cache_clear()
    yield
    devices._gpu.cache_clear()


def test_a_card_is_calibrated_and_planned_for_by_what_was_found(monkeypatch: pytest.MonkeyPatch):
    every, few = fit_gpu.plans_of, ["stream[4]", "single_launch[4]", "two_launch[8]"]
    monkeypatch.setattr(fit_gpu, "plans_of", lambda spec: [plan for plan in every(spec) if str(plan) in few])
    made = fit_gpu.calibrate(rounds=1, specs=SMALL, few=(1,), many=(1,))
    assert not made.failed and [sample.plan for sample in made.samples] == few
    assert all(sample.seconds > 0 for sample in made.samples)
    assert devices.of("cuda") == made.after and ":calibrated=" in made.after.name
    assert made.after.multiprocessors == made.before.multiprocessors
    assert "predictions are off by" in made.summary() and "single_launch" in made.summary()


def test_a_plan_that_fails_is_said(monkeypatch: pytest.MonkeyPatch):
    def fails(*_: object) -> float:
        raise RuntimeError("no image for this card")

    monkeypatch.setattr(fit_gpu, "time_plan", fails)
    with pytest.raises(ValueError, match=r"no plan could be timed on this GPU; the last: .*no image for this card"):
        fit_gpu.calibrate(rounds=1, specs=SMALL[:1], few=(1,), many=())


@pytest.mark.device_only
@pytest.mark.slow
def test_the_command(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["calibrate", "--device", "cuda"]) == 0
    printed = capsys.readouterr().out
    assert torch.cuda.get_device_name() in printed and "not timed" not in printed
    assert not STAND_IN
