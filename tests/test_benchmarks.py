"""The runtime benchmark, on a tiny random model."""

from __future__ import annotations

import copy
import itertools
import json

import peft
import pytest
import torch
import transformers

from benchmarks import common, compile_time, gaws_gap, generate, growth, kernels, limits, live, memory, runtime, zflora
from benchmarks.common import Setup
from benchmarks.shapes import SHAPES, Shape
from gawscompile.calibration import measure


def test_tables_and_files(tiny_llama_dir, tmp_path, capsys):
    flags = ["--model", str(tiny_llama_dir), "--backends", "eager", "--rounds", "1", "--steps", "2"]
    runtime.main([*flags, "--json", str(tmp_path / "out" / "r.json"), "--markdown", str(tmp_path / "r.md")])
    out = capsys.readouterr().out
    assert "decode, 64 past" in out and "prefill 128" in out
    assert "No graph was compiled during the timed rounds." in out
    rows = json.loads((tmp_path / "out" / "r.json").read_text())["rows"]
    assert [(row["case"], row["adapter"]) for row in rows] == [
        ("decode, 64 past", "base"),
        ("decode, 64 past", "lora"),
        ("prefill 128", "base"),
        ("prefill 128", "lora"),
    ]
    assert all(row["ms"]["count"] == 2 and row["ms_without_guards"] is None for row in rows)
    assert "| eager lora |" in (tmp_path / "r.md").read_text()


def test_one_phase_alone(tiny_llama_dir, tmp_path):
    flags = ["--model", str(tiny_llama_dir), "--backends", "eager", "--rounds", "1", "--steps", "1", "--phases"]
    runtime.main([*flags, "decode", "--json", str(tmp_path / "r.json")])
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["case"] for row in rows] == ["decode, 64 past"] * 2
    with pytest.raises(SystemExit, match="no model here has a call of encode"):
        runtime.main([*flags, "encode"])


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_the_published_ones(name):
    llamas = {"llama-3.2-1b": 1236, "llama-3.2-3b": 3213, "llama-7b": 6738}
    published = {"gpt2-large": 774, "roberta-large": 355, "bert-base": 110, "vit-base": 86, "t5-3b": 2852, **llamas}
    with torch.device("meta"):
        model = getattr(transformers, SHAPES[name].model)(SHAPES[name].config())
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(millions - published[name]) < 1


def test_cut_shapes_say_so(monkeypatch, capsys):
    small = Shape(
        "T5ForConditionalGeneration",
        {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4},
        3,
        ("num_layers", "num_decoder_layers"),
    )
    monkeypatch.setitem(SHAPES, "small", small)
    runtime.main(["--model", "small", "--layers", "1", "--backends", "eager", "--rounds", "1", "--steps", "1"])
    out = capsys.readouterr().out
    assert "small (1 of 3 layers), float32, decode, 64 past" in out and "encode 128" in out


@pytest.mark.parametrize("kind", ["gaws", "gawsd", "lokr", "zflora"])
def test_adapters_of_one_budget(kind):
    base = SHAPES["llama-3.2-1b"]
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(base.config(1))
    counts = {}
    for name in ("lora", kind):
        with torch.device("meta"):
            adapted = peft.get_peft_model(copy.deepcopy(model), common.adapter_config(model, name, 16))
        counts[name] = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert 0.75 < counts[kind] / counts["lora"] < (1.5 if kind == "lokr" else 1.3)  # LoKr has one factor for all


def test_gap_of_gaws(monkeypatch, tmp_path, capsys):
    small = Shape("GPT2LMHeadModel", {"n_embd": 32, "n_head": 4, "vocab_size": 128}, 3, ("n_layer",))
    monkeypatch.setitem(SHAPES, "small", small)
    flags = ["--model", "small", "--layers", "1", "--backends", "eager", "--rounds", "1", "--steps", "1", "--rank", "4"]
    pytest.importorskip("matplotlib")
    gaws_gap.main([*flags, "--markdown", str(tmp_path / "gap.md"), "--plot", str(tmp_path / "gap.png")])
    assert "small (1 of 3 layers)" in capsys.readouterr().out
    assert " prefill 128 |" in (tmp_path / "gap.md").read_text() and (tmp_path / "gap.png").stat().st_size
    times = {"base": 10.0, "lora": 20.0, "gaws": 14.0, "gawsd": 10.0}
    assert gaws_gap.share(times, "gaws") == 0.4 and gaws_gap.share(times, "gawsd") == 0
    assert gaws_gap.share({**times, "lora": 10.1}, "gaws") is None


