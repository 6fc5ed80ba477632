"""What stands around projections: activations, residuals, gates, streams, writes in place, views that are returned."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from tests.fuzz.adapters import adapted, adapter, low_rank, scaled
from tests.fuzz.attentions import attention
from tests.fuzz.bases import features, projection
from tests.fuzz.programs import Draft, Program

SHAPES: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((2, 3), (16, 8)),
    ((2, 3), (16, 8)),
    ((2, 3), (12, 24)),
    ((2, 2), (12, 24)),
    ((1, 1), (16, 8)),
    ((1, 3), (12, 24)),
    ((3,), (16, 8)),
    ((3,), (12, 24)),
    ((1,), (16, 8)),
    ((2, 1, 2), (16, 8)),
    ((), (16, 8)),
)
"""Leading sizes of activations, and numbers of features: few, as a step is traced once for each."""

PROFILES = ("normal",) * 16 + ("square",) * 2 + ("ones", "zero", "wide")
DTYPES = (torch.float32,) * 10 + (torch.bfloat16,) * 5 + (torch.float16,) * 2 + (torch.float64,)


def generate(seed: int) -> Program:
    """The program of a seed: a network of a few blocks on one or two activations."""
    draft = Draft(random.Random(seed))
    draft.dtype = draft.pick(*DTYPES)
    draft.tie = draft.pick(0.05, 0.15, 0.5)
    x, widths = _start(draft)
    live = [x]
    for _ in range(draft.pick(1, 1, 2, 2, 3, 4)):
        (block,) = draft.rng.choices([block for block, _ in BLOCKS], [weight for _, weight in BLOCKS])
        source = draft.pick(*live[-3:], live[-1])
        with draft.attempt(block.__name__.strip("_")):
            found = block(draft, source, widths)
            if draft.value(found).is_floating_point() and draft.value(found).dim():
                live.append(found)
    return draft.finish(_outputs(draft, live))


def _start(draft: Draft) -> tuple[str, list[str]]:
    """The first activation, and the widths that there are."""
    profile = draft.pick(*PROFILES)
    draft.notes.append(f"sizes {profile}")
    lengths, wide = draft.pick(*SHAPES)
    leading, widths = [draft.size(size) for size in lengths], [draft.size(size) for size in wide]
    if profile == "square":  # as many tokens as features
        widths = widths[:1]
        same = draft.pick(widths[0], draft.size(draft.sizes[widths[0]]))
        leading = draft.pick([same], [*leading[:1], same])
    elif profile == "ones":
        draft.pick(widths.append, leading.append)(draft.size(1))
        leading = leading or [draft.size(1)]
    elif profile == "zero":
        draft.pick(widths.append, lambda d: leading.insert(0, d))(draft.size(0))
    elif profile == "wide":
        widths.append(draft.size(96))
    k = draft.pick(*widths)
    layout = draft.pick(*["t"] * 12, "t.mT.contiguous().mT", "t[..., ::2]") if len(leading) > 0 else "t"
    shape = (*leading, f"2*{k}") if "::2" in layout else (*leading, k)
    return draft.new("x", shape, draft.dtype, "normal", layout), widths


def _width(draft: Draft, widths: list[str]) -> str:
    return str(draft.pick(*widths))


def _like(draft: Draft, x: str) -> str:
    """Another activation of x's shape."""
    lengths = [str(size) for size in draft.shape(x)]
    names = {str(size): name for name, size in draft.sizes.items()}
    return draft.new("x", tuple(names.get(size, size) for size in lengths), draft.kind(x), "normal")


# ---- blocks -----------------------------------------------------------------------------------------------


def _plain(draft: Draft, x: str, widths: list[str]) -> str:
    return projection(draft, x, _width(draft, widths))


def _adapted(draft: Draft, x: str, widths: list[str]) -> str:
    return adapted(draft, x, _width(draft, widths))


def _sandwich(draft: Draft, x: str, widths: list[str]) -> str:
    """Adapted, a nonlinearity, adapted."""
    y = adapted(draft, x, _width(draft, widths))
    return adapted(draft, _bent(draft, y), _width(draft, widths))


def _bent(draft: Draft, y: str) -> str:
    return draft.let(
        draft.pick(
            f"{y}.tanh()", f"{y}.relu()", f"F.silu({y})", f"F.gelu({y})", f"{y}.sin()", f"torch.softmax({y}, -1)"
        )
    )


def _siblings(draft: Draft, x: str, widths: list[str]) -> str:
    """Several projections of one activation, put together by a mixture of theirs."""
    n = _width(draft, widths)
    parts = [draft.pick(adapted, adapted, projection)(draft, x, n) for _ in range(draft.pick(2, 2, 3))]
    if len(parts) == 3 and len(draft.shape(x)) == 3 and draft.chance(0.5):
        q, k, v = parts
        return draft.let(f"torch.softmax({q} @ {k}.mT, -1) @ {v}")
    total = parts[0]
    for part in parts[1:]:
        total = draft.let(draft.pick(f"{total} * {part}", f"{total} + {part}", f"{total} - {part}.tanh()"))
    return total


