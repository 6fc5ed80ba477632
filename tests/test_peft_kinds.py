"""Every configuration class that PEFT can put on a linear, on three types of models: answers are eager's, and each
linear has its place in the report. With ``GAWS_UPDATE_DOCS=1`` the table in ``docs/peft.md`` is written anew.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from gawscompile.ir.records import GraphRecord, Reason
from tests.graphs import rewriting, small_bert, small_llama, tokens
from tests.peft_kinds import VARIANTS, adapted, kinds, rows

PAGE = Path(__file__).parents[1] / "docs" / "peft.md"
MARK = "<!-- written by tests/test_peft_kinds.py -->\n"


def small_gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=128, n_positions=64, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


MODELS = {
    "Llama": (lambda: small_llama(layers=1, lora=None), ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]),
    "GPT-2": (small_gpt2, ["c_attn", "c_proj", "c_fc"]),
    "BERT": (lambda: small_bert(layers=1, lora=None), ["query", "value", "dense"]),
}
EVERY_DAY = ["ADALORA", "GRALORA", "HRA", "LOHA", "OFT", "VERA", "LORA bd", "LORA dora", "LORA lora_bias"]
"""Rows that run with the suite, on Llama; the others with ``-m slow``."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of one kind on one model, in words for the table."""

    outcome: str
    graphs: int = 0
    error: float = 0.0


def outcome(name: str, model_type: str, kernels: bool) -> Row:
    """Compile one row without Inductor and compare. What PEFT or eager refuses is told as such."""
    make, targets = MODELS[model_type]
    ids = tokens(1, 5)

    def call(model):
        with torch.no_grad():
            return model(ids, **({} if model_type == "BERT" else {"use_cache": False}))[0]

    try:
        model = adapted(name, make(), targets)
        want = call(model)
    except Exception as error:
        return Row(f"not in eager mode: {type(error).__name__}")
    torch._dynamo.reset()
    records: list[GraphRecord] = []
    got = call(torch.compile(model, backend=rewriting(records, kernels), dynamic=False))
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error <= 1e-4, f"{name} on {model_type}: off by {error:.2g}"
    entries = [entry for record in records for entry in record.linears]
    assert all(entry.status == "fused" or entry.reason in Reason.__members__ for entry in entries)
    wanted = sum(any(part.rpartition(".")[2] == t for t in targets) for part, m in model.named_modules() if _adapts(m))
    recovered = sum(bool(entry.adapters) or "diag" in entry.operators for entry in entries)
    hoisted = sum(bool(entry.hoisted) for entry in entries)
    left = Counter(entry.reason for entry in entries if entry.status != "fused")
    return Row(_words(min(recovered, wanted), wanted, hoisted, left, len(records)), len(records), error)


def _adapts(module: torch.nn.Module) -> bool:
    return hasattr(module, "base_layer")


def _words(recovered: int, wanted: int, hoisted: int, left: Counter, graphs: int) -> str:
    parts = []
    if recovered:
        parts.append(f"recovered ({recovered} of {wanted})")
    if hoisted:
        parts.append("hoisted")
    if not parts:
        parts.append("left to Inductor beside fused bases")
    parts += [f"{count} × {reason}" for reason, count in sorted(left.items())]
    return ", ".join(parts) + (f"; {graphs} graphs" if graphs > 1 else "")


@pytest.mark.parametrize("name", EVERY_DAY)
def test_everyday_kinds(name):
    row = outcome(name, "Llama", kernels=name == "VERA")
    assert not row.outcome.startswith("not"), row.outcome
    if name != "OFT":  # what they do to activations is no product of two thin matrices
        assert "recovered" in row.outcome or "hoisted" in row.outcome, row.outcome


def test_blocks_of_bd_lora_are_read_as_they_are():
    model = adapted("LORA bd", small_llama(layers=1, lora=None), ["q_proj", "v_proj", "o_proj", "down_proj"])
    records: list[GraphRecord] = []
    with torch.no_grad():
        torch.compile(model, backend=rewriting(records, False), dynamic=False)(tokens(1, 5), use_cache=False)
    found = {entry.path.rpartition(".")[2]: entry.operators for record in records for entry in record.linears}
    for name in ("q_proj", "v_proj", "o_proj", "down_proj"):
        assert "blockdiag(2 " in found[name], found


def test_rows_name_what_exists():
    assert set(EVERY_DAY) <= set(rows())
    assert {kind for kind, _ in VARIANTS.values()} <= set(kinds())
    assert len(kinds()) > 30


@pytest.mark.slow
def test_every_kind_on_every_model():
    table = {name: {model_type: outcome(name, model_type, kernels=True) for model_type in MODELS} for name in rows()}
    text = f"| kind | {' | '.join(MODELS)} |\n|{'---|' * (len(MODELS) + 1)}\n"
    for name, found in table.items():
        text += f"| {name} | {' | '.join(found[m].outcome for m in MODELS)} |\n"
    if os.environ.get("GAWS_UPDATE_DOCS") == "1":
        PAGE.write_text(PAGE.read_text().partition(MARK)[0] + MARK + text)
    assert text in PAGE.read_text(), "docs/peft.md says otherwise: GAWS_UPDATE_DOCS=1 writes it anew"
