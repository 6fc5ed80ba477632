"""Kronecker adapters in a bank, beside PEFT and our tuners: alone, in rows of others, in mixes; read, saved, taken
over, spilled and refused."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import gawscompile
from gawscompile.adapters import GAWSConfig, GAWSDConfig
from gawscompile.banks.bank import AdapterBank
from gawscompile.banks.checkpoints import WEIGHTS, BankError, read
from gawscompile.banks.layer import BankedLinear
from gawscompile.banks.reading import sizes_of
from gawscompile.ir import banked
from gawscompile.ir.records import GraphRecord
from gawscompile.planning import devices
from gawscompile.verify import proof
from tests.banks import common
from tests.banks.common import KINDS, close, in_kernels, llama
from tests.graphs import capture, rewriting

ALL = {"target_modules": "all-linear"}
CONFIGS: dict[str, Any] = {
    "gaws": lambda: GAWSConfig(**ALL, input_splits=8, diag=True),
    "gawsd": lambda: GAWSDConfig(target_modules=["q_proj", "v_proj", "down_proj"], input_split_dim=8),
    "gawsd_diag": lambda: GAWSDConfig(**ALL, input_split_dim=16, diag=True),
    "lokr": lambda: peft.LoKrConfig(**ALL, r=16, alpha=24),  # w1 and w2 whole
    "lokr_low": lambda: peft.LoKrConfig(
        target_modules=["q_proj", "up_proj", "down_proj"], r=2, alpha=3, rank_pattern={"up_proj": 5}, decompose_factor=4
    ),
    "lokr_both": lambda: peft.LoKrConfig(**ALL, r=2, alpha=5, decompose_both=True, alpha_pattern={"o_proj": 9}),
    "a": lambda: peft.LoraConfig(**KINDS["a"]),
    "m": lambda: peft.LoraConfig(r=6, lora_alpha=9, target_modules=["q_proj", "up_proj"], use_dora=True),
}
ROWS = [
    ["gaws", None, "lokr_low", "a"],
    ["m", {"gaws": 0.5, "m": -2.0}, "lokr_both", "lokr_both"],
    ["lokr", {"a": 1.0, "lokr_low": 0.5, "gawsd": 2.0}],
    [{"lokr_both": 0.5, "m": 1.0, "lokr_low": -1.0}, "gawsd", None, {"lokr": 1.0, "gawsd_diag": 0.25}],
    ["gawsd_diag"],
]


def judged(name: str, dtype: torch.dtype = torch.float32) -> peft.PeftModel:
    """The base model with one adapter, of random numbers, as PEFT or our tuner runs it."""
    cast = {"autocast_adapter_dtype": dtype == torch.float32}
    model = peft.get_peft_model(llama(dtype=dtype), CONFIGS[name](), **cast).eval()
    torch.manual_seed(len(name))
    for key, parameter in model.named_parameters():
        if "lora_magnitude_vector" in key:
            parameter.mul_(torch.rand_like(parameter) + 0.5)
        elif "base_layer" not in key and any(part in key for part in ("lora_", "lokr_", "GAWS", "diag")):
            nn.init.normal_(parameter, std=0.5 if "lokr" in key else 0.2)
    return model


@pytest.fixture(scope="module")
def judges() -> dict[str, peft.PeftModel]:
    with torch.no_grad():
        return {name: judged(name) for name in CONFIGS}


@pytest.fixture(scope="module")
def folders(judges, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kronecker")
    for name, judge in judges.items():
        judge.save_pretrained(folder / name)
    return {name: folder / name for name in judges}


def loaded(folders: dict[str, Path], **settings: Any) -> AdapterBank:
    bank = AdapterBank(llama(), **{"memory": "8MB", "max_modes": 3, **settings})
    for name, folder in folders.items():
        bank.load(name, folder)
    return bank


def logits(judges: dict[str, peft.PeftModel], ids: torch.Tensor, choice: Any) -> torch.Tensor:
    """What PEFT's layers make of one choice: each adapter's part of each module, weighted."""
    parts = {} if choice is None else {choice: 1.0} if isinstance(choice, str) else choice
    dtype = next(iter(judges.values())).get_base_model().lm_head.weight.dtype
    model, handles = llama().to(dtype), []
    for path, module in model.named_modules():
        layers = [(judges[name].get_base_model().get_submodule(path), weight) for name, weight in parts.items()]
        layers = [(layer, weight) for layer, weight in layers if hasattr(layer, "base_layer")]
        if layers:

            def add(module: Any, args: Any, y: torch.Tensor, layers: Any = layers) -> torch.Tensor:
                return y + sum(weight * (layer(args[0]) - layer.base_layer(args[0])) for layer, weight in layers)

            handles.append(module.register_forward_hook(add))
    return model(ids).logits


by_row = functools.partial(common.by_row, answer=logits)


def test_the_judge_is_peft_s_forward(judges, ids):
    for name, judge in judges.items():
        torch.testing.assert_close(logits(judges, ids, name), judge(ids).logits, rtol=1e-4, atol=1e-4)


def test_all_shapes_of_chains_are_here(folders):
    bank = loaded(folders)
    longest = {name: int((held.entries[:, :, 3] > 0).sum(axis=1).max()) for name, held in bank._all.held.items()}
    assert longest == {
        **{"gaws": 1, "gawsd": 1, "gawsd_diag": 1, "lokr": 2, "lokr_low": 3, "lokr_both": 4, "a": 1, "m": 1}
    }


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_as_peft(judges, folders, ids, how):
    bank = loaded(folders)
    records: list[GraphRecord] = []
    run = bank.model if how == "eager" else torch.compile(bank.model, backend=rewriting(records))
    bank.activate("a")
    close(run(ids).logits, logits(judges, ids, "a"))
    with torch._dynamo.config.patch(error_on_recompile=True):
        common.agree(run, bank, judges, ids, list(judges), ROWS, logits)
        bank.activate("lokr_low")
        bank.scale("lokr_low", -0.5)
        close(run(ids).logits, logits(judges, ids, {"lokr_low": -0.5}))
    assert how == "eager" or in_kernels(records)


@pytest.mark.slow  # kernels: test_cpp's banks have modes; models: test_as_peft, of few tokens
@pytest.mark.parametrize("tokens", [1, 100])
def test_few_tokens_and_many(judges, folders, tokens):
    """The plan of few tokens, and that of many, which adds to what the library has made."""
    bank = loaded(folders)
    quick, ids = gawscompile.compile(bank.model), torch.randint(0, 128, (4, tokens))
    for rows in ROWS:
        bank.activate(rows)
        close(quick(ids).logits, by_row(judges, ids, rows))


@pytest.fixture
def on_a_gpu():
    with devices.planning_for(devices.GPUS["H100"]):
        yield


@pytest.mark.usefixtures("on_a_gpu")
def test_on_a_gpu(judges, folders, ids):
    """Kernels are told how long chains can be; a row's entries are blocks of ranks, and modes."""
    bank = loaded(folders, max_modes=4)
    assert bank.shared.modes == (4,)
    common.agree(bank.model, bank, judges, ids, list(judges), ROWS, logits)
    for name in ("gaws", "lokr_both", "a"):
        bank.activate(name)
        bank.scale(name, -0.5)
        close(bank.model(ids).logits, logits(judges, ids, {name: -0.5}))


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("name", ["gaws", "lokr"])
def test_taken_over_on_a_gpu(judges, ids, name):
    model = copy.deepcopy(judges[name])
    bank = AdapterBank(model, memory="8MB")
    assert bank.shared.modes == (1 if name == "gaws" else 2,)
    close(model(ids).logits, judges[name](ids).logits)