@pytest.mark.slow
def test_cost_of_a_widened_stream(tiny_llama_dir, tmp_path):
    flags = ["--model", str(tiny_llama_dir), "--dtype", "float32", "--backends", "eager", "--rounds", "1"]
    zflora.main([*flags, "--steps", "1", "--rank", "4", "--markdown", str(tmp_path / "zflora.md")])
    heads, *rows = [line for line in (tmp_path / "zflora.md").read_text().splitlines() if line.startswith("|")][::2]
    assert "zFLoRA" in heads and len(rows) == 1
    base = common.load_base(Setup(str(tiny_llama_dir)))
    adapted = common.with_adapter(base, Setup(str(tiny_llama_dir), rank=4), "zflora")
    factors = sum(p.nbytes for p in adapted.parameters() if p.requires_grad)
    weights = sum(p.nbytes for p in base.parameters()) - base.get_input_embeddings().weight.nbytes
    assert zflora.byte_share(Setup(str(tiny_llama_dir), rank=4), "zflora") == pytest.approx(factors / weights)


def test_shapes_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr("benchmarks.shapes.total_memory", lambda: 2**30)
    with pytest.raises(MemoryError, match=r"llama.*|--layers N"):
        SHAPES["llama-3.2-1b"].build(torch.float32)


def timing(median: float) -> dict[str, float]:
    return {"median": median, "low": median, "high": median, "minimum": median - 1, "maximum": median + 1, "count": 3}


def row(backend: str, adapter: str, median: float, recompiled: int = 0) -> runtime.Row:
    return {
        "model": "m",
        "dtype": "float32",
        "case": "decode",
        "backend": backend,
        "adapter": adapter,
        "ms": timing(median),
        "ms_without_guards": None if backend == "eager" else timing(median - 0.5),
        "compile_s": None if backend == "eager" else 3.0,
        "compile_cached": False,
        "recompiled_while_timed": recompiled,
    }


def test_ratios_are_to_inductors_base_and_to_ones_own():
    rows = [row("inductor", "base", 20.0), row("gaws", "base", 10.0), row("gaws", "lora", 12.0)]
    table = runtime.runtime_tables(rows, markdown=False)
    (line,) = [line for line in table.splitlines() if line.startswith("gaws lora")]
    assert line.split() == ["gaws", "lora", "12.00", "11.00", "12.00-12.00", "11.50", "0.50", "0.60", "1.20", "3.0"]
    assert "Tax over gaws base: +2.00 ms (1.20×)." in table
    assert "WARNING" in runtime.runtime_tables([row("gaws", "base", 1.0, recompiled=1)], markdown=False)


def test_processes_merge_into_the_median_of_medians():
    merged = runtime.merge([row("gaws", "base", value) for value in (3.0, 9.0, 4.0)])
    assert merged["ms"] == {"median": 4.0, "low": 3.0, "high": 9.0, "minimum": 2.0, "maximum": 10.0, "count": 9}
    assert merged["processes"] == 3


def test_a_child_process_gets_the_flags_that_are_its_own():
    argv = ["--model", "m", "--json", "a", "--processes=3", "--markdown", "b", "--memory", "--rounds", "2"]
    assert runtime.child_arguments(argv) == ["--model", "m", "--rounds", "2"]


def test_memory_counts_every_storage_once(tiny_llama_dir):
    found = memory.probe(Setup(str(tiny_llama_dir)), "eager", adapted=True)
    assert found["tensors_before"] and found["tensors_after"]
    assert found["tensors_after"] < 4 * found["tensors_before"]


