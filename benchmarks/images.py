"""Image models of diffusers with LoRAs: one denoising step, side by side in one process.

    python -m benchmarks.images --dtype float32 bfloat16 --markdown benchmarks/results/images.md
    python -m benchmarks.images --models sdxl sd15 --convolutions
    python -m benchmarks.images --bank --pixels 512    # ten resident LoRAs mixed by weight, over one
    python -m benchmarks.images --picture benchmarks/results/images.png

Models have random weights in the widths of the published ones (Flux: half of it), cut to a few blocks; an image has 256
pixels each way (Flux: 128), or ``--pixels``. LoRAs of rank 16
are on attention and feed-forward, with ``--convolutions`` on the convolutions of residual blocks too: all variants have
channels last then. Columns: medians and quartiles in ms, over Inductor's unadapted model, over Inductor's adapted one;
in float32 the norm of the difference to eager, over eager's own; in bfloat16 the norm of the difference to eager in
float32, over that of eager in bfloat16. The picture is what a pipeline of four steps draws (noise, as all weights are
random), in eager mode and under gaws, for three mixtures of two LoRAs. Needs diffusers: pip install
'gawscompile[diffusion]'.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

import gawscompile
from benchmarks import common
from benchmarks.live import adapters as random_loras
from gawscompile.calibration import measure
from gawscompile.calibration.measure import Timing, sharing_copy
from gawscompile.loading import diffusion

RANK, TOKENS = 16, 77
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
LINEARS = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "proj_in", "proj_out"]

UNET: dict[str, Any] = {
    "sample_size": 32,
    "layers_per_block": 1,
    "block_out_channels": (320, 640),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "sdxl": (
        "UNet2DConditionModel",
        UNET
        | {
            "attention_head_dim": (5, 10),
            "transformer_layers_per_block": (1, 2),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "sd15": (
        "UNet2DConditionModel",
        UNET
        | {
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
            "down_block_types": ("CrossAttnDownBlock2D",) * 2,
            "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {"sample_size": 32, "num_layers": 2, "caption_projection_dim": 1152, "pos_embed_max_size": 32},
    ),
    "flux": (
        "FluxTransformer2DModel",
        {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 12},
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {
            "sample_size": 32,
            "num_layers": 3,
            "norm_type": "ada_norm_single",
            "use_additional_conditions": False,
            "caption_channels": 4096,
        },
    ),
}
"""diffusers' class, and what its configuration has that is not the default."""


