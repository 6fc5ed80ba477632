"""Ways to compile, wrap, copy and save a model with adapters: each gives eager's answers from generated kernels."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import peft
import pytest
import torch
from torch._inductor import list_mode_options

import gawscompile
from gawscompile.calibration.measure import graphs_compiled
from gawscompile.observe.store import RECORDS
from tests.graphs import randomise, small_llama, tokens
from tests.ways import OPTIONS, WAYS, compiled, fused, fusing, settings

IDS = tokens(1, 5)
LINEARS = 7  # of a layer, all of them with a LoRA
both = pytest.mark.parametrize("way", WAYS)


@torch.no_grad()
def logits(call, ids=IDS):
    return call(ids, use_cache=False).logits


def close(got, want, loose=1e-4):
    torch.testing.assert_close(got, want, rtol=loose, atol=loose)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
@both
def test_inductor_modes(way, mode, monkeypatch):
    """On a CPU there are no CUDA graphs, and nothing to tune: both run as the default does, whatever lengths come."""
    model = small_llama(layers=1)
    with fusing(LINEARS):
        if way == "watch=False":
            monkeypatch.setenv("GAWS_WATCH", "0")  # torch.compile takes a mode or options
            call = torch.compile(model, backend="gaws", mode=mode)
        else:
            call = gawscompile.compile(model, options={**list_mode_options(mode), **OPTIONS})
        for ids in (IDS, IDS, tokens(1, 9), tokens(2, 3)):
            close(logits(call, ids), logits(model, ids))


@pytest.mark.slow
@both
def test_regions(way):
    """accelerate compiles every decoder layer by itself; all of them share one graph."""
    from accelerate.utils import compile_regions

    model, mark = small_llama(layers=3), len(RECORDS)
    want = logits(model)
    with fusing(LINEARS):
        close(logits(compile_regions(model, **settings(way))), want)
    assert [fused(record) for record in RECORDS.since(mark)].count(LINEARS) == 1


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
@both
def test_each_layer(way, in_place):
    model = small_llama(layers=3)
    inputs = (IDS, tokens(1, 9))
    want, graphs = [logits(model, ids) for ids in inputs], graphs_compiled()
    layers = model.get_base_model().model.layers
    for i, layer in enumerate(layers):
        if in_place:
            layer.compile(**settings(way))
        else:
            layers[i] = compiled(way, layer)
    with fusing(LINEARS):
        for ids, logits_ in zip(inputs, want, strict=True):
            close(logits(model, ids), logits_)
    assert graphs_compiled() - graphs == 2  # one for all layers, and one more for any length


@both
def test_data_parallel(way):
    """Without GPUs it is the module that it holds."""
    model = small_llama(layers=1)
    want = logits(model)
    with fusing(LINEARS):
        close(logits(compiled(way, torch.nn.DataParallel(model))), want)
        torch._dynamo.reset()
        close(logits(torch.nn.DataParallel(compiled(way, model))), want)


@pytest.mark.slow
@both
def test_mixed_adapters(way):
    """LoRA, LoKr and LoHa at once, switched; a LoHa beside another's base is a second full matrix, and is left."""
    base = small_llama(layers=1, lora=None)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"])
    model = peft.PeftMixedModel(base, lora, "lora")
    lokr = peft.LoKrConfig(r=4, target_modules=["k_proj", "v_proj", "o_proj"], init_weights=False)
    model.add_adapter("lokr", lokr)
    model.add_adapter("loha", peft.LoHaConfig(r=3, target_modules=["v_proj"], init_weights=False))
    randomise(model.eval())
    call = compiled(way, model)
    with fusing():
        for names in (["lora"], ["lora", "lokr"], ["lora", "lokr", "loha"], "lokr", "lora"):
            model.set_adapter(names)
            close(logits(call), logits(model))


@both
def test_hooks_that_change_what_a_module_returns(way):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Double(ModelHook):
        def post_forward(self, module, output):
            return 2.0 * output

    model = small_llama(layers=1)
    plain = logits(model)
    add_hook_to_module(model.get_base_model().model.layers[0].mlp.down_proj, Double())
    want = logits(model)
    assert not torch.allclose(want, plain, atol=1e-3)
    with fusing():
        close(logits(compiled(way, model)), want)


