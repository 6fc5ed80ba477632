"""Real weights: SmolLM2 with a LoRA on every linear writes eager PEFT's text, with either cache, parameters live."""

from __future__ import annotations

import pytest
import torch

from gawscompile.calibration import measure
from gawscompile.debug.explain import assemble
from gawscompile.demo.decoding import Decoder
from gawscompile.observe.store import RECORDS

pytestmark = pytest.mark.slow

TOKENS = 64
OPTIONS = {"strict": True, "verify": True}
QUESTION = "Tell me about the sea."


@pytest.fixture(scope="module", params=[10, 30])
def adapted(smollm2_dir, request):
    """The model, or its first layers, with a random LoRA (r = 16, all linears) that changes what it says."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {"dtype": torch.float32, "num_hidden_layers": request.param}
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, **settings).eval()
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).eval()
    change_adapters(model, 0)
    return model


def change_adapters(model, seed):
    """Every B gets new numbers through ``.data``, which no version counter sees."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


@pytest.fixture(scope="module")
def prompt(smollm2_dir):
    from transformers import AutoTokenizer

    from gawscompile.demo import persona

    return persona.prompt_ids(AutoTokenizer.from_pretrained(smollm2_dir), QUESTION)


@torch.no_grad()
def generate(model, prompt, cache):
    ids = torch.tensor([prompt])
    settings = {"cache_implementation": "static"} if cache == "static" else {}
    settings |= {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return out[0, len(prompt) :].tolist()


def test_static_cache_every_linear_fused_and_live(adapted, prompt):
    eager = Decoder(adapted, adapted, len(prompt) + TOKENS)
    ours = Decoder(adapted, torch.compile(adapted, backend="gaws", options=OPTIONS), len(prompt) + TOKENS)
    mark = len(RECORDS)
    text = ours.greedy(prompt, TOKENS)
    report = assemble(RECORDS.since(mark), adapted)
    assert len(text) == TOKENS and text == eager.greedy(prompt, TOKENS)

    config = adapted.config
    layers = config.num_hidden_layers
    fused = [entry for entry in report.fused if entry.adapters]
    assert layers in (10, 30) and len(fused) == 7 * layers
    groups = [group for group in report.groups if not group.members[0].endswith("lm_head")]
    assert len(groups) == 4 * layers
    head = config.hidden_size // config.num_attention_heads
    widths = [config.num_attention_heads * head] + [config.num_key_value_heads * head] * 2
    qkv = [group for group in groups if len(group.members) == 3]
    assert len(qkv) == layers
    by_path = {entry.path: entry for entry in report.linears}
    assert all([by_path[path].shape[0] for path in group.members] == widths for group in qkv)

    graphs = measure.graphs_compiled()
    change_adapters(adapted, 1)
    changed = ours.greedy(prompt, TOKENS)
    assert changed != text and changed == eager.greedy(prompt, TOKENS)
    assert measure.graphs_compiled() == graphs


def test_generate_with_dynamic_cache(adapted, prompt):
    change_adapters(adapted, 0)
    wanted = generate(adapted, prompt, "dynamic")
    original = adapted.base_model.model.forward
    adapted.base_model.model.forward = torch.compile(original, backend="gaws", options={"strict": True})
    try:
        assert generate(adapted, prompt, "dynamic") == wanted
        graphs = measure.graphs_compiled()
        change_adapters(adapted, 2)
        changed = generate(adapted, prompt, "dynamic")
        assert measure.graphs_compiled() == graphs
    finally:
        adapted.base_model.model.forward = original
    assert changed != wanted and changed == generate(adapted, prompt, "dynamic")


def test_two_hundred_steps_of_the_demo_end_where_eager_ends(smollm2_dir):
    """The demo's adapter, trained through the backend layer by layer: eager's loss, and the same answer at the end."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gawscompile.demo import persona

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    losses, answers = {}, {}
    question, expected = persona.pairs()[0]
    for backend in ("eager", "gaws"):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).requires_grad_(False)
        model = persona.attach_lora(base)
        before = persona.loss_on(model, tokenizer, persona.pairs())
        mark = len(RECORDS)
        persona.train(model, tokenizer, 200, progress=False, backend=backend)
        losses[backend] = persona.loss_on(model, tokenizer, persona.pairs())
        assert losses[backend] < before / 10
        answers[backend] = generate(model, persona.prompt_ids(tokenizer, question), "dynamic")
    linears = [entry for record in RECORDS.since(mark) for entry in record.linears if entry.adapters]
    assert sum(entry.status == "fused" for entry in linears) >= 7
    assert abs(losses["gaws"] - losses["eager"]) < 0.1 * losses["eager"]
    assert answers["gaws"] == answers["eager"]
    assert expected.startswith(tokenizer.decode(answers["gaws"][:16], skip_special_tokens=True))
