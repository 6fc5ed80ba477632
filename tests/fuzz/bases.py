"""Blocks that make a projection ``y = W x + b`` of an activation, as people and libraries spell it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.fuzz.programs import Draft

WIDE = (torch.float32, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype)


def projection(draft: Draft, x: str, n: str) -> str:
    """A projection of `x` to `n` features in some spelling. Raises `Unfit` where that does not fit x."""
    weights = [weight for _, weight in SPELLINGS]
    (spell,) = draft.rng.choices([spell for spell, _ in SPELLINGS], weights)
    draft.notes.append(f"base {spell.__name__.strip('_')}")
    return spell(draft, x, n)


def features(draft: Draft, x: str) -> str:
    """The name of x's last size."""
    wanted = draft.shape(x)[-1]
    known = [name for name, size in draft.sizes.items() if size == wanted]
    return str(draft.pick(*known)) if known else str(wanted)


def weight(draft: Draft, n: str, k: str, dtype: torch.dtype) -> str:
    return draft.parameter(n, k, dtype=dtype)


def bias(draft: Draft, n: str, dtype: torch.dtype) -> str:
    return draft.parameter(n, dtype=dtype, kind="normal")


def _linear(draft: Draft, x: str, n: str) -> str:
    return draft.let(f"F.linear({x}, {weight(draft, n, features(draft, x), draft.kind(x))})")


def _biased(draft: Draft, x: str, n: str) -> str:
    w, b = weight(draft, n, features(draft, x), draft.kind(x)), bias(draft, n, draft.kind(x))
    return draft.let(f"F.linear({x}, {w}, {b})")


def _added_bias(draft: Draft, x: str, n: str) -> str:
    y = _linear(draft, x, n)
    b = bias(draft, n, draft.kind(x))
    return draft.let(draft.pick(f"{y} + {b}", f"{b} + {y}", f"{y} - {b}", f"torch.add({y}, {b}, alpha=2)"))


def _turned(draft: Draft, x: str, n: str) -> str:
    """A weight ``[N, K]``, its transpose multiplied."""
    w = weight(draft, n, features(draft, x), draft.kind(x))
    return draft.let(draft.pick(f"{x} @ {w}.T", f"torch.matmul({x}, {w}.transpose(0, 1))", f"{x} @ {w}.mT"))


def _columns(draft: Draft, x: str, n: str) -> str:
    """A weight that is kept as ``[K, N]``."""
    w = weight(draft, features(draft, x), n, draft.kind(x))
    return draft.let(draft.pick(f"{x} @ {w}", f"torch.matmul({x}, {w})", f"F.linear({x}, {w}.T)"))


def _einsum(draft: Draft, x: str, n: str) -> str:
    k = features(draft, x)
    if draft.chance(0.5):
        return draft.let(f"torch.einsum('...k,nk->...n', {x}, {weight(draft, n, k, draft.kind(x))})")
    return draft.let(f"torch.einsum('...k,kn->...n', {x}, {weight(draft, k, n, draft.kind(x))})")


def _flat(draft: Draft, x: str) -> str:
    return (
        draft.let(draft.pick(f"{x}.flatten(0, -2)", f"{x}.reshape(-1, {x}.shape[-1])"))
        if (len(draft.shape(x)) != 2)
        else x
    )


def _back(draft: Draft, flat: str, x: str) -> str:
    return flat if len(draft.shape(x)) == 2 else draft.let(f"{flat}.unflatten(0, {x}.shape[:-1])")


def _addmm(draft: Draft, x: str, n: str) -> str:
    w, b = weight(draft, features(draft, x), n, draft.kind(x)), bias(draft, n, draft.kind(x))
    more = draft.pick("", "", ", alpha=2", ", beta=0.5", ", alpha=0.5, beta=3", ", beta=0", ", alpha=0")
    return _back(draft, draft.let(f"torch.addmm({b}, {_flat(draft, x)}, {w}{more})"), x)


def _on_columns(draft: Draft, x: str, n: str) -> str:
    """``(W x')'``."""
    w = weight(draft, n, features(draft, x), draft.kind(x))
    product = draft.let(f"{w} @ {_flat(draft, x)}.T")
    return _back(draft, draft.let(f"{product}.T{draft.pick('', '', '.contiguous()')}"), x)


def _batched(draft: Draft, x: str, n: str) -> str:
    w = weight(draft, features(draft, x), n, draft.kind(x))
    if len(draft.shape(x)) != 3:
        wide = draft.let(f"{_flat(draft, x)}.unsqueeze(0)")
        return _back(draft, draft.let(f"torch.bmm({wide}, {w}.unsqueeze(0)).squeeze(0)"), x)
    spread = f"{w}.expand({x}.shape[0], -1, -1)"
    if draft.chance(0.5):
        return draft.let(f"torch.bmm({x}, {spread})")
    b = bias(draft, n, draft.kind(x))
    more = draft.pick("", ", alpha=2", ", beta=0.5", ", beta=0")
    return draft.let(f"torch.baddbmm({b}, {x}, {spread}{more})")


def _cast_weight(draft: Draft, x: str, n: str) -> str:
    """Weights of another dtype, cast where they are used; as autocast does, or by hand."""
    other = draft.pick(torch.float32, torch.bfloat16, torch.float64)
    w = weight(draft, n, features(draft, x), other)
    if draft.chance(0.5):
        return draft.let(f"F.linear({x}, {w}.to({x}.dtype))")
    if draft.chance(0.5):
        low = draft.pick(torch.bfloat16, torch.float16)
        return draft.let(f"F.linear({x}.to({low}), {w}.to({low}))")
    return draft.let(f"F.linear({x}.to({w}.dtype), {w}).to({x}.dtype)")


