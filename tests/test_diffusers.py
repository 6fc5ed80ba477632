"""Image models of diffusers: their LoRAs are fused, mixed by weight, switched; answers are eager's."""

from __future__ import annotations

import itertools
from collections import Counter

import peft
import pytest
import torch

from gawscompile import AdapterBank, explain
from gawscompile.calibration.measure import graphs_compiled
from gawscompile.loading import diffusion
from gawscompile.observe.store import RECORDS
from tests.graphs import randomise
from tests.loading.test_folders import denoiser
from tests.ways import fusing

pytest.importorskip("diffusers")

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LINEARS = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_mlp"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "proj_in", "proj_out"]
MODELS = [f"{name}Transformer2DModel" for name in ("SD3", "Flux", "PixArt")] + ["UNet2DConditionModel"]
NAMED = {"prefix": None, "weight_name": "pytorch_lora_weights.safetensors", "adapter_name": "default"}
SLOW = pytest.mark.slow


def image_model(name, adapters=("one",), targets=LINEARS, memory=torch.contiguous_format):
    """A small random denoiser with LoRAs, B random, and one call's inputs."""
    kind, sizes = denoiser(name)
    torch.manual_seed(0)
    model = kind(**sizes).eval().to(memory_format=memory)
    inputs = diffusion.example(model, 5)
    for adapter in adapters:
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
        if hasattr(model, "add_adapter"):
            model.add_adapter(config, adapter)
        else:  # of PixArt diffusers has no mixin for adapters
            model = peft.get_peft_model(model, config, adapter)
    mix(model, adapters)
    scale = 0.2 if "UNet" in name else 1.0  # what normalises groups of few numbers enlarges every error
    return randomise(model, scale=scale).eval(), inputs


def mix(model, adapters, weights=None):
    """Have these adapters act, each by its weight."""
    if isinstance(model, peft.PeftModel):
        model.base_model.set_adapter(list(adapters))
        for module in model.modules():
            for adapter, weight in zip(adapters, weights or (), strict=False):
                if hasattr(module, "lora_A"):
                    module.set_scale(adapter, weight)
    else:
        model.set_adapters(list(adapters), weights and list(weights))


@torch.no_grad()
def sample(model, inputs):
    return model(**inputs, return_dict=False)[0]


def close(got, want):
    assert (got - want).norm() <= 1e-4 * want.norm()


MIXED = ((("one", "two"), (1.0, 1.0)), (("one", "two"), (0.3, 0.9)), (("two",), (0.7,)), (("one",), (1.0,)))


@SLOW  # the bank's test compiles one of these models too, with weights that change
@pytest.mark.parametrize("name", MODELS)
def test_adapters_are_fused_and_mixed_by_weight(name):
    adapters = ("one",) if "PixArt" in name else ("one", "two")
    model, inputs = image_model(name, adapters)
    report = explain(model, options={"strict": True, "verify": True}, **inputs)
    adapted = [entry for entry in report.linears if entry.adapters]
    modules = sum(hasattr(module, "lora_A") for module in model.modules())
    assert modules and len(adapted) == modules
    assert Counter(entry.status for entry in adapted) == {"fused": modules}, [e for e in adapted if e.reason]
    assert all(entry.operators.count("LowRank") == len(adapters) for entry in adapted)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="gaws", options={"strict": True})
    seen = []
    for names, weights in MIXED if len(adapters) == 2 else ((adapters, (1.0,)), (adapters, (0.3,))):
        mix(model, names, weights)
        want = sample(model, inputs)
        close(sample(compiled, inputs), want)
        seen.append(want)
    assert all((a - b).norm() > 1e-2 * a.norm() for a, b in itertools.pairwise(seen))


@SLOW  # tests/passes/test_unfold_convolutions.py looks at graphs of the same
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_convolutions_with_adapters(memory):
    model, inputs = image_model("UNet2DConditionModel", targets=LINEARS + CONVOLUTIONS, memory=memory)
    if memory == torch.channels_last:
        inputs["sample"] = inputs["sample"].to(memory_format=memory)
    report = explain(model, options={"strict": True, "verify": True}, **inputs)
    paths = {entry.path for entry in report.linears if entry.status == "fused"}
    assert sum(path.endswith(("proj_in", "proj_out", "conv_shortcut")) for path in paths) >= 2
    wide = sum(".conv1.lora_B" in path or ".conv2.lora_B" in path for path in paths)
    assert (wide > 0) == (memory == torch.channels_last)
    torch._dynamo.reset()
    close(sample(torch.compile(model, backend="gaws", options={"strict": True}), inputs), sample(model, inputs))


@SLOW
def test_merged_adapters_are_left_alone_and_come_back():
    model, inputs = image_model(MODELS[0])
    compiled = torch.compile(model, backend="gaws", options={"strict": True})
    seen = []
    for change in (lambda: None, lambda: model.fuse_lora(lora_scale=0.5), model.unfuse_lora):
        change()
        want = sample(model, inputs)
        close(sample(compiled, inputs), want)
        seen.append(want)
    assert (seen[0] - seen[1]).norm() > 1e-2 * seen[0].norm()


@SLOW
def test_autoencoders():
    model, inputs = image_model("AutoencoderKL", targets=ATTENTION + CONVOLUTIONS, memory=torch.channels_last)
    inputs["sample"] = inputs["sample"].to(memory_format=torch.channels_last)
    with fusing():
        close(sample(torch.compile(model, backend="gaws", options={"strict": True}), inputs), sample(model, inputs))


