"""A model's folder and an adapter's, as the command line takes them: what they hold, and one call of the model.

Everything that can be wrong with a folder is found before or while it is loaded, and told as a `ModelError` of one line
that names the folder and the remedy. Only files are read: no hub is asked, and no code of a folder is run.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gawscompile.loading import diffusion
from gawscompile.loading.arguments import one_line
from gawscompile.loading.errors import EXTRA, ModelError

MOST_TOKENS = 1 << 17
"""In one call, where a model does not say for how many positions it is made."""

RANDOM = ("lora", "gaws")
TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""An adapter's task in PEFT's words: the head that it was trained with."""


def load(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    adapter: str | None = None,
    rank: int | None = None,
    splits: int | None = None,
) -> Any:
    """The model in a folder, in evaluation, with random weights where the folder holds none, and with an adapter: a
    PEFT folder, or ``lora`` of a `rank` or ``gaws`` of `splits`, random on every linear. Raises `ModelError`."""
    if (rank and adapter not in ("lora", None)) or (splits and (rank or adapter not in ("gaws", None))):
        raise ModelError("--rank is the random LoRA's and --splits the random GAWS's: --adapter lora or --adapter gaws")
    adapter = adapter or ("lora" if rank else "gaws" if splits else None)
    trained = None if adapter is None or adapter in RANDOM else Path(adapter)
    settings = adapter_settings(trained) if trained else {}
    where, config = model_settings(folder)
    with quiet():
        if "_class_name" in config:
            model = diffusion.load(where, config, dtype)
        else:
            model = _transformer(where, dtype, settings.get("task_type"))
        model.eval()
        if trained:
            return with_adapter(model, trained).eval()
        return model if adapter is None else _random(model, adapter, rank or 16, splits or 8).eval()


def model_settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A model's folder and its ``config.json``, after a look at its weights; of a pipeline of diffusers, those of the
    part that denoises. Raises `ModelError`."""
    what = f"--model {folder}"
    _folder(what, folder, "hf download NAME --local-dir DIR fetches one")
    if (folder / "model_index.json").is_file():
        folder = diffusion.denoiser(folder, _json(what, folder / "model_index.json"))
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(f"{what} holds an adapter: give it as --adapter, and its base model's folder as --model")
        raise ModelError(f"{what} holds no config.json: give a folder as save_pretrained writes it")
    config = _json(what, folder / "config.json")
    for file in sorted(folder.glob("*.safetensors")):
        _readable(what, file)
    return folder, config


def adapter_settings(folder: Path) -> dict[str, Any]:
    """The ``adapter_config.json`` of a PEFT adapter whose files are whole. Raises `ModelError`."""
    what = f"--adapter {folder}"
    _folder(what, folder, "lora and gaws are random ones")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(f"{what} holds no {name}: adapters are read from safetensors only, as PEFT saves them")
    settings = _json(what, folder / "adapter_config.json")
    _readable(what, folder / "adapter_model.safetensors")
    try:
        with quiet():
            import peft
            from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

            import gawscompile.adapters  # noqa: F401  ours become known to PEFT
    except ImportError as error:
        raise ModelError(f"adapters need PEFT ({one_line(error)}): {EXTRA}") from error
    kind = settings.get("peft_type")
    if kind not in [str(getattr(known, "value", known)) for known in PEFT_TYPE_TO_CONFIG_MAPPING]:
        raise ModelError(
            f"{what}: its adapter_config.json says peft_type {kind!r}, which PEFT {peft.__version__} does not know; "
            "a newer one may: pip install -U peft"
        )
    return settings


def with_adapter(model: Any, folder: Path) -> Any:
    """`model` with the PEFT adapter of a folder. Raises `ModelError`, also where none of its weights has a place."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    what = f"--adapter {folder}"
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            saved = set(file.keys())
        places = set(get_peft_model_state_dict(adapted))
    except Exception as error:
        raise ModelError(
            f"{what} does not go with this model (is it of another one?): {type(error).__name__}: {one_line(error)}"
        ) from error
    homeless = sorted(saved - places)
    if not saved & places:
        first = f" ({homeless[0]} for one)" if homeless else ""
        raise ModelError(f"{what}: none of its {len(saved)} weights has a place in this model{first}: it is of another")
    if homeless or places - saved:
        print(
            f"gawscompile: {what}: {len(homeless)} of its {len(saved)} weights have no place in this model, and "
            f"{len(places - saved)} of the model's adapters get none",
            file=sys.stderr,
        )
    return adapted


