"""A bank in use: thousands of random operations beside PEFT, far more adapters on disk than fit, two threads."""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import threading
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from gawscompile.banks.bank import AdapterBank
from gawscompile.banks.checkpoints import BankError
from gawscompile.ir.records import GraphRecord
from tests.banks.common import adapted, by_row, in_kernels, llama, with_bank
from tests.graphs import rewriting

PATHS = [f"model.layers.{layer}.{name}" for layer in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")]
SIZES = {"self_attn.q_proj": (64, 64), "mlp.down_proj": (64, 96)}


def written(folder: Path, seed: int, rank: int) -> Path:
    """A LoRA in a folder, as PEFT saves it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path in PATHS:
        n, k = SIZES[path.split(".", 3)[3]]
        for name, sizes in (("lora_A", (rank, k)), ("lora_B", (n, rank))):
            tensors[f"base_model.model.{path}.{name}.weight"] = torch.randn(sizes, generator=generator) / 8
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def expected(layer: torch.nn.Module, path: str, x: torch.Tensor, folder: Path) -> torch.Tensor:
    """base(x) + B (A x), by the file itself."""
    from safetensors.torch import load_file

    found = load_file(folder / "adapter_model.safetensors")
    a, b = (found[f"base_model.model.{path}.lora_{name}.weight"] for name in "AB")
    return layer(x) + x @ a.T @ b.T


@pytest.mark.parametrize("steps", [400, pytest.param(10_000, marks=pytest.mark.slow)])
@torch.no_grad()
def test_random_operations(steps, tmp_path):
    """Load, switch, mix, scale, unload and forward, in any order, on one compiled graph; PEFT in eager mode judges."""
    numbers = random.Random(steps)
    judge = adapted("acd")
    judge.save_pretrained(tmp_path, selected_adapters=["a", "c", "d"])
    sizes = {info.name: info.bytes for info in with_bank(judge)[1]}
    model = llama()
    bank = AdapterBank(model, memory=2 * sum(sizes.values()))
    records: list[GraphRecord] = []
    compiled = torch.compile(model, backend=rewriting(records))
    ids = torch.randint(0, 128, (4, 3))
    compiled(ids)
    known: dict[str, tuple[str, float]] = {}  # name in the bank → (adapter of the judge, scale)
    active: list[dict[str, float]] = [{}] * 4
    checked = refused = 0
    handles, before = len(os.listdir("/proc/self/fd")), psutil.Process().memory_info().rss
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(steps):
            act = numbers.choice(["load", "activate", "activate", "scale", "unload", "prefetch", "forward"])
            name = numbers.choice("vwxyz")
            try:
                if act == "load":
                    source = numbers.choice("acd")
                    bank.load(name, tmp_path / source, lazy=numbers.random() < 0.3)
                    known[name] = source, 1.0
                elif act == "activate":
                    rows: list[dict[str, float]] = []
                    for _ in range(4):
                        chosen = numbers.sample(sorted(known), min(len(known), numbers.randint(0, 2)))
                        rows.append({one: numbers.choice([1.0, 0.5, -1.0]) for one in chosen})
                    bank.activate(rows)
                    active = rows
                elif act == "scale":
                    bank.scale(name, factor := numbers.choice([0.5, 1.0, 2.0]))
                    known[name] = known[name][0], factor
                elif act == "unload":
                    bank.unload(name)
                    del known[name]
                elif act == "prefetch":
                    bank.prefetch(name).result()
                elif step % (steps // 40) < 4:
                    choices = []
                    for row in active:
                        mixed: dict[str, float] = {}
                        for one, weight in row.items():
                            source, factor = known[one]
                            mixed[source] = mixed.get(source, 0.0) + weight * factor
                        choices.append(mixed or None)
                    torch.testing.assert_close(compiled(ids).logits, by_row(judge, ids, choices), rtol=5e-4, atol=5e-5)
                    checked += 1
                else:
                    compiled(ids)
            except BankError as error:
                refused += 1
                reasons = ("no adapter", "is active", "no room")
                assert any(reason in str(error) for reason in reasons)
    assert checked >= 10 and refused and in_kernels(records)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= handles + 4  # a thread's, and no more as there are more steps
    assert psutil.Process().memory_info().rss <= before + 64 * 2**20


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
@torch.no_grad()
def test_far_more_on_disk_than_fit(count, tmp_path):
    ranks = [(4, 8, 16, 32, 64)[number % 5] for number in range(count)]
    folders = [written(tmp_path / str(number), number, rank) for number, rank in enumerate(ranks)]
    model = llama()
    bank = AdapterBank(model, memory="1MB")
    for number, folder in enumerate(folders):
        bank.load(str(number), folder, lazy=True)
    assert not any(info.resident for info in bank)
    path = PATHS[1]
    layer, x = model.get_submodule(path), torch.randn(1, 3, 96)
    numbers = random.Random(0)
    for number in numbers.choices(range(count), k=2 * count):
        bank.activate(str(number))
        torch.testing.assert_close(layer(x), expected(layer.base_layer, path, x, folders[number]), rtol=1e-4, atol=1e-4)
        assert sum(info.bytes for info in bank) <= 2**20
    assert 1 < sum(info.resident for info in bank) < count


@torch.no_grad()
def test_one_thread_loads_and_switches_while_another_computes(tmp_path):
    """What a forward gives is of one adapter, though its memory is given to others all the time."""
    folders = [written(tmp_path / str(number), number, 8 + number) for number in range(6)]
    model = llama()
    bank = AdapterBank(model, memory=3 * 4 * 4 * 14 * 160)  # three or four of them
    path = PATHS[1]
    layer, x = model.get_submodule(path), torch.randn(1, 3, 96)
    wanted = [expected(layer.base_layer, path, x, folder) for folder in folders] + [layer.base_layer(x)]
    for number, folder in enumerate(folders):
        bank.load(str(number), folder, lazy=True)
    stop, failures = threading.Event(), []

    def switch() -> None:
        try:
            for number in itertools.count():
                if stop.is_set():
                    return
                bank.activate(str(number % 6))
                if number % 7 == 0:
                    bank.load(str((number + 3) % 6), folders[(number + 3) % 6])
        except Exception as error:
            failures.append(error)

    other = threading.Thread(target=switch)
    other.start()
    seen = set()
    try:
        for _ in range(400):
            got = layer(x)
            errors = [(got - want).abs().max().item() for want in wanted]
            best = min(range(7), key=errors.__getitem__)
            assert errors[best] < 1e-4, errors
            seen.add(best)
    finally:
        stop.set()
        other.join()
    assert not failures and len(seen) > 2
