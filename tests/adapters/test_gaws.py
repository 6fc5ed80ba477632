"""The tuners: the mathematics against dense Kronecker products, training, merging, several adapters, mixed batches."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from gawscompile.adapters.config import INITS
from gawscompile.adapters.layer import KroneckerLinear
from tests.adapters.common import KINDS, NAMES, Net, adapted, base, config, randomise, run, single
from tests.graphs import tokens

BOTH = pytest.mark.parametrize("kind", KINDS)


def dense(kind, layer, adapter="default"):
    """ΔW by torch.kron, from the names in the state dict."""
    state = layer.state_dict()
    g = state[f"GAWS.{adapter}.weight"] if kind == "gaws" else state[f"GAWSD.{adapter}"]
    if f"diag.{adapter}" in state:
        g = g @ torch.diag(state[f"diag.{adapter}"])
    if kind == "gaws":
        return torch.kron(torch.eye(layer.in_features // g.shape[1], dtype=g.dtype), g)
    return torch.kron(g, torch.eye(layer.in_features // g.shape[1], dtype=g.dtype))


def conv1d(inputs, outputs):
    layer = Conv1D(outputs, inputs)
    nn.init.normal_(layer.bias)
    return layer


INPUTS = {
    "one vector": lambda: torch.randn(24),
    "batch": lambda: torch.randn(5, 24),
    "3-d": lambda: torch.randn(2, 3, 24),
    "4-d": lambda: torch.randn(2, 3, 1, 24),
    "empty": lambda: torch.randn(0, 24),
    "transposed": lambda: torch.randn(24, 5).T,
    "every other": lambda: torch.randn(4, 48)[:, ::2],
    "expanded": lambda: torch.randn(1, 24).expand(6, 24),
}


@BOTH
@pytest.mark.parametrize("diag", [False, True])
@pytest.mark.parametrize("make", [lambda k, n: nn.Linear(k, n), conv1d], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("given", INPUTS)
def test_forward_is_the_dense_kronecker_product(kind, diag, make, given):
    torch.manual_seed(0)
    layer = make(24, 36).double()
    splits = {"input_splits": 6, "output_splits": 6} if kind == "gaws" else {"input_splits": 2, "output_splits": 3}
    weight = layer.weight.detach().clone()
    weight = weight.T if isinstance(layer, Conv1D) else weight
    bias = layer.bias.detach().clone()
    model = single(kind, layer, diag=diag, input_split_dim=None, **splits)
    x = INPUTS[given]().double()
    with torch.no_grad():
        got = model(x)
    wanted = F.linear(x, weight + dense(kind, model.base_model.model.proj), bias)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    assert got.shape == (*x.shape[:-1], 36)


@BOTH
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_every_mode_runs_one_matrix_product_and_never_a_dense_delta(kind, gradients, frozen):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[tuple[str, int]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            seen.append((str(function), out.numel()))
            return out

    model = single(kind, nn.Linear(96, 96, bias=False), diag=True).requires_grad_(not frozen)
    with torch.set_grad_enabled(gradients), Watch():
        model(torch.randn(1, 3, 96))
    assert [name for name, _ in seen].count("aten.mm.default") == 2
    assert not [name for name, _ in seen if "bmm" in name or "kron" in name]
    assert max(numel for name, numel in seen if name not in ("aten.t.default", "aten.detach.default")) < 96 * 96


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_loss_and_touches_only_adapters(kind, name):
    model = peft.get_peft_model(base(name), config(kind, diag=True))
    untrained = {key: value.detach().clone() for key, value in model.named_parameters()}
    trained = [key for key, value in model.named_parameters() if value.requires_grad]
    assert trained and all(any(f".{leaf}." in key for leaf in ("GAWS", "GAWSD", "diag")) for key in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    extra = {"decoder_input_ids": tokens(2, 7, seed=1)} if name == "T5" else {}
    wanted = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(8):
        out = model(input_ids=tokens(2, 7), output_hidden_states=True, **extra)
        hidden = out.decoder_hidden_states if name == "T5" else out.hidden_states
        loss = (hidden[-1] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.01
    changed = {key for key, value in model.named_parameters() if not torch.equal(value, untrained[key])}
    assert changed <= set(trained)
    assert len(changed) > len(trained) / 2


@BOTH
def test_inits(kind):
    plain = run(base())
    for init in INITS:
        torch.manual_seed(0)
        model = peft.get_peft_model(base(), config(kind, init_weights=init, diag=True)).eval()
        assert torch.equal(run(model), plain) == (init == "zero")
        assert all((p == 1).all() for key, p in model.named_parameters() if ".diag." in key)
    with pytest.raises(ValueError, match=r"init_weights='ones'.*'zero', 'kaiming', 'none'"):
        config(kind, init_weights="ones")


@BOTH
def test_diag_scales_the_columns_of_g(kind):
    model = single(kind, nn.Linear(24, 24, bias=False).double(), diag=True)
    layer = model.base_model.model.proj
    assert layer.diag["default"].shape == (6,)
    x = torch.randn(3, 24).double()
    with torch.no_grad():
        before = layer.apply_adapter(x, "default")
        layer.g("default").mul_(layer.diag["default"])
        layer.diag["default"].fill_(1)
        torch.testing.assert_close(layer.apply_adapter(x, "default"), before, rtol=1e-12, atol=1e-12)


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_merging_is_exact_to_rounding(kind, name):
    model = adapted(kind, name, diag=True).double()
    plain, wanted = run(base(name).double(), name), run(model, name)
    assert (wanted - plain).abs().max() > 1e-3
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(run(model, name), wanted, rtol=1e-9, atol=1e-9)
    model.unmerge_adapter()
    torch.testing.assert_close(run(model, name), wanted, rtol=1e-9, atol=1e-9)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(run(model, name), plain, rtol=1e-9, atol=1e-9)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, KroneckerLinear) for module in merged.modules())
    torch.testing.assert_close(run(merged, name), wanted, rtol=1e-9, atol=1e-9)


@BOTH
def test_safe_merge_refuses_what_is_not_finite_and_leaves_the_weight(kind):
    model = single(kind, nn.Linear(24, 24))
    layer = model.base_model.model.proj
    before = layer.weight.clone()
    with torch.no_grad():
        layer.g("default")[0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.weight, before) and not layer.merged


@BOTH
def test_several_adapters_add_up_switch_and_go(kind):
    model = adapted(kind, diag=True)
    model.add_adapter("other", config(kind, input_splits=2, input_split_dim=None, target_modules=["q_proj", "up_proj"]))
    first = run(model)
    randomise(model, seed=1, only="other")
    assert torch.equal(run(model), first)  # the second is not active yet
    model.set_adapter("other")
    second = run(model)
    plain = run(base())
    model.base_model.set_adapter(["default", "other"])
    both = run(model)
    assert len({float(out.double().sum()) for out in (plain, first, second, both)}) == 4
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    total = layer.base_layer.weight + dense(kind, layer) + dense(kind, layer, "other")
    x = torch.randn(2, 64)
    torch.testing.assert_close(layer(x), F.linear(x, total))
    with model.disable_adapter():
        assert torch.equal(run(model), plain)
    model.delete_adapter("default")
    assert torch.equal(run(model), second)
    assert "default" not in layer.splits and not [key for key in model.state_dict() if ".default" in key]
    assert torch.equal(run(model.unload()), plain)


@BOTH
def test_splits_by_pattern(kind):
    model = adapted(kind, input_splits_pattern={"q_proj": 8, r"layers\.1\.mlp\.(up|gate)_proj": 2})
    layers = model.base_model.model.model.layers
    assert layers[0].self_attn.q_proj.splits["default"].inputs == 8
    assert layers[0].mlp.up_proj.splits["default"].inputs != 2
    assert layers[1].mlp.up_proj.splits["default"].inputs == 2
    if kind == "gawsd":  # slices of 32, so that 64 → 96 is 2 → 3
        assert layers[1].mlp.up_proj.g("default").shape == (3, 2)
    with pytest.warns(UserWarning, match="match no adapted module: nothing_proj"):
        adapted(kind, output_splits_pattern={"nothing_proj": 2})


@BOTH
def test_layers_to_transform(kind):
    model = adapted(kind, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")
    assert model.targeted_module_names == ["model.layers.1.self_attn.q_proj"]


@BOTH
def test_modules_to_save_train_beside_adapters(kind, tmp_path):
    model = randomise(peft.get_peft_model(base("Llama"), config(kind, modules_to_save=["lm_head"])).eval())
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    wanted = run(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(peft.PeftModel.from_pretrained(base(), tmp_path)), wanted)


@BOTH
def test_dtypes_follow_peft(kind):
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        made = peft.get_peft_model(base().bfloat16(), config(kind, diag=True), autocast_adapter_dtype=autocast).eval()
        model = randomise(made)
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        assert layer.g("default").dtype == layer.diag["default"].dtype == dtype
        assert layer.g("default").requires_grad and layer.diag["default"].requires_grad
        assert layer(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16
        model.merge_adapter()
        assert layer.weight.dtype == torch.bfloat16


@BOTH
def test_a_mixed_batch_gives_each_row_its_adapter(kind):
    model = adapted(kind, diag=True)
    model.add_adapter("other", config(kind, diag=True))
    randomise(model)
    ids = tokens(4, 7)
    names = ["other", "__base__", "default", "other"]
    with torch.no_grad():
        got = model(input_ids=ids, adapter_names=names).logits
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    wanted = model(input_ids=ids[row : row + 1]).logits
            else:
                model.set_adapter(name)
                wanted = model(input_ids=ids[row : row + 1]).logits
            torch.testing.assert_close(got[row], wanted[0])
    with pytest.raises(ValueError, match="nobody"):
        model(input_ids=ids, adapter_names=["nobody"] * 4)
    with pytest.raises(ValueError, match="3 names for a batch of 4"):
        model(input_ids=ids, adapter_names=names[:3])
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model(input_ids=ids, adapter_names=names)
    with pytest.raises(ValueError, match="eval mode"):
        model.train()(input_ids=ids, adapter_names=names)


@BOTH
def test_a_mixed_batch_does_not_write_into_what_others_hold(kind):
    layer, held = nn.Linear(16, 16), []
    model = single(kind, layer)
    layer.register_forward_hook(lambda module, inputs, output: held.append(output))
    x = torch.randn(2, 16)
    with torch.no_grad():
        model(x, adapter_names=["default", "__base__"])
        assert torch.equal(held[0], F.linear(x, layer.weight, layer.bias))


@BOTH
def test_merging_rounds_once(kind):
    layer = nn.Linear(16, 16, bias=False, dtype=torch.bfloat16)
    made = config(kind, target_modules=["proj"])
    model = randomise(peft.get_peft_model(Net(layer), made).eval())
    (adapted_layer,) = [m for m in model.modules() if hasattr(m, "get_delta_weight")]
    exact = layer.weight.detach().float() + adapted_layer.get_delta_weight("default").detach()
    assert adapted_layer.get_delta_weight("default").dtype == torch.float32
    model.merge_adapter()
    assert torch.equal(layer.weight, exact.bfloat16())


@BOTH
def test_beam_search_over_a_mixed_batch(kind):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4}
    inner = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    model = randomise(peft.get_peft_model(inner, config(kind)).eval(), scale=0.5)
    ids = tokens(2, 7)
    settings = {"num_beams": 2, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    mixed = model.generate(input_ids=ids, adapter_names=["default", "__base__"], **settings)
    alone = model.generate(input_ids=ids[:1], **settings)
    with model.disable_adapter():
        bare = model.generate(input_ids=ids[1:], **settings)
    assert torch.equal(mixed, torch.cat([alone, bare]))


@BOTH
def test_a_second_kind_cannot_join(kind):
    other = "gawsd" if kind == "gaws" else "gaws"
    with pytest.raises(ValueError, match="different peft types"):
        adapted(kind).add_adapter("other", config(other))
