"""Every argument of every command with bad values: one line on stderr that names the thing, and exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from gawscompile import cache, cli
from gawscompile.calibration import fit_cpu
from gawscompile.calibration.fit_cpu import Sample
from gawscompile.demo import __main__ as demo
from gawscompile.planning import devices
from tests.graphs import randomise

MODEL_COMMANDS = ("explain", "emit --out {tmp}/out")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> dict[str, str]:
    """Folders by name: a whole model and a whole adapter, and what can be wrong with each."""
    root = tmp_path_factory.mktemp("places")
    found = {"llama": tiny_llama_dir}

    def copy(name: str, of: str) -> Path:
        found[name] = root / name
        shutil.copytree(found[of], found[name])
        return found[name]

    def write(name: str, file: str, text: str) -> None:
        found[name] = root / name
        found[name].mkdir()
        (found[name] / file).write_text(text)

    truncate(copy("truncated", "llama") / "model.safetensors")
    (copy("no_weights_but_noise", "llama") / "model.safetensors").write_bytes(b"\xff" * 64)
    file = copy("other_weights", "llama") / "model.safetensors"
    save_file({"encoder.weight": torch.zeros(2, 2)}, file, {"format": "pt"})
    file = copy("other_shapes", "llama") / "model.safetensors"
    save_file({name: value[..., :8].clone() for name, value in load_file(file).items()}, file, {"format": "pt"})
    write("bad_json", "config.json", '{"model_type": ')
    write("list_json", "config.json", "[]")
    write("bytes_json", "config.json", "")
    (found["bytes_json"] / "config.json").write_bytes(b"\xff\xfe{}")
    write("unknown_type", "config.json", '{"model_type": "no_such_type"}')
    write("no_type", "config.json", "{}")
    write("own_code", "config.json", '{"model_type": "mine", "auto_map": {"AutoConfig": "configuration.Mine"}}')
    write("empty_index", "model_index.json", "{}")
    write("no_class", "config.json", '{"_class_name": "NoSuchModel", "_diffusers_version": "0.30.0"}')
    write("no_call", "config.json", '{"_class_name": "VQModel", "_diffusers_version": "0.30.0"}')
    found["empty"], found["file"] = root / "empty", root / "file"
    found["empty"].mkdir()
    found["file"].write_text("")

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    adapted = randomise(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])))
    found["lora"] = root / "lora"
    adapted.save_pretrained(found["lora"])
    truncate(copy("lora_truncated", "lora") / "adapter_model.safetensors")
    file = copy("lora_other_shape", "lora") / "adapter_model.safetensors"
    save_file({name: value[:1].clone() for name, value in load_file(file).items()}, file)
    file = copy("lora_other_keys", "lora") / "adapter_model.safetensors"
    save_file({f"elsewhere.{name}": value for name, value in load_file(file).items()}, file)
    (copy("lora_no_config", "lora") / "adapter_config.json").unlink()
    (copy("lora_no_weights", "lora") / "adapter_model.safetensors").unlink()
    (copy("lora_bad_json", "lora") / "adapter_config.json").write_text("{")
    for name, changes in {
        "lora_unknown_type": {"peft_type": "NO_SUCH"},
        "lora_no_type": {"peft_type": None},
        "lora_other_targets": {"target_modules": ["nowhere"]},
        "lora_bad_targets": {"target_modules": 7},
        "lora_bad_rank": {"r": -1},
    }.items():
        file = copy(name, "lora") / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    for name, text in {"dump_bad": "{", "dump_list": "[]", "dump_empty": "{}"}.items():
        write(name, "graph.json", text)
    return {name: str(path) for name, path in found.items()}


def truncate(file: Path) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2])


def of_models(table: dict[str, str]) -> dict[str, str]:
    """For the commands that take a model."""
    return {f"{command} {arguments}": said for command in MODEL_COMMANDS for arguments, said in table.items()}


BAD = {
    "": "required",
    "nothing": "invalid choice: 'nothing'",
    "explain --nothing": "unrecognized arguments: --nothing",
    **of_models(
        {
            "--model /nope": "--model /nope: there is no such folder",
            "--model ''": "--model: '' is no path",
            "--model gpt2": "--model gpt2: there is no such folder (hf download",
            "--model {file}": "this is a file",
            "--model {llama}/config.json": "this is a file",
            "--model {empty}": "holds no config.json",
            "--model {lora}": "holds an adapter: give it as --adapter",
            "--model {bad_json}": "its config.json is no JSON",
            "--model {list_json}": "its config.json holds no settings",
            "--model {bytes_json}": "its config.json is no JSON",
            "--model {unknown_type}": "{unknown_type} cannot be loaded",
            "--model {no_type}": "{no_type} cannot be loaded",
            "--model {own_code}": "{own_code} cannot be loaded",
            "--model {truncated}": "its model.safetensors is truncated",
            "--model {no_weights_but_noise}": "its model.safetensors is truncated or no safetensors file",
            "--model {other_weights}": "none of its weights has a place in a LlamaForCausalLM",
            "--model {other_shapes}": "{other_shapes} cannot be loaded",
            "--model {empty_index}": "this pipeline has no transformer",
            "--model {llama} --adapter /nope": "--adapter /nope: there is no such folder (lora and gaws",
            "--model {llama} --adapter ''": "'' is no path",
            "--model {llama} --adapter {file}": "this is a file",
            "--model {llama} --adapter {empty}": "holds no adapter_config.json",
            "--model {llama} --adapter {llama}": "holds no adapter_config.json",
            "--model {llama} --adapter {lora_no_config}": "holds no adapter_config.json",
            "--model {llama} --adapter {lora_no_weights}": "holds no adapter_model.safetensors",
            "--model {llama} --adapter {lora_bad_json}": "its adapter_config.json is no JSON",
            "--model {llama} --adapter {lora_unknown_type}": "peft_type 'NO_SUCH', which PEFT",
            "--model {llama} --adapter {lora_no_type}": "peft_type None, which PEFT",
            "--model {llama} --adapter {lora_truncated}": "its adapter_model.safetensors is truncated",
            "--model {llama} --adapter {lora_other_shape}": "{lora_other_shape} does not go with this model",
            "--model {llama} --adapter {lora_other_keys}": "none of its 4 weights has a place in this model",
            "--model {llama} --adapter {lora_other_targets}": "{lora_other_targets} does not go with this model",
            "--model {llama} --adapter {lora_bad_targets}": "{lora_bad_targets} does not go with this model",
            "--model {llama} --adapter {lora_bad_rank}": "{lora_bad_rank} does not go with this model",
            "--model {llama} --rank 0": "argument --rank: 0 is out of range: 1 or more",
            "--model {llama} --rank -3": "-3 is out of range",
            "--model {llama} --rank four": "'four' is not a whole number",
            "--model {llama} --rank 1000000000000": "--rank 1000000000000: no linear of this model has more than 64",
            "--model {llama} --splits 0": "argument --splits: 0 is out of range: 1 or more",
            "--model {llama} --splits 7": "--adapter gaws --splits 7:",
            "--model {llama} --rank 4 --splits 8": "--rank is the random LoRA's and --splits the random GAWS's",
            "--model {llama} --rank 4 --adapter gaws": "--rank is the random LoRA's",
            "--model {llama} --splits 8 --adapter lora": "--splits the random GAWS's",
            "--model {llama} --splits 8 --adapter {lora}": "--splits the random GAWS's",
            "--model {llama} --dtype int8": "argument --dtype: invalid choice: 'int8'",
            "--model {llama} --tokens 0": "argument --tokens: 0 is out of range: 1 or more",
            "--model {llama} --tokens -1": "-1 is out of range",
            "--model {llama} --tokens 1.5": "'1.5' is not a whole number",
            "--model {llama} --tokens 1025": "--tokens 1025: this model takes at most 1024",
            "--model {llama} --tokens 1" + "0" * 30: "this model takes at most 1024",
            "--model {llama} --tokens 1" + "0" * 6000: "is not a whole number",
        }
    ),
    "explain --model {llama} --json --html x": "not allowed with argument --json",
    "explain --model {llama} --html {empty}": "--html {empty}: this is a folder",
    "explain --model {llama} --html {empty}/no/page.html": "there is no folder {empty}/no",
    "explain --model {llama} --html ''": "'' is no path",
    "explain --model {llama} --dump {file}": "--dump {file}: {file} is a file",
    "explain --model {llama} --dump {file}/below": "{file} is a file",
    "explain --model {llama} --dump ''": "'' is no path",
    "emit --model {llama}": "required: --out",
    "emit --model {llama} --out {file}": "--out {file}: {file} is a file",
    "emit --model {llama} --out {llama}": "--out {llama}: not an empty folder",
    "emit --model {llama} --out ''": "'' is no path",
    "emit --model {llama} --out {tmp}/out --target cuda:12": "did you mean cuda:120?",
    "calibrate --threads 0": "argument --threads: 0 is out of range: from 1 to ",
    "calibrate --threads 100000000": "argument --threads: 100000000 is out of range: from 1 to ",
    "calibrate --threads x": "'x' is not a whole number",
    "calibrate --device tpu": "argument --device: invalid choice: 'tpu'",
    "bisect": "which script?",
    "bisect --out {tmp}/out": "which script?",
    "bisect {empty}/no.py": "{empty}/no.py: no such script",
    "bisect {empty}": "{empty}: no such script",
    "bisect ''": "no such script",
    "bisect --out {file} {empty}/no.py": "--out {file}: {file} is a file",
    "repro": "required: DIR",
    "repro ''": "'' is no path",
    "repro /nope": "/nope: there is no such folder",
    "repro {file}": "{file}: this is a file",
    "repro {empty}": "holds no dump of a graph",
    "repro {dump_bad}": "{dump_bad}/graph.json is no whole dump",
    "repro {dump_list}": "{dump_list}/graph.json is no whole dump",
    "repro {dump_empty}": "{dump_empty}/graph.json is no whole dump",
    "repro {dump_empty} --out {empty}": "--out {empty}: this is a folder",
    "repro {dump_empty} --out {empty}/no/script.py": "there is no folder {empty}/no",
    "cache": "required: action",
    "cache all": "invalid choice: 'all'",
}


def split(line: str, places: dict[str, str]) -> list[str]:
    return [word.replace("''", "").format_map(places) for word in line.split()]


def one_line_of(capsys: pytest.CaptureFixture[str], said: str) -> None:
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("gawscompile")
    assert said in captured.err and len(captured.err) < 900, captured.err


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:70])
def test_a_bad_value_is_one_line_and_code_2(line, places, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = {**places, "tmp": str(tmp_path)}
    assert cli.main(split(line, known)) == 2
    one_line_of(capsys, BAD[line].format_map(known))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line",
    [
        "explain --model {truncated}",
        pytest.param("explain --model {llama} --adapter {lora_other_shape}", marks=pytest.mark.slow),
        pytest.param("emit --out {tmp}/x", marks=pytest.mark.slow),
    ],
)
def test_a_process_says_one_line_of_its_own(line, places, tmp_path):
    """What libraries log and warn goes to the same stderr: none of it is a traceback, or in the name of the command."""
    command = [sys.executable, "-m", "gawscompile.cli", *split(line, {**places, "tmp": str(tmp_path)})]
    environment = os.environ | {"GAWS_CACHE_DIR": "/dev/null/cache"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert sum(one.startswith("gawscompile: ") for one in done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("line", ["cache info", "cache clear", "calibrate"])
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("GAWS_CACHE_DIR", "{file}", "cannot create the cache folder"),
        ("GAWS_CACHE_DIR", "{file}/below", "cannot create the cache folder"),
        ("GAWS_CACHE_DIR", "{open}", "is writable by others"),
    ],
)
def test_a_cache_folder_that_cannot_be_used(line, name, value, said, places, tmp_path, capsys, monkeypatch):
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv(name, value.format_map({**places, "open": str(tmp_path / "open")}))
    assert cli.main(line.split()) == 2
    one_line_of(capsys, said)


@pytest.mark.parametrize("megabytes", ["", "plenty", "-1", "1e3", "9" * 50])
def test_a_limit_that_is_no_number(megabytes, capsys, monkeypatch):
    monkeypatch.setenv("GAWS_CACHE_MB", megabytes)
    assert cli.main(["cache", "info"]) == 2
    one_line_of(capsys, f"GAWS_CACHE_MB={megabytes!r} is not a whole number of megabytes")


def test_a_cache_that_cannot_be_removed_is_not_told_as_removed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GAWS_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "elsewhere").mkdir()
    (cache.root() / "kernels").symlink_to(tmp_path / "elsewhere")
    assert cli.main(["cache", "clear"]) == 2
    one_line_of(capsys, f"cannot remove {tmp_path / 'cache' / 'kernels'}")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("line", ["explain --html {p}/x.html", "explain --dump {p}/d", "emit --out {p}/o", "calibrate"])
def test_folders_without_permission(line, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    monkeypatch.setenv("GAWS_CACHE_DIR", str(folder))
    assert cli.main(split(line, {"p": str(folder)})) == 2
    one_line_of(capsys, str(folder))


def test_a_folder_that_access_denies(tmp_path, capsys, monkeypatch):
    """As the former, for root too."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    for line in ("explain --html {p}/x.html", "explain --dump {p}/d", "emit --out {p}/o"):
        assert cli.main(split(line, {"p": str(tmp_path)})) == 2
        one_line_of(capsys, "not writable; name another")