def build(
    name: str, dtype: torch.dtype, memory: torch.memory_format, pixels: int | None = None
) -> tuple[Any, dict[str, Any]]:
    """The model with random weights, and the inputs of one step. Latents have an eighth of the edge in `pixels`, Flux's
    patches a sixteenth."""
    import diffusers

    kind, sizes = SHAPES[name]
    torch.manual_seed(0)
    if pixels:
        known = {"sample_size": pixels // 8, "pos_embed_max_size": max(32, pixels // 16)}
        sizes = sizes | {size: number for size, number in known.items() if size in sizes}
    model = getattr(diffusers, kind)(**sizes).to(dtype).eval().to(memory_format=memory)
    inputs = diffusion.example(model, TOKENS)
    if pixels and "img_ids" in inputs:
        patches, channels = (pixels // 16) ** 2, inputs["hidden_states"].shape[-1]
        inputs["hidden_states"] = torch.randn(1, patches, channels).to(dtype)
        inputs["img_ids"] = torch.zeros(patches, 3).to(dtype)
    if "sample" in inputs:
        inputs["sample"] = inputs["sample"].to(memory_format=memory)
    return model, inputs


def targets(model: Any, convolutions: bool) -> list[str]:
    """The paths of what gets a LoRA."""
    ends = LINEARS + (CONVOLUTIONS if convolutions else [])
    kinds = torch.nn.Linear, torch.nn.Conv2d
    found = [path for path, module in model.named_modules() if isinstance(module, kinds) and path.endswith(tuple(ends))]
    return [path for path in found if convolutions or ".resnets." not in path]


def lora(model: Any, convolutions: bool) -> Any:
    import peft

    return peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets(model, convolutions))


def adapted(base: Any, convolutions: bool) -> Any:
    """A copy that shares the base's weights, with a random LoRA."""
    import peft

    torch.manual_seed(1)
    model = peft.get_peft_model(sharing_copy(base), lora(base, convolutions), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model.to(next(base.parameters()).dtype).eval()


def step(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs, return_dict=False)[0]
    return found


def wanted(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The output that a step is compared with, in float32, and the norm that its error is divided by."""
    eager = step(model, inputs).float()
    if next(model.parameters()).dtype == torch.float32:
        return eager, eager.norm()
    precise = tree_map(lambda x: x.float() if torch.is_tensor(x) and x.is_floating_point() else x, inputs)
    exact = step(copy.deepcopy(model).float(), precise)
    return exact, (eager - exact).norm()


def in_turns(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """What each takes, in ms; nothing may compile meanwhile."""
    timed = {key: functools.partial(measure.timed, one) for key, one in steps.items()}
    with torch._dynamo.config.patch(error_on_recompile=True):
        samples, _ = measure.interleave(timed, rounds, 1)
    return {key: Timing.of(taken) for key, taken in samples.items()}


def compare(name: str, options: argparse.Namespace, dtype: str) -> list[list[str]]:
    """The rows of one model in one dtype."""
    memory = torch.channels_last if options.convolutions else torch.contiguous_format
    base, inputs = build(name, getattr(torch, dtype), memory, options.pixels)
    models = {"base": base, "lora": adapted(base, options.convolutions)}
    steps: dict[str, Callable[[], Any]] = {}
    errors = {}
    for kind, model in models.items():
        want, scale = wanted(model, inputs)
        for backend in common.BACKENDS:
            key = f"{backend} {kind}"
            steps[key] = functools.partial(step, measure.compiled(model, backend, dynamic=False), inputs)
            errors[key] = ((steps[key]().float() - want).norm() / scale).item()
            steps[key]()
            print(name, dtype, key, "ready", file=sys.stderr, flush=True)
    times = in_turns(steps, options.rounds)
    rows = []
    for key, timing in times.items():
        over = [f"{timing.median / times[f'inductor {kind}'].median:.2f}" for kind in models]
        spread = f"{timing.low:.1f}-{timing.high:.1f}"
        error = f"{errors[key]:.0e}" if dtype == "float32" else f"{errors[key]:.2f}"
        rows.append([name, dtype, key, f"{timing.median:.1f}", spread, *over, error])
    torch.compiler.reset()
    return rows


def mixed(name: str, options: argparse.Namespace, dtype: str) -> list[list[str]]:
    """A step with a mixture of one and of ten resident LoRAs of a bank, over one, and one as PEFT's parameters."""
    model, inputs = build(name, getattr(torch, dtype), torch.contiguous_format, options.pixels)
    single = measure.compiled(adapted(model, False), "gaws", dynamic=False)
    base = sharing_copy(model)
    bank = gawscompile.AdapterBank(base, memory="256MB", max_mix=10)
    modules = {path: model.get_submodule(path) for path in targets(model, False)}
    sizes = {path: (module.in_features, module.out_features) for path, module in modules.items()}
    names = []
    for adapter, state in random_loras(sizes, RANK, 10, getattr(torch, dtype)).items():
        bank.load(adapter, state, config=lora(model, False))
        names.append(adapter)
    run = measure.compiled(base, "gaws", dynamic=False)

    def with_mixture(count: int, turn: list[int]) -> Callable[[], Any]:
        def one() -> None:
            turn[0] += 1  # other weights each time, and another set
            chosen = [names[(turn[0] + i) % len(names)] for i in range(count)]
            bank.activate({adapter: 0.1 + 0.05 * ((turn[0] + i) % 7) for i, adapter in enumerate(chosen)})
            step(run, inputs)

        return one

    steps: dict[str, Callable[[], Any]] = {"one, PEFT's parameters": functools.partial(step, single, inputs)}
    steps |= {f"{count} of a bank": with_mixture(count, [0]) for count in (1, 3, 10)}
    for one in steps.values():
        one()
        one()
    times = in_turns(steps, options.rounds)
    rows = []
    for key, timing in times.items():
        over = f"{timing.median / times['1 of a bank'].median:.2f}"
        rows.append([name, dtype, key, f"{timing.median:.1f}", f"{timing.low:.1f}-{timing.high:.1f}", over])
    torch.compiler.reset()
    return rows


@torch.no_grad()
def picture(file: Path) -> None:
    """What Stable Diffusion draws with two LoRAs in eager mode and under gaws, and 1000 times the difference."""
    import diffusers

    unet, _ = build("sd15", torch.float32, torch.channels_last)
    names, configuration = ["ink", "toon"], lora(unet, True)
    for name in names:
        unet.add_adapter(configuration, name)
    torch.manual_seed(1)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.05)
    wide = {"block_out_channels": (32, 64), "norm_num_groups": 8, "sample_size": 64}
    ends = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae: Any = diffusers.AutoencoderKL(**wide, **ends)
    scheduler = diffusers.EulerDiscreteScheduler()
    pipe: Any = diffusers.StableDiffusionPipeline(
        vae.eval(), None, None, unet, scheduler, None, None, requires_safety_checker=False
    )
    texts, size = torch.randn(2, TOKENS, 768), 2 * unet.config.sample_size

    def draw(mixture: tuple[float, ...]) -> torch.Tensor:
        unet.set_adapters(names, list(mixture))
        torch.manual_seed(2)
        prompts = {"prompt_embeds": texts[:1], "negative_prompt_embeds": texts[1:]}
        drawn = pipe(**prompts, num_inference_steps=4, height=size, width=size, output_type="pt").images[0]
        image: torch.Tensor = drawn.permute(1, 2, 0)
        return image

    mixtures = (1.0, 0.0), (0.5, 0.5), (0.0, 1.0)
    eager = [draw(mixture) for mixture in mixtures]
    pipe.unet = measure.compiled(unet, "gaws", dynamic=False)
    ours = [draw(mixture) for mixture in mixtures]
    figure = common.figure(6, 6.4)
    if figure is None:
        return
    axes = figure.subplots(3, 3)
    for column, (mixture, want, got) in enumerate(zip(mixtures, eager, ours, strict=True)):
        for row, shown in enumerate((want, got, (1000 * (got - want).abs()).clamp(max=1))):
            axes[row, column].imshow(shown.numpy())
            axes[row, column].set(xticks=[], yticks=[])
        axes[0, column].set_title(" + ".join(f"{w} {name}" for w, name in zip(mixture, names, strict=True)))
    for row, label in enumerate(("eager", "gaws", "difference × 1000")):
        axes[row, 0].set_ylabel(label)
    common.save(figure, file)


def main() -> None:
    """The table, on stdout and into ``--markdown``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=("float32", "bfloat16"))
    parser.add_argument("--convolutions", action="store_true", help="LoRAs on convolutions too (UNets)")
    parser.add_argument("--bank", action="store_true", help="mixtures of a bank's LoRAs instead")
    parser.add_argument("--picture", type=Path, help="draw what a pipeline makes, instead")
    parser.add_argument("--pixels", type=int, help="an image's edge, but the picture's")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    if options.picture:
        return picture(options.picture)
    which = mixed if options.bank else compare
    rows = [row for name in options.models for dtype in options.dtype for row in which(name, options, dtype)]
    headers = ["model", "dtype", "", "ms", "quartiles"]
    headers += ["× one of a bank"] if options.bank else ["× Inductor base", "× Inductor lora", "error"]
    facts = measure.machine()

    def report(markdown: bool) -> str:
        return f"{measure.describe(facts)}\n\n{measure.table(headers, rows, markdown)}"

    common.publish("Image models", "images", sys.argv[1:], options.markdown, report)


if __name__ == "__main__":
    main()