@pytest.mark.usefixtures("on_a_gpu")
def test_chains_that_have_no_place_together_on_a_gpu(judges, folders, ids):
    """With `max_modes=2` a row has place for the numbers that one LoKr's first mode passes on, and not for two."""
    names = ["lokr0", "lokr1"]
    bank = loaded({"gaws": folders["gaws"], **dict.fromkeys(names, folders["lokr"])}, max_modes=2)
    bank.activate({"lokr0": 1.0, "gaws": 2.0})
    before = bank.model(ids).logits
    close(before, logits(judges, ids, {"lokr": 1.0, "gaws": 2.0}))
    with pytest.raises(BankError, match=r"lokr0 and .*: their modes pass on more .*AdapterBank\(max_modes=…\)"):
        bank.activate(dict.fromkeys(names, 1.0))
    assert torch.equal(bank.model(ids).logits, before)


def test_all_is_fused_and_proven(folders, ids):
    bank = loaded(folders)
    bank.activate(ROWS[0])
    context = capture(bank.model, ids, kernels=True).until()
    layers = [linear for linear in context.record.linears if linear.adapters]
    assert len(layers) == 14 and all(linear.status == "fused" and "Banked" in linear.operators for linear in layers)
    context.complain = pytest.fail
    proof.verify_rewrites(context)
    assert context.record.passes["verify"] >= 9