def _residual(draft: Draft, x: str, widths: list[str]) -> str:
    y = draft.pick(adapted, adapted, projection)(draft, x, features(draft, x))
    r = draft.pick(x, x, x, _like(draft, x))
    if draft.chance(0.3):
        r = draft.let(
            draft.pick(
                f"{r}.tanh()", f"{r}.mT.contiguous().mT", f"{r}[:1]", f"{r}.float()", f"{r}[..., :1]", f"{r} * 2"
            )
        )
    return draft.let(
        draft.pick(
            f"{r} + {y}",
            f"{y} + {r}",
            f"{y} + {r}",
            f"torch.add({r}, {y}, alpha=0.5)",
            f"torch.add({y}, {r}, alpha=2)",
            f"{r} - {y}",
            f"{y} - {r}",
            f"{y} + {y}",
        )
    )


def _gate(draft: Draft, x: str, widths: list[str]) -> str:
    """SwiGLU, and what looks like it."""
    n, make = _width(draft, widths), draft.pick(adapted, projection)
    gate, up = make(draft, x, n), make(draft, x, n)
    silu = draft.pick(
        f"F.silu({gate})",
        f"F.silu({gate})",
        f"{gate} * torch.sigmoid({gate})",
        f"torch.sigmoid({gate}) * {gate}",
        f"F.silu({gate}.float()).to({gate}.dtype)",
        f"{gate} / (1 + torch.exp(-{gate}))",
        f"F.gelu({gate})",
        f"F.relu({gate})",
        f"{gate} * torch.sigmoid(1.7 * {gate})",
        f"F.silu({up})",
        f"{gate} / (torch.exp(-{gate}) + 2)",
    )
    bent = draft.let(silu)
    product = draft.pick(f"{bent} * {up}", f"{bent} * {up}", f"{up} * {bent}", f"{bent} * {gate}", f"{bent} + {up}")
    return draft.let(product)


def _stream(draft: Draft, x: str, widths: list[str]) -> str:
    """zFLoRA: a stream that a few features widen, written and read apart."""
    h = draft.pick(adapted, projection)(draft, x, features(draft, x))
    r = draft.size(draft.pick(1, 2, 3, 4))
    z = draft.let(f"F.linear({x}, {draft.parameter(r, features(draft, x), dtype=draft.kind(x))})")
    stream = draft.let(f"torch.cat([{h}, {z}], -1)")
    if draft.chance(0.6):
        z2 = draft.let(draft.pick(f"{z}.tanh()", f"{z} * 2"))
        stream = draft.let(f"{stream} + torch.cat([{draft.pick(x, f'{h}.sin()')}, {z2}], -1)")
    k = draft.shape(h)[-1]
    sizes = draft.pick(f"[{k}, {r}]", f"[{k}, {r}]", f"[{k}, {r}]", f"[{r}, {k}]", f"[{k} - 1, {r} + 1]")
    parts = draft.let(f"{stream}.split({sizes}, -1)")
    a, b = (draft.let(f"{parts}[{i}]") for i in (0, 1))
    if draft.chance(0.2):  # only cut and returned
        return draft.pick(a, b, draft.let(f"{a}[..., :2]"))  # type: ignore[no-any-return]
    n = _width(draft, widths)
    w = draft.parameter(n, features(draft, a), dtype=draft.kind(a))
    c = draft.parameter(n, features(draft, b), dtype=draft.kind(b))
    y = draft.let(f"F.linear({a}, {w}) + {draft.pick('', '', '2 * ')}F.linear({b}, {c})")
    return adapter(draft, a, y) if draft.chance(0.3) else y


def _norm(draft: Draft, x: str, widths: list[str]) -> str:
    g = draft.parameter(features(draft, x), dtype=draft.kind(x), kind="positive")
    normed = draft.let(
        draft.pick(
            f"{x} * torch.rsqrt({x}.pow(2).mean(-1, keepdim=True) + 1e-6) * {g}",
            f"F.layer_norm({x}, {x}.shape[-1:], {g})",
            f"({x}.float() * torch.rsqrt({x}.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to({x}.dtype) * {g}",
        )
    )
    return adapted(draft, normed, _width(draft, widths))


