"""Whoever generates with what torch.compile returned is told, once, that nothing of it is compiled."""

from __future__ import annotations

import logging

import pytest
import torch

import gawscompile
from gawscompile.serving import generation
from tests.graphs import small_llama, tokens

SHORT = {"max_new_tokens": 1, "pad_token_id": 0, "do_sample": False}


def said(model, caplog, **settings):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="gawscompile"):
        model.generate(input_ids=tokens(1, 3), **SHORT, **settings)
    return [record.getMessage() for record in caplog.records if "eager mode" in record.getMessage()]


@pytest.mark.parametrize("lora", [8, None])
def test_told_once_with_the_remedy(lora, caplog):
    model = torch.compile(small_llama(layers=1, lora=lora), backend="gaws")
    (message,) = said(model, caplog)
    assert "LlamaForCausalLM" in message and "gawscompile.compile(model)" in message
    assert said(model, caplog) == []


def test_not_told_where_there_is_nothing_to_tell(caplog):
    theirs = torch.compile(small_llama(layers=1), backend="eager")
    assert said(theirs, caplog) == []
    by_hand = small_llama(layers=1)
    inner = by_hand.get_base_model()
    inner.forward = torch.compile(inner.forward, backend="eager")
    assert said(torch.compile(by_hand, backend="gaws"), caplog) == []
    assert not hasattr(torch.compile(torch.nn.Linear(3, 3), backend="gaws"), "generate")


def test_told_although_the_same_model_is_compiled_elsewhere(caplog):
    model = small_llama(layers=1)
    serving = gawscompile.compile(model)
    generation._dispatched(model.get_base_model())  # as its first `generate` does
    (message,) = said(torch.compile(model, backend="gaws"), caplog)
    assert "LlamaForCausalLM" in message
    assert type(serving).generate is generation.CompiledModel.generate