def example(model: Any, tokens: int) -> dict[str, Any]:
    """Inputs for one call of a model that `load` gave: so many tokens for what reads text, a blank image for what sees,
    blank sound for what hears, noise for what denoises. Raises `ModelError` where it is not made for so many tokens."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    text = base.config if diffusion.is_one(base) else base.config.get_text_config()
    said = getattr(text, "max_position_embeddings", None)
    most = said if isinstance(said, int) and said > 0 else MOST_TOKENS
    if tokens > most:
        raise ModelError(f"--tokens {tokens}: this model takes at most {most}")
    if diffusion.is_one(base):
        return diffusion.example(base, tokens)
    config, dtype = base.config, base.dtype
    ids, main = torch.zeros((1, tokens), dtype=torch.int64), getattr(base, "main_input_name", "input_ids")
    inputs: dict[str, Any] = {}
    if main == "input_values":
        inputs[main] = torch.zeros((1, 16000), dtype=dtype)  # a second
    elif main == "input_features":
        bands, frames = getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 1500)
        inputs[main] = torch.zeros((1, bands, frames), dtype=dtype)
    elif main != "pixel_values":
        inputs["input_ids"] = ids
    if main == "pixel_values" or _sees_and_reads(config):
        inputs["pixel_values"] = torch.zeros(_image(config), dtype=dtype)
    if config.is_encoder_decoder and "decoder_input_ids" in inspect.signature(base.forward).parameters:
        inputs["decoder_input_ids"] = ids
    return inputs


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars, warnings and log lines of the libraries that load: what matters of them is an error."""
    try:
        from transformers.utils import logging as theirs
    except ImportError as error:
        raise ModelError(f"models need transformers ({one_line(error)}): {EXTRA}") from error
    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def _transformer(folder: Path, dtype: torch.dtype, task: str | None) -> Any:
    """The model of transformers in a folder, by the head that an adapter's task names or that the folder does."""
    import transformers

    what = f"--model {folder}"
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or []]
        architecture = next((kind for kind in named if hasattr(kind, "from_pretrained")), None)
        kind: Any = getattr(transformers, TASKS[task]) if task in TASKS else architecture or transformers.AutoModel
        if not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
            make = kind.from_config if kind.__name__.startswith("Auto") else kind._from_config
            return make(config, dtype=dtype)
        model, told = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    except Exception as error:
        raise ModelError(f"{what} cannot be loaded: {type(error).__name__}: {one_line(error)}") from error
    places, missing = {name for name, _ in model.named_parameters()}, set(told["missing_keys"])
    if places and places <= missing:
        raise ModelError(f"{what}: none of its weights has a place in a {kind.__name__}: they are of another model")
    if missing:
        lacking = f"{len(missing)} weights, {min(missing)} for one"
        print(f"gawscompile: {what} lacks {lacking}: they are random", file=sys.stderr)
    return model


def _random(model: Any, adapter: str, rank: int, splits: int) -> Any:
    from peft import LoraConfig, get_peft_model

    linears = {
        name: min(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
    }
    if not linears:
        raise ModelError(f"--adapter {adapter}: this model has no linear to adapt")
    if adapter == "lora" and rank > max(linears.values()):
        raise ModelError(f"--rank {rank}: no linear of this model has more than {max(linears.values())} features")
    targets: Any = sorted(linears) if diffusion.is_one(model) else "all-linear"
    config: Any = LoraConfig(r=rank, target_modules=targets)
    if adapter == "gaws":
        from gawscompile.adapters import GAWSConfig

        config = GAWSConfig(input_splits=splits, target_modules=targets, init_weights="kaiming")
    try:
        return get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        told = f"--rank {rank}" if adapter == "lora" else f"--splits {splits}"
        raise ModelError(f"--adapter {adapter} {told}: {one_line(error)}") from error


def _folder(what: str, folder: Path, remedy: str) -> None:
    if not folder.exists():
        raise ModelError(f"{what}: there is no such folder ({remedy})")
    if not folder.is_dir():
        raise ModelError(f"{what}: this is a file; give the folder that holds it")


def _json(what: str, file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{what}: its {file.name} cannot be read ({one_line(error)}): see its permissions") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{what}: its {file.name} is no JSON ({one_line(error)}): save or fetch it again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{what}: its {file.name} holds no settings (a JSON object): save or fetch it again")
    return found


def _readable(what: str, file: Path) -> None:
    """Whether a safetensors file is whole, by its header and length. Raises `ModelError`."""
    from safetensors import safe_open

    try:
        with safe_open(file, "pt"):
            pass
    except Exception as error:  # safetensors' own type, OSError
        raise ModelError(
            f"{what}: its {file.name} is truncated or no safetensors file ({one_line(error)}): save or fetch it again"
        ) from error


def _sees_and_reads(config: Any) -> bool:
    """CLIP and its kin, which take an image and a text in every call."""
    from transformers.models.auto import modeling_auto

    return config.model_type in modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES


def _image(config: Any) -> tuple[int, int, int, int]:
    """[1, channels, height, width] of the images that a model is made for."""
    parts = [getattr(config, name, None) for name in ("vision_config", "encoder")]
    seeing = next((part for part in (config, *parts) if getattr(part, "image_size", None)), config)
    size = getattr(seeing, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return 1, int(getattr(seeing, "num_channels", 3)), math.ceil(height), math.ceil(width)