@pytest.mark.slow  # test_bank has LoRA in 16 bits
def test_16_bits(ids, tmp_path):
    names = ["gaws", "gawsd", "lokr_low", "lokr_both", "a"]
    judges = {name: judged(name, torch.bfloat16) for name in names}
    bank = AdapterBank(llama(dtype=torch.bfloat16), memory="4MB", max_modes=2)
    for name, judge in judges.items():
        judge.save_pretrained(tmp_path / name)
        bank.load(name, tmp_path / name)
    records: list[GraphRecord] = []
    quick = torch.compile(bank.model, backend=rewriting(records))
    exact = {name: copy.deepcopy(judge).double() for name, judge in judges.items()}
    for rows in (["gaws", "lokr_low"], ["lokr_both", "gawsd"], [{"a": 0.5, "lokr_low": 1.0}, None]):
        bank.activate(rows)
        got, theirs, want = quick(ids).logits, by_row(judges, ids, rows), by_row(exact, ids, rows)
        assert (got - want).abs().mean() <= 1.25 * (theirs - want).abs().mean()
    assert in_kernels(records, "bank(bf16)")


@pytest.mark.parametrize("name", ["gaws", "gawsd", "gawsd_diag", "lokr", "lokr_low", "lokr_both"])
def test_read_from_all_sources_and_saved_as_peft_reads_it(judges, folders, ids, name, tmp_path):
    judge, config = judges[name], judges[name].peft_config["default"]
    bank = loaded({})
    bank.load("folder", folders[name])
    bank.load("state", load_file(folders[name] / WEIGHTS), config=config)
    bank.load("words", peft.get_peft_model_state_dict(judge), config=config.to_dict())
    bank.load("model", judge)
    for source in ("folder", "state", "words", "model"):
        bank.activate(source)
        close(bank.model(ids).logits, judge(ids).logits)
        bank.save(source, tmp_path / source)
        again = peft.PeftModel.from_pretrained(llama(), tmp_path / source).eval()
        close(again(ids).logits, judge(ids).logits)
        mine, theirs = load_file(tmp_path / source / WEIGHTS), load_file(folders[name] / WEIGHTS)
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[key])


def test_columns_that_vanish_are_saved_too(ids, tmp_path):
    """A diag of zeros leaves nothing of G's columns that could be read."""
    judge = judged("gaws")
    for key, parameter in judge.named_parameters():
        if "diag" in key:
            parameter[::3] = 0
    bank = loaded({})
    bank.load("x", judge)
    bank.save("x", tmp_path)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    close(again(ids).logits, judge(ids).logits)


@pytest.mark.parametrize("name", ["gaws", "gawsd_diag", "lokr", "lokr_both"])
def test_taken_over(judges, ids, name, tmp_path):
    judge = judges[name]
    mine = copy.deepcopy(judge)
    for layer in mine.modules():
        if isinstance(layer, peft.tuners.lokr.LoKrLayer):
            layer.set_scale("default", 3.0)
    want = mine(ids).logits
    bank = AdapterBank(mine, memory="8MB")
    close(mine(ids).logits, want)
    assert bank._width == 4 * {"lokr": 2, "lokr_both": 4}.get(name, 1)
    bank.save("default", tmp_path)
    close(peft.PeftModel.from_pretrained(llama(), tmp_path).eval()(ids).logits, want)
    with mine.disable_adapter():
        close(mine(ids).logits, llama()(ids).logits)
    mine.set_adapter("default")
    close(mine(ids).logits, want)