def _in_fp64(draft: Draft, x: str, n: str) -> str:
    w = weight(draft, n, features(draft, x), draft.kind(x))
    b = f", {bias(draft, n, draft.kind(x))}.double()" if draft.chance(0.5) else ""
    y = draft.let(f"F.linear({x}.double(), {w}.double(){b})")
    return y if draft.chance(0.2) else draft.let(f"{y}.to({draft.pick(x + '.dtype', 'torch.float32')})")


def _quantised(draft: Draft, x: str, n: str) -> str:
    k = features(draft, x)
    q = draft.parameter(n, k, dtype=torch.int8, kind="integer")
    s = draft.parameter(*draft.pick((n, "1"), (), ("1",)), dtype=draft.kind(x), kind="positive")
    w = draft.let(draft.pick(f"{q}.to({x}.dtype) * {s}", f"({q} * {s}).to({x}.dtype)", f"{q}.to({x}.dtype) / 8"))
    if draft.chance(0.3):
        return draft.let(f"F.linear({x}, {w}, {bias(draft, n, draft.kind(x))})")
    return draft.let(draft.pick(f"F.linear({x}, {w})", f"{x} @ {w}.T"))


def _computed(draft: Draft, x: str, n: str) -> str:
    """A weight that is computed of others, scaled, normalised, or of a view of a larger one."""
    k = features(draft, x)
    w = weight(draft, n, k, draft.kind(x))
    made = draft.pick(
        f"{w} * {draft.number()}",
        f"{w} / 2",
        f"{w} + 0.5",
        f"{w}.tanh()",
        f"{w} * {draft.parameter(n, '1', dtype=draft.kind(x), kind='positive')}",
        f"{w} * {draft.parameter(k, dtype=draft.kind(x), kind='positive')}",
        f"{w} + {weight(draft, n, k, draft.kind(x))}",
        f"{w} @ {weight(draft, k, k, draft.kind(x))}",
        f"F.normalize({w}, dim=1)",
        f"torch.cat([{w}, {w}])[{n}:]",
        f"-{w}",
    )
    return draft.let(f"F.linear({x}, {draft.let(made)})")


def _strided(draft: Draft, x: str, n: str) -> str:
    """A weight that is stored as part of a larger tensor, or cut from one."""
    k = features(draft, x)
    if draft.chance(0.5):
        w = draft.parameter(n, f"2*{k}", dtype=draft.kind(x), layout=draft.pick("t[:, ::2]", "t[:, :t.shape[1] // 2]"))
        return draft.let(f"F.linear({x}, {w})")
    w = draft.parameter(f"2*{n}", k, dtype=draft.kind(x))
    part = draft.pick(f"{w}[:{n}]", f"{w}[{n}:]", f"{w}.chunk(2)[1]", f"{w}[::2]", f"{w}.view(2, {n}, {k})[0]")
    return draft.let(f"F.linear({x}, {part})")


def _scaled(draft: Draft, x: str, n: str) -> str:
    y = _linear(draft, x, n)
    return draft.let(draft.pick(f"{y} * {draft.number()}", f"{y} / 2", f"-{y}", f"{draft.number()} * {y}"))


def _split_of_one(draft: Draft, x: str, n: str) -> str:
    """One of two projections that are kept as one weight."""
    w = weight(draft, f"2*{n}", features(draft, x), draft.kind(x))
    y = draft.let(f"F.linear({x}, {w})")
    return draft.let(draft.pick(f"{y}.chunk(2, -1)[0]", f"{y}[..., {n}:]", f"{y}.split({n}, -1)[1]"))


def _kept_wide(draft: Draft, x: str, n: str) -> str:
    """Multiplied in another dtype than it came in."""
    to = draft.pick("torch.float32", "torch.bfloat16")
    w = weight(draft, n, features(draft, x), draft.kind(x))
    return draft.let(f"F.linear({x}.to({to}), {w}.to({to})).to({x}.dtype)")


def _frozen(draft: Draft, x: str, n: str) -> str:
    """A weight that the caller passes beside the activation: no parameter, as far as anybody knows."""
    w = draft.new("x", (n, features(draft, x)), draft.kind(x), "weight")
    return draft.let(draft.pick(f"F.linear({x}, {w})", f"{x} @ {w}.T"))


def _of_two_activations(draft: Draft, x: str, n: str) -> str:
    """No linear at all, though it multiplies matrices."""
    other = draft.let(f"{x}.tanh()")
    mixed = draft.let(f"torch.softmax({x} @ {other}.transpose(-1, -2), -1) @ {x}")
    return _linear(draft, mixed, n)


SPELLINGS: list[tuple[Callable[[Draft, str, str], str], float]] = [
    (_linear, 10),
    (_biased, 4),
    (_added_bias, 1.5),
    (_turned, 2),
    (_columns, 2),
    (_einsum, 1.5),
    (_addmm, 2),
    (_on_columns, 1),
    (_batched, 1),
    (_cast_weight, 1),
    (_in_fp64, 1.2),
    (_quantised, 1.5),
    (_computed, 1),
    (_strided, 0.7),
    (_scaled, 0.7),
    (_split_of_one, 0.7),
    (_kept_wide, 0.5),
    (_frozen, 0.4),
    (_of_two_activations, 0.3),
]