def pipeline(unet):
    """Stable Diffusion's, small and random; prompts come as embeddings."""
    import diffusers

    kind, sizes = denoiser("AutoencoderKL")
    torch.manual_seed(0)
    vae, scheduler = kind(**sizes).eval(), diffusers.EulerDiscreteScheduler()
    parts = vae, None, None, unet, scheduler, None, None
    pipe = diffusers.StableDiffusionPipeline(*parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@SLOW
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_pipeline_of_four_steps(memory):
    """Guidance makes a batch of two; each step is another time, and the image is eager's."""
    unet, _ = image_model("UNet2DConditionModel", ("one", "two"), LINEARS + CONVOLUTIONS, memory)
    pipe = pipeline(unet)
    texts = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))

    def image():
        torch.manual_seed(2)
        settings = {"num_inference_steps": 4, "output_type": "pt", "height": 8, "width": 8}
        return pipe(prompt_embeds=texts[:1], negative_prompt_embeds=texts[1:], **settings).images

    wanted = {}
    for weights in ((1.0, 0.5), (0.2, 1.0)):
        unet.set_adapters(["one", "two"], list(weights))
        wanted[weights] = image()
    (first, second) = wanted.values()
    assert first.isfinite().all() and (first - second).norm() > 1e-2 * first.norm()
    pipe.unet = torch.compile(unet, backend="gaws", options={"strict": True})
    for weights, want in wanted.items():
        unet.set_adapters(["one", "two"], list(weights))
        before = graphs_compiled()
        assert (image() - want).norm() <= 1e-3 * want.norm()
        assert graphs_compiled() - before == 1


@SLOW
def test_as_few_graphs_as_inductor():
    """Switching adapters and their weights compiles no more often than under Inductor alone."""
    counts = {}
    for backend in ("inductor", "gaws"):
        torch._dynamo.reset()
        model, inputs = image_model("FluxTransformer2DModel", ("one", "two"))
        compiled, before = torch.compile(model, backend=backend), graphs_compiled()
        for names, weights in (*MIXED, MIXED[0]):
            mix(model, names, weights)
            close(sample(compiled, inputs), sample(model, inputs))
        counts[backend] = graphs_compiled() - before
    assert counts["gaws"] <= counts["inductor"]


@SLOW
@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "UNet2DConditionModel"])
def test_repeated_blocks(name):
    model, inputs = image_model(name)
    want = sample(model, inputs)
    model.compile_repeated_blocks(backend="gaws", options={"strict": True})
    with fusing():
        close(sample(model, inputs), want)


@SLOW
def test_hot_swapping(tmp_path):
    """diffusers' own hot swap writes another LoRA, of another rank, into the one that is compiled."""
    kind, sizes = denoiser("FluxTransformer2DModel")

    def plain():
        torch.manual_seed(0)
        return kind(**sizes).eval()

    files = []
    for rank in (4, 2):
        model = plain()
        model.add_adapter(peft.LoraConfig(r=rank, lora_alpha=8, target_modules=ATTENTION))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape) * 0.2)
        model.save_lora_adapter(tmp_path / str(rank))
        files.append(tmp_path / str(rank))
    model = plain()
    model.enable_lora_hotswap(target_rank=4)
    model.load_lora_adapter(files[0], **NAMED)
    model.eval()
    compiled, before = torch.compile(model, backend="gaws", options={"strict": True}), graphs_compiled()
    inputs = diffusion.example(model, 5)
    first = sample(model, inputs)
    with fusing():
        close(sample(compiled, inputs), first)
    graphs = graphs_compiled() - before
    model.load_lora_adapter(files[1], **NAMED, hotswap=True)
    second = sample(model, inputs)
    assert (second - first).norm() > 1e-3 * first.norm()
    close(sample(compiled, inputs), second)
    assert graphs_compiled() - before == graphs


@pytest.mark.slow  # tests/banks cover mixtures over many tokens, and kernels have tests of their own
def test_ten_adapters_of_a_bank_mixed_by_weight():
    """One graph, whatever is mixed: weights and the set of adapters change, and nothing is compiled."""
    name, names = MODELS[2], [f"style {i}" for i in range(10)]
    kind, sizes = denoiser(name)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS)

    def plain():
        torch.manual_seed(0)
        return kind(**sizes).eval()

    eager = peft.get_peft_model(plain(), config, names[0])
    for adapter in names[1:]:
        eager.add_adapter(adapter, config)
    randomise(eager, scale=1.0).eval()
    model = plain()
    inputs = diffusion.example(model, 5)
    bank = AdapterBank(model, memory="16MB", max_mix=len(names))
    for adapter in names:
        eager.set_adapter(adapter)
        bank.load(adapter, eager)
    compiled, graphs, mark = torch.compile(model, backend="gaws", options={"strict": True}), [], len(RECORDS)
    for count, weight in ((10, 0.1), (10, 0.3), (3, 1.0), (1, 0.5)):
        mixture = {adapter: weight * (i + 1) / 5 for i, adapter in enumerate(names[-count:])}
        mix(eager, list(mixture), list(mixture.values()))
        bank.activate(mixture)
        want = sample(eager, inputs)
        assert (want - sample(plain(), inputs)).norm() > 1e-2 * want.norm()
        close(sample(compiled, inputs), want)
        graphs.append(graphs_compiled())
    assert len(set(graphs)) == 1
    (record,) = RECORDS.since(mark)
    modules = sum(hasattr(module, "lora_A") for module in eager.modules())
    banked = [entry for entry in record.linears if entry.status == "fused" and "Banked" in entry.operators]
    assert len(banked) >= modules > 0  # a bank is ready for adapters on every linear
