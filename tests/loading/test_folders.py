"""Folders of models that are no decoders: loaded, called with inputs that they take, and explained."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from gawscompile import cli
from gawscompile.loading import folders
from tests.graphs import randomise
from tests.test_cli import one_line_of


def save(kind: str, folder: Path) -> Path:
    import transformers as t

    wide = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    seeing = {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
        t.T5ForConditionalGeneration(t.T5Config(**sizes, decoder_start_token_id=0)).save_pretrained(folder)
    elif kind == "vit":
        t.ViTForImageClassification(t.ViTConfig(**wide, **seeing)).save_pretrained(folder)
    else:
        text, vision = {**wide, "vocab_size": 64, "eos_token_id": 0, "max_position_embeddings": 16}, {**wide, **seeing}
        t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        pytest.param("t5", "encoder decoder", marks=pytest.mark.slow),
        pytest.param("vit", "vit", marks=pytest.mark.slow),
        pytest.param("clip", "text vision", marks=pytest.mark.slow),
    ],
)
def test_encoder_decoders_and_models_that_see(kind, parts, tmp_path, capsys):
    """What explain calls is the whole model, with inputs that it takes, and an adapter on every linear."""
    folder = save(kind, tmp_path / kind)
    model = folders.load(folder, adapter="lora", rank=4)
    inputs = folders.example(model, 3)
    with torch.no_grad():
        wanted = model(**inputs)
    text, image = inputs.get("input_ids"), inputs.get("pixel_values")
    assert (text is not None and text.shape == (1, 3)) == (kind != "vit")
    assert (image is not None and image.shape == (1, 3, 16, 16)) == (kind != "t5") and wanted is not None
    assert cli.main(["explain", "--model", str(folder), "--rank", "4", "--tokens", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    adapted = [linear for linear in report["linears"] if linear["adapters"]]
    assert adapted and all(linear["status"] == "fused" for linear in adapted)
    assert all(any(part in linear["path"] for linear in adapted) for part in parts.split())
    if kind == "clip":
        assert cli.main(["explain", "--model", str(folder), "--tokens", "17"]) == 2
        one_line_of(capsys, "--tokens 17: this model takes at most 16")


def test_an_adapter_brings_the_head_that_it_was_trained_with(tmp_path):
    import transformers as t

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    t.BertModel(t.BertConfig(**sizes, vocab_size=64)).save_pretrained(tmp_path / "bert")
    model = t.BertForSequenceClassification.from_pretrained(tmp_path / "bert")
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    randomise(peft.get_peft_model(model, config)).save_pretrained(tmp_path / "lora")
    loaded = folders.load(tmp_path / "bert", adapter=str(tmp_path / "lora"))
    assert type(loaded.get_base_model()) is t.BertForSequenceClassification
    wanted = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    got = peft.get_peft_model_state_dict(loaded)
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


def denoiser(name: str) -> tuple[type, dict[str, object]]:
    import diffusers

    wide = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "in_channels": 4, "sample_size": 8}
    text = {"joint_attention_dim": 32, "pooled_projection_dim": 16}
    unet = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet |= {"block_out_channels": (32,), "layers_per_block": 1, "cross_attention_dim": 32, "attention_head_dim": 8}
    sizes: dict[str, dict[str, object]] = {
        "UNet2DConditionModel": {"sample_size": 8, **unet, "norm_num_groups": 8},
        "AutoencoderKL": {"sample_size": 16, "block_out_channels": (32,), "norm_num_groups": 8},
        "FluxTransformer2DModel": {
            **{name: value for name, value in wide.items() if name != "sample_size"},
            **{**text, "num_single_layers": 1, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True},
        },
        "SD3Transformer2DModel": {**wide, **text, "patch_size": 2, "caption_projection_dim": 32, "out_channels": 4},
        "PixArtTransformer2DModel": {**wide, "cross_attention_dim": 32, "patch_size": 2},
        "DiTTransformer2DModel": {**wide, "patch_size": 2},
    }
    return getattr(diffusers, name), sizes[name]


@pytest.mark.parametrize(
    "name",
    [
        "UNet2DConditionModel",
        "FluxTransformer2DModel",
        "SD3Transformer2DModel",
        "PixArtTransformer2DModel",
        "DiTTransformer2DModel",
    ],
)
def test_denoisers_can_be_called(name, tmp_path):
    pytest.importorskip("diffusers")
    kind, sizes = denoiser(name)
    kind(**sizes).save_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", name]}))
    model = folders.load(tmp_path, torch.bfloat16, "lora", 4)
    with torch.no_grad():
        (sample,) = model(**folders.example(model, 5), return_dict=False)
    assert sample.isfinite().all() and sample.dtype == torch.bfloat16
    assert any("lora_A" in weight for weight, _ in model.named_parameters())


@pytest.mark.slow
def test_a_denoiser_is_explained(tmp_path, capsys):
    pytest.importorskip("diffusers")
    kind, sizes = denoiser("FluxTransformer2DModel")
    kind(**sizes).save_pretrained(tmp_path)
    assert cli.main(["explain", "--model", str(tmp_path), "--rank", "4", "--tokens", "5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert sum(linear["adapters"] > 0 and linear["status"] == "fused" for linear in report["linears"]) > 5