def _written(draft: Draft, x: str, widths: list[str]) -> str:
    """Writes in place: before, between and after the parts of a match, to activations, buffers and views."""
    if draft.chance(0.4):
        x = draft.let(draft.pick(f"{x}.clone()", f"{x} + 0", f"{x}.tanh()")) if draft.chance(0.6) else x
    n = _width(draft, widths)
    if draft.chance(0.3):
        w = draft.parameter(n, features(draft, x), dtype=draft.kind(x))
        draft.let(draft.pick(f"{w}.mul_(2)", f"{w}[:1].zero_()", f"{w}.add_(0.5)"))
        y = draft.let(f"F.linear({x}, {w})")
    else:
        y = projection(draft, x, n)
    target = draft.pick(x, y, y)
    write = draft.pick("mul_(2)", "add_(1)", "[..., :2].zero_()", "[..., 1:].mul_(-1)", "[:1].add_(3)", "tanh_()")
    draft.let(f"{target}{'' if write.startswith('[') else '.'}{write}")
    y = adapter(draft, x, y)
    if draft.chance(0.4):
        draft.let(f"{draft.pick(x, y)}.{draft.pick('mul_(0.5)', 'add_(1)')}")
    return y


def _mixed(draft: Draft, x: str, widths: list[str]) -> str:
    """An adapted projection in the midst of another dtype."""
    to = draft.pick("torch.float32", "torch.bfloat16", "torch.float64", "torch.float16")
    y = adapted(draft, draft.let(f"{x}.to({to})"), _width(draft, widths))
    return y if draft.chance(0.4) else draft.let(f"{y}.to({x}.dtype)")


def _reshaped(draft: Draft, x: str, widths: list[str]) -> str:
    """An activation under another shape, or cut, then adapted; heads that come and go."""
    moved = draft.let(
        draft.pick(
            f"{x}.flatten(0, -2)",
            f"{x}.unsqueeze(0)",
            f"{x}.transpose(0, -2)",
            f"{x}[..., ::2]",
            f"{x}[-1:]",
            f"{x}.mT",
            f"{x}.unflatten(-1, (2, -1))",
            f"{x}.unsqueeze(-2)",
            f"{x}.squeeze(0)",
            f"torch.ops.aten.alias({x})",
        )
    )
    y = adapted(draft, moved, _width(draft, widths))
    return draft.let(draft.pick(f"{y}.flatten(0, -2)", f"{y}.transpose(0, -2)", f"{y}.mT")) if draft.chance(0.3) else y


def _twice(draft: Draft, x: str, widths: list[str]) -> str:
    """A base, or its adapter's parts, that others read too."""
    n, dtype = _width(draft, widths), draft.kind(x)
    y, delta = projection(draft, x, n), low_rank(draft, x, n, dtype)
    total = draft.let(f"{y} + {scaled(draft, delta)}")
    read = draft.pick(f"{total} * {y}", f"{total} + {delta}.cos()", f"{total} - {y}", f"{total} + {total}.tanh()")
    return draft.let(read)


def _added_zero(draft: Draft, x: str, widths: list[str]) -> str:
    y = adapted(draft, x, _width(draft, widths))
    zeros = f"torch.zeros_like({y})"
    return draft.let(draft.pick(f"{y} + {zeros}", f"{zeros} - {y}", f"{y} * 1", f"{y} * 0.0"))


BLOCKS: list[tuple[Callable[[Draft, str, list[str]], str], float]] = [
    (_plain, 2),
    (_adapted, 8),
    (_sandwich, 2),
    (_siblings, 3),
    (_residual, 3),
    (_gate, 3),
    (_stream, 2),
    (_norm, 1),
    (_written, 0.8),
    (_mixed, 1.5),
    (_reshaped, 1.5),
    (_twice, 1),
    (_added_zero, 0.5),
    (attention, 3),
]


# ---- outputs ----------------------------------------------------------------------------------------------


def _outputs(draft: Draft, live: list[str]) -> list[str]:
    """The last value, perhaps inner ones, and views and copies of either."""
    outputs = [live[-1]]
    tensors = [step.name for step in draft.steps if isinstance(draft.scope[step.name], torch.Tensor)]
    outputs += draft.rng.sample(tensors, min(len(tensors), draft.pick(0, 0, 0, 1, 2)))
    if draft.chance(0.4):
        with draft.attempt("view returned"):
            outputs.append(_seen(draft, draft.pick(*outputs)))
    if draft.chance(0.1):
        outputs.append(draft.pick(*outputs))
    if draft.chance(0.05):
        outputs.append(live[0])
    if draft.chance(0.15) and len(outputs) > 1:
        outputs = outputs[1:]
    return outputs


def _seen(draft: Draft, y: str) -> str:
    return draft.let(
        draft.pick(
            f"{y}.clone()",
            f"{y}.clone()",
            f"{y}.clone()",
            f"{y}[..., :2]",
            f"{y}[1:]",
            f"{y}.mT",
            f"{y}.transpose(0, -1)",
            f"{y}.unsqueeze(0).expand(2, *{y}.shape)",
            f"{y}.flatten()",
            f"{y}.contiguous()",
            f"{y}.view(-1)",
            f"{y}.detach()",
            f"{y}.chunk(2, -1)[1]",
            f"{y}.unsqueeze(-1)",
            f"{y}.to({y}.dtype)",
            f"{y}.reshape({y}.shape)",
            f"{y}.double()",
            f"{y} + 0",
        )
    )
