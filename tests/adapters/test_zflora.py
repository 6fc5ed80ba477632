"""zFLoRA: the widened stream against one that is kept beside the model, and everything PEFT does with an adapter."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gawscompile.adapters import ZFLoRAConfig
from gawscompile.adapters.streams import DIRECTIONS, STREAMS
from gawscompile.adapters.zflora import StreamLayer
from tests.adapters.common import base, run
from tests.architectures import ARCHITECTURES
from tests.graphs import tokens

NAMES = ("Llama", "GPT-2", "T5")
FACTORS = {"both": "AB", "forward": "AM", "backward": "EB"}


def randomise(model: nn.Module, seed: int = 0, only: str = "") -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "zflora_" in name and f".{only}" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(name: str = "Llama", seed: int = 0, **settings: Any) -> Any:
    return randomise(peft.get_peft_model(base(name), ZFLoRAConfig(**{"r": 4, **settings})).eval(), seed)


def beside(model: Any, name: str, adapters: dict[str, str]) -> torch.Tensor:
    """The outputs of the bare model with the factors of `adapters` (name → direction) in `model`, and each z kept
    beside it: hooks add B z to what readers give, and A a to z where writers are called."""
    bare, streams = base(name), {}
    kind = STREAMS[model.config.model_type]
    factors = {
        key.removeprefix("base_model.model."): value for key, value in model.state_dict().items() if "zflora_" in key
    }

    def factor(path: str, leaf: str, adapter: str) -> torch.Tensor | None:
        return factors.get(f"{path}.zflora_{leaf}.{adapter}.weight")

    def begin(stack: str, h: torch.Tensor) -> None:
        for adapter in adapters:
            e = factor(f"{stack}.{kind.last}", "E", adapter)
            streams[adapter] = h.new_zeros(*h.shape[:-1], 4) if e is None else F.linear(h, e)

    def read(path: str, y: torch.Tensor) -> torch.Tensor:
        for adapter, z in streams.items():
            if (b := factor(path, "B", adapter)) is not None:
                y = y + F.linear(z[..., : b.shape[1]], b)
        return y

    def write(path: str, a: torch.Tensor) -> None:
        for adapter in adapters:
            if (w := factor(path, "A", adapter)) is not None:
                z = F.linear(a, w)
                streams[adapter] = streams[adapter] + F.pad(z, (0, 4 - z.shape[-1]))

    def end(path: str, h: torch.Tensor) -> torch.Tensor:
        for adapter, z in streams.items():
            if (m := factor(path, "M", adapter)) is not None:
                h = h + F.linear(z, m)
        return h

    for path, module in bare.named_modules():
        role = kind.role(path)
        if role == "first":
            stack = path.rpartition(".")[0].rpartition(".")[0]
            module.register_forward_pre_hook(
                lambda _, args, kwargs, stack=stack: begin(stack, args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        elif role == "reader":
            module.register_forward_hook(lambda _, args, y, path=path: read(path, y))
        elif role == "writer":
            module.register_forward_hook(lambda _, args, y, path=path: write(path, args[0]))
        elif role == "last":
            module.register_forward_pre_hook(lambda _, args, path=path: (end(path, args[0]),))
    return run(bare, name)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_new_adapter_starts_as_the_base(name: str, direction: str):
    model = peft.get_peft_model(base(name), ZFLoRAConfig(r=4, direction=direction)).eval()
    leaves = {key.split("zflora_")[1][0] for key in model.state_dict() if "zflora_" in key}
    assert leaves == set(FACTORS[direction])
    torch.testing.assert_close(run(model, name), run(base(name), name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_the_stream_is_what_a_z_beside_the_model_is(name: str, direction: str):
    model = adapted(name, direction=direction)
    found = run(model, name)
    assert (found - run(base(name), name)).abs().max() > 1e-3
    torch.testing.assert_close(found, beside(model, name, {"default": direction}), rtol=1e-5, atol=1e-5)


def test_ranks_and_targets_by_module():
    model = adapted(target_modules=["q_proj", "down_proj", "o_proj"], rank_pattern={"down_proj": 2, "1.*q_proj": 3})
    shapes = {
        key.split("layers.")[1]: tuple(value.shape) for key, value in model.state_dict().items() if "lora_" in key
    }
    assert shapes["0.mlp.down_proj.zflora_A.default.weight"] == (2, 96)
    assert shapes["1.self_attn.q_proj.zflora_B.default.weight"] == (64, 3) and len(shapes) == 6
    torch.testing.assert_close(run(model), beside(model, "Llama", {"default": "both"}), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_fused_weights_give_the_same_and_go_again(name: str):
    model, bare = adapted(name), base(name)
    before, state = run(model, name), {key: value.clone() for key, value in model.state_dict().items()}
    model.merge_adapter()
    layers = [module for module in model.modules() if isinstance(module, StreamLayer)]
    assert any(layer.fused is not None for layer in layers) and model.state_dict().keys() == state.keys()
    torch.testing.assert_close(run(model, name), before, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(run(model, name), run(bare, name))
    model.unmerge_adapter()
    assert torch.equal(run(model, name), before) and all(layer.fused is None for layer in layers)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    with model.disable_adapter():
        assert torch.equal(run(model, name), run(bare, name))
    assert torch.equal(run(model.unload(), name), run(bare, name))


def test_merging_refuses_what_is_not_finite():
    model = adapted()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "zflora_A" in n)[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    with pytest.raises(ValueError, match="merge_adapter\\(\\) fuses"):
        model.merge_and_unload()


def test_several_adapters_switch_join_and_go():
    model = adapted()
    model.add_adapter("other", ZFLoRAConfig(r=4, direction="backward"))
    randomise(model, 1, "other")
    first = run(model)
    model.set_adapter("other")
    torch.testing.assert_close(run(model), beside(model, "Llama", {"other": "backward"}), rtol=1e-5, atol=1e-5)
    model.base_model.set_adapter(["default", "other"])
    both = {"default": "both", "other": "backward"}
    joined = run(model)
    torch.testing.assert_close(joined, beside(model, "Llama", both), rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(run(model), joined, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(run(model), first)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_it_gives_the_same_bits(name: str, tmp_path):
    model = adapted(name, direction="both", rank_pattern={"q_proj": 2} if name == "Llama" else {})
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(name), tmp_path).eval()
    assert torch.equal(run(loaded, name), run(model, name))
    assert loaded.peft_config["default"].model_type == model.config.model_type
    quick = peft.PeftModel.from_pretrained(base(name), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(run(quick, name), run(model, name))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_loss_and_touches_only_factors(name: str, direction: str):
    model = peft.get_peft_model(base(name), ZFLoRAConfig(r=4, direction=direction)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    wanted = torch.randn_like(run(model, name))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    architecture = ARCHITECTURES[name]
    for _ in range(12):
        loss = F.mse_loss(model(**architecture.inputs(), **architecture.calls)[0], wanted)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1e-3
    for n, p in model.named_parameters():
        assert ("zflora_" in n) == p.requires_grad
        assert n not in frozen or torch.equal(p, frozen[n]), n


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_are_those_of_finite_differences(direction: str):
    model = adapted("GPT-2", direction=direction).double()  # whose norms stay in fp64, unlike Llama's
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(3)
    unused = [n for n in names if ("h.0.attn" in n and "_B" in n) or "h.1.mlp.c_proj" in n]
    unused = unused if direction == "both" else []  # they read z where it is zero, and write it where nobody reads
    chosen = [n for n in names if n not in unused][::2]
    weights = torch.randn(run(model, "GPT-2").shape, generator=generator, dtype=torch.float64)

    def loss() -> torch.Tensor:
        architecture = ARCHITECTURES["GPT-2"]
        return (model(**architecture.inputs(), **architecture.calls)[0] * weights).sum()

    loss().backward()
    assert [n for n in names if not model.get_parameter(n).grad.abs().max()] == unused
    for name in chosen:
        parameter = model.get_parameter(name)
        direction_ = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        step, kept = 1e-6, parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(kept + step * direction_)
            up = loss()
            parameter.copy_(kept - step * direction_)
            down = loss()
            parameter.copy_(kept)
        slope = (parameter.grad * direction_).sum()
        torch.testing.assert_close((up - down) / (2 * step), slope, rtol=1e-6, atol=1e-6)
        assert slope.abs() > 1e-6


def test_checkpointed_gradients_are_the_same():
    grads = []
    for checkpointed in (False, True):
        model = adapted().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(input_ids=tokens(2, 7), use_cache=False)[0].sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_a_growing_cache_and_embeddings_as_inputs():
    model = adapted()
    ids = tokens(1, 6)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :4], use_cache=True)
        rest = model(input_ids=ids[:, 4:], past_key_values=first.past_key_values).logits
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(rest, whole[:, 4:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embedded, whole, rtol=1e-5, atol=1e-5)


def test_dtypes_follow_peft():
    model = peft.get_peft_model(base().bfloat16(), ZFLoRAConfig(r=4)).eval()
    assert {p.dtype for n, p in model.named_parameters() if "zflora_" in n} == {torch.float32}
    assert run(randomise(model)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r=0: it is a whole number from 1 up"),
        ({"direction": "sideways"}, "it is one of 'both', 'forward', 'backward'"),
        ({"r": 4, "rank_pattern": {"q_proj": 8}}, r"rank_pattern\['q_proj'\]=8: z is only r=4 wide"),
        ({"target_modules": ["nothing"]}, "matches no reader or writer"),
        ({"target_modules": ["embed_tokens"]}, "matches no reader or writer"),
        ({"model_type": "gpt2"}, "made for 'gpt2', and the model is a 'llama'"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_changes(settings: dict[str, Any], message: str):
    model = base()
    modules = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, ZFLoRAConfig(**settings))
    assert [type(module) for module in model.modules()] == modules


def test_other_architectures_are_refused():
    with pytest.raises(ValueError, match=r"residual streams of gpt2, llama.*not of 'roberta'"):
        peft.get_peft_model(base("RoBERTa"), ZFLoRAConfig())


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    save_file({key: value for key, value in state.items() if "1.mlp" not in key}, file)
    with pytest.raises(ValueError, match=r"missing: .*layers.1.mlp"):
        peft.PeftModel.from_pretrained(base(), tmp_path)