def test_a_file_that_may_not_be_read(places, capsys, monkeypatch):
    def refused(self: Path, **_: object) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", refused)
    assert cli.main(["explain", "--model", places["llama"]]) == 2
    one_line_of(capsys, "its config.json cannot be read ([Errno 13] Permission denied")
    assert demo.main(["--model", places["llama"]]) == 2
    assert "its config.json cannot be read" in capsys.readouterr().err


def test_what_nobody_foresaw_is_one_line_too_and_a_traceback_for_those_who_ask(capsys, monkeypatch):
    def fails() -> None:
        raise KeyError("a line\nand another")

    monkeypatch.setattr(cache, "usage", fails)
    assert cli.main(["cache", "info"]) == 2
    one_line_of(capsys, "KeyError: 'a line\\nand another' (GAWS_STRICT=1 shows where)")
    monkeypatch.setenv("GAWS_STRICT", "1")
    with pytest.raises(KeyError):
        cli.main(["cache", "info"])


# --- calibrate ---------------------------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder of its own, and times out of thin air."""
    monkeypatch.setenv("GAWS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("gawscompile.runtime.ops.ensure_loaded", lambda: None)
    monkeypatch.setattr(fit_cpu, "_time", lambda d, p, f, m, *_: Sample(d, p, f, m, 1e-5 * m))
    devices._stored.cache_clear()
    yield tmp_path / "cache"
    devices._stored.cache_clear()


def test_calibrate_on_the_cpu_keeps_what_it_found(timed, capsys):
    assert cli.main(["calibrate", "--device", "cpu", "--threads", str(torch.get_num_threads())]) == 0
    assert "fitted" in capsys.readouterr().out
    assert json.loads((timed / devices.CALIBRATIONS).read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_calibrate_on_a_gpu_that_is_not_there(timed, capsys):
    assert cli.main(["calibrate", "--device", "cuda"]) == 2
    one_line_of(capsys, "--device cuda: torch sees no GPU here")


def test_calibrate_asks_before_it_measures_whether_it_can_keep_anything(timed, capsys, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def measures(*_: object) -> None:
        raise AssertionError("it measures first")

    monkeypatch.setattr(cache.tempfile, "TemporaryFile", full)
    monkeypatch.setattr(fit_cpu, "_time", measures)
    assert cli.main(["calibrate", "--device", "cpu"]) == 2
    one_line_of(capsys, "cannot write to the cache folder")


@pytest.fixture
def interruptible():
    """Jobs in the background start with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("when", ["measuring", "writing"])
def test_an_interrupted_calibration_leaves_no_file_and_the_former_one(when, timed, capsys, monkeypatch, interruptible):
    assert cli.main(["calibrate", "--device", "cpu"]) == 0
    before, times, replace = (timed / devices.CALIBRATIONS).read_text(), fit_cpu._time, os.replace

    def stopped(*arguments: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return (times if when == "measuring" else replace)(*arguments)

    monkeypatch.setattr(*((fit_cpu, "_time") if when == "measuring" else (os, "replace")), stopped)
    capsys.readouterr()
    assert cli.main(["calibrate", "--device", "cpu"]) == 130
    one_line_of(capsys, "calibrate was interrupted")
    assert (timed / devices.CALIBRATIONS).read_text() == before
    assert {path.name for path in timed.iterdir()} <= {devices.CALIBRATIONS, "locks", "kernels"}


# --- The demo ----------------------------------------------------------------------------------------------------

BAD_DEMO = {
    "--dtype int8": "argument --dtype: invalid choice: 'int8'",
    "--tokens 0": "argument --tokens: 0 is out of range: 1 or more",
    "--steps -1": "argument --steps: -1 is out of range: 0 or more",
    "--device nothing": "--device nothing: ",
    "--device meta": "--device meta: ",
    "--device cuda:99": "--device cuda:99: ",
    "--backends jit": "unknown backends: jit",
    "--model ''": "'' is no path",
    "--model /nope": "--model /nope is not a local directory with a config.json",
    "--model {empty}": "is not a local directory with a config.json",
    "--model {file}": "is not a local directory with a config.json",
    "--model {bad_json}": "its config.json is no JSON",
    "--model {unknown_type}": "is no decoder",
    "--model {truncated}": "its model.safetensors is truncated",
    "--model {other_shapes}": "{other_shapes} cannot be loaded",
    "--model {llama} --adapter {empty}": "is not a local directory with a adapter_config.json",
    "--model {llama} --adapter {lora_no_weights}": "holds no adapter_model.safetensors",
    "--model {llama} --adapter {lora_bad_json}": "its adapter_config.json is no JSON",
    "--model {llama} --adapter {lora_unknown_type}": "peft_type 'NO_SUCH', which PEFT",
    "--model {llama} --adapter {lora_truncated}": "its adapter_model.safetensors is truncated",
    "--model {llama} --adapter {lora_other_shape}": "does not go with this model",
    "--model {llama} --adapter {lora_other_keys}": "none of its 4 weights has a place in this model",
    "--model {llama} --tokens 100000": "this model takes at most 1024",
}


@pytest.mark.parametrize("line", BAD_DEMO, ids=lambda line: line[:70])
def test_a_bad_value_for_the_demo(line, places, capsys):
    with pytest.raises(SystemExit) as ended:
        sys.exit(demo.main(split(line, places)))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and BAD_DEMO[line].format_map(places) in said, said


# --- Folders of diffusers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "said"), [("no_class", "has no model 'NoSuchModel'"), ("no_call", "how a VQModel is called")]
)
def test_a_model_of_diffusers_that_cannot_be_explained(place, said, places, capsys):
    pytest.importorskip("diffusers")
    assert cli.main(["explain", "--model", places[place]]) == 2
    one_line_of(capsys, said)


def test_without_diffusers_its_models_name_the_package(places, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert cli.main(["explain", "--model", places["no_call"]]) == 2
    one_line_of(capsys, "pip install 'gawscompile[diffusion]'")