@pytest.mark.slow
def test_account_of_a_layer_and_its_kernels(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    small = Shape("LlamaForCausalLM", {"vocab_size": 64, **sizes}, 3, ("num_hidden_layers",))
    monkeypatch.setitem(SHAPES, "llama-3.2-1b", small)
    flags = ["--model", "llama-3.2-1b", "--adapters", "lora", "--rank", "4"]
    kernels.main([*flags, "--no-compile", "--markdown", str(tmp_path / "k.md")])
    lines = [line.split("|")[1:4] for line in (tmp_path / "k.md").read_text().splitlines()]
    found = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines if len(cells) == 3}
    assert found["none"] == ["7 + 0", "4"], "q, k, v, o, gate, up, down; ours: qkv, o, gate with up, down"
    assert found["lora"][0].startswith("21 + ") and found["lora"][1] == "4"
    jobs = list(kernels.plans_of({("llama-3.2-1b", "lora"): kernels.trace("llama-3.2-1b", "lora", 4)}, ["cuda:90"]))
    assert {job.members for job in jobs} == {"q_proj + k_proj + v_proj", "o_proj", "gate_proj + up_proj", "down_proj"}
    (line,) = kernels.compile_job(next(job for job in jobs if job.plan.name == "single_launch"))
    assert line.registers > 16 and line.spills == 0 and line.narrowest_w_load == 16 and line.ordering


def test_floors_and_multiples_of_them(tiny_llama_dir, monkeypatch, tmp_path):
    monkeypatch.setattr(limits, "BUFFER", 1 << 20)
    monkeypatch.setattr(limits, "SQUARE", 64)
    found = limits.machine(rounds=1)
    assert found.bandwidth > 0 and set(found.rates) == {"float32", "bfloat16"}
    assert found.rates["bfloat16"] >= found.rates["float32"]  # bf16 may be widened
    setup = Setup(str(tiny_llama_dir), rank=4)
    base = common.load_base(setup)
    bare, lora = (limits.work(setup, kind) for kind in ("base", "lora"))
    factors = sum(p.nbytes for p in common.with_adapter(base, setup).parameters() if p.requires_grad)
    for case, work in bare.items():
        assert lora[case].read - work.read == factors
        assert sum(lora[case].operations.values()) > sum(work.operations.values())
    slow = limits.Machine(bandwidth=1e6, rates={"float32": 1e30, "bfloat16": 1e30})
    decode = "decode, 64 past"
    assert bare[decode].floor(slow) == pytest.approx(bare[decode].read / 1e3)
    floors = {("float32", "decode", kind): 2.0 for kind in ("base", "lora")}
    lines = limits.lines([row("inductor", "base", 8.0), row("gaws", "lora", 5.0)], floors)
    assert [line["times"] for line in lines] == [4.0, 2.5] and lines[1]["bare"] == 4.5
    text = limits.table(lines, markdown=True)
    assert text.index("gaws lora") < text.index("inductor base") and "0.62" in text
    pytest.importorskip("matplotlib")
    limits.plot(lines, tmp_path / "limits.png")
    assert (tmp_path / "limits.png").stat().st_size


@pytest.mark.slow
def test_banks_beside_what_else_serves_adapters(tiny_llama_dir, tmp_path):
    """Each table has its rows; that nothing is compiled anew while they are measured, the benchmark asserts."""
    flags = ["--model", str(tiny_llama_dir), "--rank", "4", "--rounds", "1", "--batch", "2", "--distinct", "1", "2"]
    flags += ["--phases", "decode", "prefill", "--resident", "5", "--disk", "8"]
    live.main([*flags, "--markdown", str(tmp_path / "live.md")])
    lines = [line for line in (tmp_path / "live.md").read_text().splitlines() if line.startswith("|")]
    firsts = [line.split("|")[1].strip() for line in lines]
    assert firsts[2:6] == ["base", "PEFT", "bank", "bank, none active"]
    assert firsts.count("decode") == firsts.count("prefill") == 3  # no adapter, one, two
    assert "activate, 5 adapters of rank 4 to 64" in "".join(firsts) and firsts[-2:] == ["1", "8"]