def test_those_that_leave_the_pool_come_back(judges, ids, tmp_path):
    """From where they came, and those that came from memory from a file that the bank writes."""
    names = ["gaws", "lokr_both", "gawsd_diag", "m"]
    whole = loaded({})
    for name in names:
        whole.load(name, judges[name])
    sizes = [info.bytes for info in whole]
    bank = loaded({}, memory=sum(sorted(sizes)[-2:]) + min(sizes) // 2)  # one is active while another comes
    for name in names:
        bank.load(name, judges[name])
    assert sum(info.resident for info in bank) < len(names)
    for name in [*names, *names]:
        bank.activate(name)
        close(bank.model(ids).logits, logits(judges, ids, name))
    bank.save("lokr_both", tmp_path)
    close(peft.PeftModel.from_pretrained(llama(), tmp_path).eval()(ids).logits, judges["lokr_both"](ids).logits)


@pytest.mark.slow  # test_join_banks has weights kept as [in, out]
def test_gpt2_s_linears():
    """Whose weights are kept as [in, out]; they have a bias."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 32}
    inner = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    target, ids = ["c_attn", "c_fc", "c_proj"], torch.randint(0, 50, (2, 7))
    plain = copy.deepcopy(inner)
    judge = peft.get_peft_model(inner, GAWSDConfig(target_modules=target, input_split_dim=8)).eval()
    for name, parameter in judge.named_parameters():
        if "GAWSD" in name:
            nn.init.normal_(parameter, std=0.3)
    bank = AdapterBank(plain, memory="1MB")
    bank.load("x", judge)
    without = plain(ids).logits
    records: list[GraphRecord] = []
    quick = torch.compile(plain, backend=rewriting(records))
    bank.activate(["x", None])
    for run in (plain, quick):
        close(run(ids).logits, torch.cat([judge(ids[:1]).logits, without[1:]]))
    assert sum(group.spec.count("bank(f32)") for group in records[0].groups) == 8


def test_gradients(folders):
    bank = loaded(folders)
    bank.activate(["lokr_both", "gaws", {"gawsd": 0.5, "a": 1.0}, None])
    layer = next(module for module in bank.model.modules() if isinstance(module, BankedLinear))
    x, step = torch.randn(4, 3, 64, requires_grad=True), torch.randn(4, 3, 64)
    with torch.enable_grad():
        weights = torch.randn(4, 3, 64)
        (found,) = torch.autograd.grad((layer(x) * weights).sum(), x)
    moved = ((layer(x + step) - layer(x)) * weights).sum()  # it is linear
    torch.testing.assert_close((found * step).sum(), moved, rtol=1e-3, atol=1e-3)


def test_a_bank_of_lora_is_as_wide_as_it_was(folders, ids):
    """Chains of one mode need no more room than LoRA, longer ones have what others leave them."""
    bank = AdapterBank(llama(), memory="8MB")
    assert bank._width == bank.max_mix == 4
    bank.activate(None)
    for name in ("gaws", "gawsd", "lokr_both", "lokr"):
        bank.load(name, folders[name])
        bank.activate(name)
    before, made = [*bank], bank.model(ids).logits
    with pytest.raises(BankError, match=r"lokr and lokr_both: 6 modes, .* place for 4: AdapterBank\(max_modes=…\)"):
        bank.activate(["gaws", {"lokr": 1.0, "lokr_both": 1.0}])
    narrow = AdapterBank(llama(), memory="8MB", max_mix=2)
    with pytest.raises(BankError, match=r"x, .*: 4 modes, and a row of this bank has place for 2: .*max_modes"):
        narrow.load("x", folders["lokr_both"])
    assert [*bank] == before and torch.equal(bank.model(ids).logits, made) and not list(narrow)
    bank.activate({"lokr": 1.0, "gaws": 1.0})
    before, made = [*bank], bank.model(ids).logits
    with pytest.raises(BankError, match="lokr and gaws: 6 modes"):
        bank.load("gaws", folders["lokr_both"])
    assert [*bank] == before and torch.equal(bank.model(ids).logits, made)


def test_too_much_for_a_pool_of_fewer_bits(folders):
    bank = AdapterBank(llama(), memory="1MB", dtype=torch.float16)
    path = "model.layers.0.self_attn.o_proj"
    with pytest.raises(BankError, match="o_proj has factors beyond"):
        bank.load("x", {f"{path}.GAWSD": torch.full((8, 8), 1e6)}, config={"peft_type": "GAWSD", "input_splits": 8})
    assert not list(bank)


def test_modes_are_what_peft_s_matrix_is(folders, judges):
    """The chain of each module as a matrix, beside ΔW as PEFT makes it."""
    modules = {path: layer for path, layer in llama().named_modules() if isinstance(layer, nn.Linear)}
    for name in ("gaws", "gawsd_diag", "lokr", "lokr_low", "lokr_both"):
        for path, chain in read(folders[name], modules).factors.items():
            n, k = sizes_of(modules[path])
            entries, at = [], 0
            for mode in chain.modes:
                entries.append((at, (mode.before, *mode.matrix.shape, mode.after)))
                at += -(-mode.matrix.numel() // banked.UNIT)
            pool = torch.zeros(at * banked.UNIT)
            for (begin, _), mode in zip(entries, chain.modes, strict=True):
                pool[begin * banked.UNIT :][: mode.matrix.numel()] = mode.matrix.flatten()
            schedule = banked.pack([banked.modes_of(entries, chain.scale)], 4)
            got = banked.apply(torch.eye(k)[None], pool, schedule, torch.zeros(1, k, n))[0].T
            layer = judges[name].get_base_model().get_submodule(path)
            torch.testing.assert_close(got, layer.get_delta_weight("default"))
