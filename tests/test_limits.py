"""Past torch's limit on recompiles the ninth adapter runs eager: said once, in our words, in the log and in explain."""

from __future__ import annotations

import logging

import peft
import pytest
import torch
from torch._inductor import compile_fx

import gawscompile
from gawscompile import explain
from gawscompile.runtime.recompile_limits import LIMITS
from tests.graphs import Pair, randomise, small_llama, tokens

IDS = tokens(1, 3)
LORA = {"target_modules": ["q_proj"], "r": 2}


@pytest.fixture(autouse=True)
def no_inductor(monkeypatch):
    """Graphs run as Dynamo traced them: limits are reached long before Inductor."""
    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, **_: gm.forward)


def llama(adapters: int) -> torch.nn.Module:
    model = small_llama(layers=1, lora=peft.LoraConfig(**LORA), hidden_size=32, intermediate_size=32)
    for number in range(1, adapters):
        model.add_adapter(f"a{number}", peft.LoraConfig(**LORA))
    return randomise(model)


def switch(model, compiled) -> None:
    """Every adapter of the model for one call; each answer is eager's."""
    with torch.no_grad():
        for name in list(model.peft_config):
            model.set_adapter(name)
            wanted = model(IDS, use_cache=False).logits
            torch.testing.assert_close(compiled(IDS, use_cache=False).logits, wanted, rtol=1e-4, atol=1e-4)


def said(caplog) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.name == "gawscompile" and one.levelno == logging.WARNING]


@pytest.mark.parametrize(
    ("compile_", "adapters", "limit"),
    [
        (lambda model: torch.compile(model, backend="gaws"), 12, 8),
        pytest.param(gawscompile.compile, 6, 3, marks=pytest.mark.slow),
    ],
    ids=["torch.compile", "gawscompile.compile"],
)
def test_adapters_past_the_limit_are_told_once(caplog, compile_, adapters, limit):
    model = llama(adapters)
    assert torch._dynamo.config.recompile_limit == 8
    with torch._dynamo.config.patch(recompile_limit=limit):
        switch(model, compiled := compile_(model))
        switch(model, compiled)
        (message,) = said(caplog)
    wanted = (
        "forward",
        f"recompile_limit = {limit}",
        "run eager",
        "torch._dynamo.config.recompile_limit higher",
        "fewer",
    )
    assert all(part in message for part in wanted), message

    report = explain(model, IDS, use_cache=False)
    (trouble,) = [one for one in report.to_dict()["troubles"] if one["kind"] == "recompile limit"]
    assert trouble["cause"] in message and trouble["remedy"] in message
    assert "1 recompile limit" in report.verdict() and trouble["remedy"] in report.verdict()
    assert trouble["remedy"] in str(report) and "recompile limit" in report.to_html()

    torch._dynamo.reset()
    assert not any(one.kind == "recompile limit" for one in explain(Pair().eval(), torch.randn(1, 3, 32)).troubles)


def test_functions_of_other_backends_are_not_spoken_of(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch"), "propagate", True)  # pytest before 9.2 reads the root logger alone

    def function(x, number):
        return x * number

    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        torch.compile(Pair().eval(), backend="gaws")(torch.randn(1, 3, 32))
        for number in range(5):
            torch.compile(function, backend="eager", dynamic=False)(torch.ones(2), float(number))
        torch._dynamo.reset()
        for number in range(5):  # torch numbers this one as it numbered ours before
            torch.compile(function, backend="eager", dynamic=False)(torch.ones(2), float(number))
    assert "hit config.recompile_limit" in caplog.text and not said(caplog) and not LIMITS.hits