@pytest.mark.slow
def test_growth_beside_its_prediction(tmp_path):
    start = growth.Stack(width=48, layers=1, rank=2)
    points = growth.sweep("adapters", "float32", 1, (1,), start)
    assert [(p.sweep, p.value) for p in points] == [("adapters", 1)]
    assert points[0].measured.median > 0
    bare = growth.Stack(width=48, layers=1, rank=0)
    assert points[0].predicted == start.predicted("float32") > bare.predicted("float32") > 0
    specs = growth.Stack().specs("bfloat16")
    assert [(s.k, [p.n for p in s.projections], s.swiglu) for s in specs] == [
        (576, [576, 192, 192], False),
        (576, [576], False),
        (576, [1536, 1536], True),
        (1536, [576], False),
    ]
    assert "| adapters 1 | float32 |" in growth.table(points, markdown=True)
    pytest.importorskip("matplotlib")
    growth.plot(points, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size


def test_q_and_k_turn_in_pairs_in_llama_cpp(tiny_llama_dir):
    from benchmarks import ggml

    model = common.load_base(Setup(str(tiny_llama_dir)))
    config, named = model.config, {name: numbers for name, numbers, _ in ggml.weights(model)}
    q, heads = model.model.layers[0].self_attn.q_proj.weight, model.config.num_attention_heads
    head = q.view(heads, -1, q.shape[1])
    got = named["blk.0.attn_q.weight"].view(heads, -1, q.shape[1])
    half = head.shape[1] // 2
    assert torch.equal(got[:, 0::2], head[:, :half]) and torch.equal(got[:, 1::2], head[:, half:])
    assert named["blk.0.ffn_up.weight"] is model.model.layers[0].mlp.up_proj.weight
    assert len(named) == 2 + 9 * config.num_hidden_layers + (not config.tie_word_embeddings)


def test_llama_cpp_gets_as_many_bits(tiny_llama_dir):
    pytest.importorskip("torchao")
    from benchmarks import ggml

    setup = Setup(str(tiny_llama_dir), "bfloat16", quantize="int8")
    plain, packed = common.load_base(Setup(str(tiny_llama_dir), "bfloat16")), common.load_base(setup)
    bits = {name: (numbers, count) for name, numbers, count in ggml.weights(packed)}
    assert {count for name, (_, count) in bits.items() if name.startswith("blk.0.ffn")} == {8, 16}  # and its norm
    assert bits["token_embd.weight"][1] == 16
    wanted = plain.model.layers[0].mlp.up_proj.weight.double()
    assert (bits["blk.0.ffn_up.weight"][0] - wanted).abs().max() < wanted.abs().max() / 127


@pytest.mark.slow
def test_a_token_taken_apart(tiny_llama_dir, monkeypatch, capsys):
    from benchmarks import breakdown

    monkeypatch.setattr(limits, "BUFFER", 1 << 20)
    monkeypatch.setattr(limits, "SQUARE", 64)
    flags = ["--model", str(tiny_llama_dir), "--dtype", "float32", "--rank", "4", "--rounds", "1", "--steps", "1"]
    breakdown.main(flags)
    lines = capsys.readouterr().out.splitlines()
    (bare,) = [line for line in lines if line.startswith("float32, base ")]
    (lora,) = [line for line in lines if line.startswith("float32, lora ")]
    layers = common.load_base(Setup(str(tiny_llama_dir))).config.num_hidden_layers
    assert int(lora.split()[-1]) in (4 * layers, 4 * layers + 1), "qkv, o, gate and up, down, and perhaps the head"
    assert 0 < int(bare.split()[-1]) <= 4 * layers + 1
    assert breakdown.parts({"a": 10.0, "b": 8.0, "c": 7.0, "d": 4.0}) == [2.0, 1.0, 3.0, 4.0]


def test_compile_time_reports_what_a_file_holds(monkeypatch, tmp_path, capsys):
    """Tables and plot of made-up cells, none of which is measured again."""
    pytest.importorskip("matplotlib")

    def row(layers, backend, adapted, warm):
        spent = {"_compile.compile_inner": 8.0, "OutputGraph.call_user_compiler": 6.0, "compile_fx_inner": 3.0}
        spent |= {"pass.joint_graph_passes.joint_custom_pre_pass": 0.5, "_recursive_joint_graph_passes": 1.0}
        stages = compile_time.stages(spent | {"async_compile.wait": 1.0}, 9.0)
        assert sum(stages.values()) == pytest.approx(9.0) and min(stages.values()) >= 0
        told = {"seconds": 9.0, "cpu": 9.0, "stages": stages, "passes": {"lower": 0.1 * layers}, "peak": 2**20}
        key = {"layers": layers, "backend": backend, "adapted": adapted, "warm": warm, "repeat": 0}
        return key | told | {"counts": {"passes": 0 if warm else 10}}

    keys = itertools.product((4, 8), ("gaws", "inductor"), (True, False), (False, True))
    file = tmp_path / "kept.json"
    file.write_text(json.dumps({"machine": measure.machine(), "rows": [row(*key) for key in keys]}))
    monkeypatch.setattr(compile_time, "run", None)
    flags = ["--quick", "--json", str(file), "--markdown", str(tmp_path / "c.md"), "--plot", str(tmp_path / "c.png")]
    compile_time.main(flags)
    out = capsys.readouterr().out
    assert "8 layers, adapted, gaws" in out and "to the power of 0.00" in out
    assert "| lower " in (tmp_path / "c.md").read_text() and " 1.00 |" in (tmp_path / "c.md").read_text()
    assert (tmp_path / "c.png").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_llama_cpp_says_what_eager_says(dtype):
    pytest.importorskip("llama_cpp", reason="pip install 'gawscompile[llama]'")
    from benchmarks import ggml

    setup = Setup("smollm2", dtype)
    base = common.load_base(setup)
    ids = common._ids(base, 20)
    for model in (base, common.with_adapter(base, setup)):
        with torch.no_grad():
            want = model(input_ids=ids).logits[0, -1].float()
        got = ggml.Peer(model, 32).logits(ids[0].tolist())
        assert (got - want).abs().max() < (0.05 if dtype == "float32" else 1.0) and got.argmax() == want.argmax()


@pytest.mark.slow
def test_fresh_processes(tiny_llama_dir, tmp_path, capsys):
    flags = ["--model", str(tiny_llama_dir), "--backends", "inductor,gaws", "--rounds", "1", "--steps", "1"]
    runtime.main([*flags, "--processes", "2", "--memory", "--json", str(tmp_path / "r.json")])
    result = json.loads((tmp_path / "r.json").read_text())
    assert all(row["processes"] == 2 for row in result["rows"])
    assert len(result["memory"]) == 4
    assert "Tax over gaws base" in capsys.readouterr().out


def test_generate(tiny_llama_dir, tmp_path, capsys, monkeypatch):
    """Eager mode alone; what would be compiled is compiled by a backend that does nothing."""
    monkeypatch.setattr(generate.gawscompile, "compile", lambda model: model)
    flags = ["--model", str(tiny_llama_dir), "--dtype", "float32", "--backends", "eager,gaws"]
    flags += ["--prompt", "4", "--new", "5", "--rounds", "2"]
    out = tmp_path / "g.json", tmp_path / "g.md", tmp_path / "g.png"
    generate.main([*flags, "--json", str(out[0]), "--markdown", str(out[1])])
    found = json.loads(out[0].read_text())
    assert [(row["backend"], row["adapter"]) for row in found["rows"]] == [
        (backend, adapter) for backend in ("eager", "gaws") for adapter in ("base", "lora")
    ]
    for row in found["rows"]:
        assert row["same"] == 5 and len(row["rates"]) == 2 and min(row["rates"]) > 0 < min(row["firsts"])
    assert 0 < found["loops"]["float32"] < 1e3 / found["rows"][0]["rate"] * 2
    assert "5 of 5" in capsys.readouterr().out and "| eager lora |" in out[1].read_text()
    other = [{**row, "rate": 3 * row["rate"]} for row in found["rows"]]
    both = generate.merged([found["rows"], other, other])
    assert [row["rate"] for row in both] == [row["rate"] for row in other]
    pytest.importorskip("matplotlib")
    generate.plot(found["rows"], out[2])
    assert out[2].stat().st_size
    for wrong in (["--new", "2"], ["--backends", "OpenVINO"], ["--backends", "OpenVINO", "--batch", "2"]):
        with pytest.raises(SystemExit):
            generate.main(wrong)
