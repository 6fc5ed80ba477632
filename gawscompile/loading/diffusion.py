"""Denoisers of diffusers, for the command line: the one of a folder, and one call of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gawscompile.loading.arguments import one_line
from gawscompile.loading.errors import ModelError

INSTALL = "pip install 'gawscompile[diffusion]'"
PARTS = ("transformer", "unet", "prior")
PATCHES = 64
"""Of an image, for models that are given it in patches."""


def denoiser(pipeline: Path, index: dict[str, Any]) -> Path:
    """The folder of a pipeline's denoiser, by its ``model_index.json``. Raises `ModelError`."""
    for part in PARTS:
        if index.get(part) and (pipeline / part / "config.json").is_file():
            return pipeline / part
    raise ModelError(
        f"--model {pipeline}: this pipeline has no {' and no '.join(PARTS)} with a config.json; "
        "give the folder of the part that you mean"
    )


def load(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """The model of diffusers in a folder, with random weights where it holds none. Raises `ModelError`."""
    name = config["_class_name"]
    try:
        import diffusers
    except ImportError as error:
        raise ModelError(f"--model {folder} holds a {name} of diffusers ({one_line(error)}): {INSTALL}") from error
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    kind = getattr(diffusers, str(name), None)
    if kind is None or not issubclass(kind, torch.nn.Module):
        raise ModelError(f"--model {folder}: diffusers {diffusers.__version__} has no model {name!r}: {INSTALL} -U")
    if name not in EXAMPLES:
        raise ModelError(
            f"--model {folder}: how a {name} is called is not known here ({', '.join(EXAMPLES)} are): "
            "from Python, gawscompile.explain(model, **inputs)"
        )
    try:
        if not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
            return kind.from_config(config).to(dtype)
        return kind.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    except Exception as error:
        raise ModelError(f"--model {folder} cannot be loaded: {type(error).__name__}: {one_line(error)}") from error


def is_one(model: Any) -> bool:
    """Whether a model is one that `load` gives."""
    return type(model).__module__.startswith("diffusers.") and type(model).__name__ in EXAMPLES


def example(model: Any, tokens: int) -> dict[str, Any]:
    """Inputs for one step of a denoiser: noise of the size that it is made for, and so many tokens of a prompt."""
    inputs = EXAMPLES[type(model).__name__](model.config, tokens)
    dtype = next(model.parameters()).dtype

    def cast(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cast(each) for name, each in value.items()}
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    cast_inputs: dict[str, Any] = cast(inputs)
    return cast_inputs


def _noise(config: Any) -> torch.Tensor:
    """[1, channels, height, width]"""
    size = config.sample_size or 64
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return torch.randn(1, config.in_channels, height, width)


def _unet(config: Any, tokens: int) -> dict[str, Any]:
    width = config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    inputs: dict[str, Any] = {"sample": _noise(config), "timestep": torch.tensor([1])}
    inputs["encoder_hidden_states"] = _text(tokens, width)
    if config.addition_embed_type == "text_time":  # SDXL
        times = 6 * config.addition_time_embed_dim
        pooled = config.projection_class_embeddings_input_dim - times
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(1, pooled), "time_ids": torch.ones(1, 6)}
    return inputs


def _unconditional(config: Any, tokens: int) -> dict[str, Any]:
    return {"sample": _noise(config), "timestep": torch.tensor([1])}


def _image(config: Any, tokens: int) -> dict[str, Any]:
    return {"sample": torch.randn(1, config.in_channels, config.sample_size, config.sample_size)}


def _flux(config: Any, tokens: int) -> dict[str, Any]:
    inputs = {
        "hidden_states": torch.randn(1, PATCHES, config.in_channels),
        "encoder_hidden_states": _text(tokens, config.joint_attention_dim),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "timestep": torch.ones(1),
        "img_ids": torch.zeros(PATCHES, 3),
        "txt_ids": torch.zeros(tokens, 3),
    }
    return inputs | ({"guidance": torch.ones(1)} if config.guidance_embeds else {})


def _sd3(config: Any, tokens: int) -> dict[str, Any]:
    return {
        "hidden_states": _noise(config),
        "encoder_hidden_states": _text(tokens, config.joint_attention_dim),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "timestep": torch.tensor([1]),
    }


def _pixart(config: Any, tokens: int) -> dict[str, Any]:
    conditions: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    if config.use_additional_conditions or (config.use_additional_conditions is None and config.sample_size == 128):
        conditions = {"resolution": torch.ones(1, 2), "aspect_ratio": torch.ones(1, 1)}
    return {
        "hidden_states": _noise(config),
        "encoder_hidden_states": _text(tokens, config.caption_channels or config.cross_attention_dim),
        "timestep": torch.tensor([1]),
        "added_cond_kwargs": conditions,
    }


def _dit(config: Any, tokens: int) -> dict[str, Any]:
    return {"hidden_states": _noise(config), "timestep": torch.tensor([1]), "class_labels": torch.tensor([0])}


def _text(tokens: int, width: int) -> torch.Tensor:
    return torch.randn(1, tokens, width)


EXAMPLES: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    "UNet2DConditionModel": _unet,
    "UNet2DModel": _unconditional,
    "AutoencoderKL": _image,
    "FluxTransformer2DModel": _flux,
    "SD3Transformer2DModel": _sd3,
    "PixArtTransformer2DModel": _pixart,
    "DiTTransformer2DModel": _dit,
}
"""By class: the inputs of one step."""