@pytest.mark.slow
@both
def test_a_dispatched_model_is_right_and_left_to_eager(way):
    """`dispatch_model` puts a hook on every module, and forbids Dynamo to trace it: no linear is left in a graph."""
    from accelerate import dispatch_model

    model, mark = dispatch_model(small_llama(layers=1), {"": "cpu"}, main_device="cpu", force_hooks=True), len(RECORDS)
    assert model._hf_hook
    close(logits(compiled(way, model)), logits(model))
    assert not any(fused(record) for record in RECORDS.since(mark))


@pytest.mark.slow
@both
def test_device_map(way, tiny_llama_dir):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, device_map={"": "cpu"})
    lora = peft.LoraConfig(r=4, target_modules="all-linear")
    model = randomise(peft.get_peft_model(base, lora).eval())
    with fusing(2 * LINEARS):
        close(logits(compiled(way, model)), logits(model))


@pytest.mark.slow
@both
def test_modes_of_torch_in_turns(way):
    """no_grad, inference_mode and autocast over one compiled model."""
    model = small_llama(layers=1)
    call, want = compiled(way, model), logits(model)
    with fusing():  # under autocast without those whose activation alone is bf16
        close(logits(call), want)
        with torch.inference_mode():
            close(call(IDS, use_cache=False).logits, want)
        with torch.autocast("cpu", torch.bfloat16):
            got, eager = logits(call).float(), logits(model).float()
        close(logits(call), want)
    assert (got - want).norm() <= 1.25 * (eager - want).norm() + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@both
def test_models_of_another_dtype(way, dtype):
    """`model.half()` and `.bfloat16()`, adapters too, before compiling."""
    exact = logits(small_llama(layers=1).double())
    model = small_llama(layers=1).to(dtype)
    with fusing(LINEARS):
        got = logits(compiled(way, model)).double()
    assert (got - exact).norm() <= 1.25 * (logits(model).double() - exact).norm()


@pytest.fixture(scope="module")
def served():
    """A model, compiled for serving, and what it answers; tests leave its numbers as they are."""
    model = small_llama(layers=1)
    with fusing(LINEARS):
        call = gawscompile.compile(model, options=OPTIONS)
        return model, call, logits(call)


def scaled(model, factor):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(factor)


def test_deepcopy(served):
    """A copy is compiled anew, and has parameters of its own."""
    _, call, want = served
    twin = copy.deepcopy(call)
    with fusing(LINEARS):
        close(logits(twin), want)
        scaled(twin, 2.0)
        close(logits(twin), logits(twin._orig_mod))
    assert not torch.allclose(logits(twin), want, atol=1e-3)
    close(logits(call), want)


def test_pickle_and_torch_save(served):
    """The model is pickled, not what was compiled of it: what is read back answers the same."""
    _, call, want = served
    file = io.BytesIO()
    torch.save(call, file)
    file.seek(0)
    for read in (pickle.loads(pickle.dumps(call)), torch.load(file, weights_only=False)):
        close(logits(read), want)


def test_state_dicts(served):
    """The model's own is as before compiling; the compiled module's has torch's prefix, and loads where that is."""
    model, call, want = served
    other = randomise(small_llama(layers=1), seed=9)
    assert not torch.allclose(logits(other), want, atol=1e-3)
    other_call = gawscompile.compile(other, options=OPTIONS)
    before = logits(other_call)
    other.load_state_dict(saved(model.state_dict()))
    close(logits(other), want)
    close(logits(other_call), want)  # written in place: the next call sees it
    randomise(other, seed=9)
    close(logits(other_call), before)
    assert all(name.startswith("_orig_mod.") for name in call.state_dict())
    other_call.load_state_dict(saved(call.state_dict()))
    close(logits(other_call), want)


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


def test_save_pretrained(served, tmp_path):
    """Adapters that a compiled model saves load into a base, compiled or not."""
    model, call, want = served
    for number, each in enumerate((model, call)):
        each.save_pretrained(tmp_path / str(number))
        base = small_llama(layers=1, lora=None)
        close(logits(peft.PeftModel.from_pretrained(base, tmp_path / str(number)).eval()), want)


@pytest.mark.slow
@both
def test_threads(way):
    """One compiled model, called by six threads with lengths of their own; some of them compile."""
    model = small_llama(layers=1)
    call = compiled(way, model)
    inputs = [tokens(1, 2 + i, seed=i) for i in range(6)]
    wanted, failures = [logits(model, ids) for ids in inputs], []

    def work(i):
        try:
            for _ in range(3):
                close(logits(call, inputs[i]), wanted[i])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    with fusing(LINEARS):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
