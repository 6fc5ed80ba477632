"""Blocks that add an adapter to a projection, in the spellings of libraries and of people; and what only looks so."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.fuzz.bases import features, projection
from tests.fuzz.programs import Draft, Unfit


def adapted(draft: Draft, x: str, n: str) -> str:
    """A projection of `x` to `n` features with an adapter or two. Raises `Unfit`."""
    y = projection(draft, x, n)
    return adapter(draft, x, y)


def adapter(draft: Draft, x: str, y: str) -> str:
    """`y`, which `x` was projected to, with an adapter added."""
    (kind,) = draft.rng.choices([kind for kind, _ in KINDS], [weight for _, weight in KINDS])
    draft.notes.append(f"adapter {kind.__name__.strip('_')}")
    return kind(draft, x, y)


# ---- low rank ---------------------------------------------------------------------------------------------


def _rank(draft: Draft) -> str:
    known = [name for name, size in draft.sizes.items() if size <= 4]
    return str(draft.pick(*known)) if known and draft.chance(0.5) else draft.size(draft.pick(1, 2, 2, 4))


def _factor_dtype(draft: Draft, y: str) -> torch.dtype:
    if draft.chance(0.6):
        return draft.kind(y)
    found = draft.pick(torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
    assert isinstance(found, torch.dtype)
    return found


def scaled(draft: Draft, name: str) -> str:
    """Times a number, or a tensor of one number, or not at all."""
    way = draft.rng.randrange(10)
    if way < 4:
        return name
    if way < 8:
        s = draft.number()
        return draft.let(draft.pick(f"{name} * {s}", f"{s} * {name}", f"{name} / {s}", f"-{name}", f"{name} * {s}"))
    shape = draft.pick((), (), ("1",), ("1", "1"))
    dtype = draft.pick(torch.float32, torch.float64, draft.kind(name))
    s = draft.parameter(*shape, dtype=dtype, kind="positive")
    if draft.chance(0.2):
        s = draft.let(f"{s} * 2")
    return draft.let(draft.pick(f"{name} * {s}", f"{s} * {name}", f"{name} / {s}"))


def low_rank(draft: Draft, x: str, n: str, dtype: torch.dtype) -> str:
    """``s B (A x)`` in the factors' dtype."""
    k, r = features(draft, x), _rank(draft)
    x = x if draft.kind(x) == dtype else draft.let(f"{x}.to({dtype})")
    x = draft.let(draft.pick(f"F.dropout({x}, 0.5, False)", f"{x}.clone()")) if draft.chance(0.1) else x
    x = scaled(draft, x) if draft.chance(0.1) else x
    a = draft.parameter(r, k, dtype=dtype)
    b = draft.parameter(n, r, dtype=dtype)
    if draft.chance(0.1):
        a = scaled(draft, a)
    if draft.chance(0.1):
        b = scaled(draft, b)
    way = draft.rng.randrange(11)
    if way < 4:
        u = draft.let(f"F.linear({x}, {a})")
        u = scaled(draft, u) if draft.chance(0.15) else u
        bias = f", {draft.parameter(n, dtype=dtype)}" if draft.chance(0.1) else ""
        return draft.let(f"F.linear({u}, {b}{bias})")
    if way == 4:
        return draft.let(f"{x} @ {a}.T @ {b}.T")
    if way == 5:  # stored as [in, rank] and [rank, out]
        a, b = draft.parameter(k, r, dtype=dtype), draft.parameter(r, n, dtype=dtype)
        return draft.let(f"{x} @ {a} @ {b}")
    if way == 6:
        delta = draft.let(draft.pick(f"{b} @ {a}", f"torch.mm({b}, {a})", f"torch.einsum('nr,rk->nk', {b}, {a})"))
        delta = scaled(draft, delta) if draft.chance(0.4) else delta
        return draft.let(draft.pick(f"F.linear({x}, {delta})", f"{x} @ {delta}.T"))
    if way == 7:
        u = draft.let(f"torch.einsum('...k,rk->...r', {x}, {a})")
        return draft.let(f"torch.einsum('...r,nr->...n', {u}, {b})")
    if way == 8:
        return draft.let(f"torch.einsum('...k,rk,nr->...n', {x}, {a}, {b})")
    if way == 9:  # on columns
        flat = draft.let(f"{x}.flatten(0, -2)")
        product = draft.let(draft.pick(f"({b} @ ({a} @ {flat}.T)).T", f"(({b} @ {a}) @ {flat}.T).T"))
        return draft.let(f"{product}.unflatten(0, {x}.shape[:-1])")
    u = draft.let(f"F.linear({x}, {a})")
    return draft.let(f"({u}.unsqueeze(-2) @ {b}.T).squeeze(-2)")


def _add(draft: Draft, y: str, delta: str) -> str:
    """Base and update as one, with or without casts."""
    delta = scaled(draft, delta)
    if draft.kind(delta) != draft.kind(y):
        way = draft.rng.randrange(5)
        if way < 2:
            delta = draft.let(f"{delta}.to({y}.dtype)")
        elif way < 4:
            total = draft.let(draft.pick(f"{y} + {delta}", f"{delta} + {y}", f"{y}.to({delta}.dtype) + {delta}"))
            return draft.let(f"{total}.to({draft.kind(y)})") if draft.kind(total) != draft.kind(y) else total
    return draft.let(
        draft.pick(
            f"{y} + {delta}",
            f"{y} + {delta}",
            f"{delta} + {y}",
            f"{y} - {delta}",
            f"torch.add({y}, {delta}, alpha=2)",
            f"torch.sub({y}, {delta}, alpha=0.5)",
            f"{y}.add({delta})",
        )
    )


def _lora(draft: Draft, x: str, y: str) -> str:
    n = features(draft, y)
    for _ in range(draft.pick(1, 1, 1, 2)):
        y = _add(draft, y, low_rank(draft, x, n, _factor_dtype(draft, y)))
    return y


def _deltas_first(draft: Draft, x: str, y: str) -> str:
    """Two adapters together, then the base."""
    n, dtype = features(draft, y), draft.kind(y)
    first, second = (scaled(draft, low_rank(draft, x, n, dtype)) for _ in range(2))
    return draft.let(f"({first} + {second}) + {y}")


def _added_in_product(draft: Draft, x: str, y: str) -> str:
    """The base's result as the bias of the adapter's second product (unsloth, addmm)."""
    if draft.kind(x) != draft.kind(y):
        raise Unfit("the factors take one dtype")
    n, k, r, dtype = features(draft, y), features(draft, x), _rank(draft), draft.kind(y)
    a, b = draft.parameter(r, k, dtype=dtype), draft.parameter(n, r, dtype=dtype)
    more = draft.pick("", ", alpha=2.0", ", alpha=0.5", ", beta=2", ", alpha=-1, beta=0.5")
    if draft.chance(0.3):
        if len(draft.shape(x)) != 3:
            raise Unfit("a batch is needed")
        return draft.let(f"torch.baddbmm({y}, {x} @ {a}.T, {b}.T.expand({x}.shape[0], -1, -1){more})")
    if len(draft.shape(x)) == 1:
        u = draft.let(f"torch.mv({a}, {x})")
        return draft.let(f"{y}.{draft.pick('addmv', 'addmv', 'addmv_')}({b}, {u}{more})")
    flat, base = draft.let(f"{x}.flatten(0, -2)"), draft.let(f"{y}.flatten(0, -2)")
    u = draft.let(f"torch.matmul({flat}, {a}.t())")
    function = "addmm_" if draft.chance(0.3) else "addmm"
    return draft.let(f"{base}.{function}({u}, {b}.t(){more}).unflatten(0, {x}.shape[:-1])")


def _in_place(draft: Draft, x: str, y: str) -> str:
    delta = low_rank(draft, x, features(draft, y), draft.kind(y))
    if draft.chance(0.5):
        draft.let(f"{delta}.mul_({draft.number()})")
    return draft.let(f"{y}.add_({delta})")


# ---- others of the family ---------------------------------------------------------------------------------


def _weights(draft: Draft, x: str, y: str) -> tuple[str, str, str, torch.dtype]:
    """(n, k, a new base weight, the dtype of all): for kinds that read the base's weight themselves."""
    n, k, dtype = features(draft, y), features(draft, x), draft.kind(x)
    return n, k, draft.parameter(n, k, dtype=dtype), dtype


def _merged(draft: Draft, x: str, y: str) -> str:
    """Merged in the forward: ``(W + s B A) x``."""
    n, k, w, dtype = _weights(draft, x, y)
    r = _rank(draft)
    a, b = draft.parameter(r, k, dtype=dtype), draft.parameter(n, r, dtype=dtype)
    delta = scaled(draft, draft.let(f"{b} @ {a}"))
    bias = f", {draft.parameter(n, dtype=dtype)}" if draft.chance(0.3) else ""
    if draft.chance(0.3):
        return draft.let(f"{x} @ ({w} + {delta}).T")
    return draft.let(f"F.linear({x}, {w} {draft.pick('+', '+', '-')} {delta}{bias})")


def _dora(draft: Draft, x: str, y: str) -> str:
    n, k, w, dtype = _weights(draft, x, y)
    r = _rank(draft)
    a, b = draft.parameter(r, k, dtype=dtype), draft.parameter(n, r, dtype=dtype)
    s, m = draft.number(), draft.parameter(n, dtype=dtype, kind="positive")
    norm = draft.let(draft.pick(f"torch.linalg.norm({w} + {s} * {b} @ {a}, dim=1)", f"({w} + {b} @ {a}).norm(dim=1)"))
    c = draft.let(draft.pick(f"({m} / {norm}).view(1, -1)", f"{m} / {norm}"))
    base, lora = draft.let(f"F.linear({x}, {w})"), draft.let(f"F.linear(F.linear({x}, {a}), {b})")
    whole = draft.pick(
        f"{base} + ({c} - 1) * {base} + {c} * {lora} * {s}",
        f"{c} * ({base} + {s} * {lora})",
        f"({base} + {lora}) * {c}",
        f"({c} - 1) * {base} + {c} * {lora} + {base}",
    )
    y = draft.let(whole)
    return draft.let(f"{y} + {draft.parameter(n, dtype=dtype)}") if draft.chance(0.3) else y


def _vector_on_rows(draft: Draft, x: str, y: str) -> str:
    """(IA)³: features of the result times a vector, before or after an adapter."""
    n, dtype = features(draft, y), draft.kind(y)
    shape = draft.pick((n,), (n,), ("1", n), ("1", "1", n))
    if len(shape) > len(draft.shape(y)):
        shape = (n,)
    v = draft.parameter(*shape, dtype=dtype, kind=draft.pick("positive", "normal"))
    y = _lora(draft, x, y) if draft.chance(0.5) else y
    return draft.let(draft.pick(f"{y} * {v}", f"{v} * {y}"))


def _vector_on_columns(draft: Draft, x: str, y: str) -> str:
    """The activation's features times a vector, for the adapter alone or for all."""
    v = draft.parameter(features(draft, x), dtype=draft.kind(x), kind="positive")
    scaled_x = draft.let(f"{x} * {v}")
    n = features(draft, y)
    y = y if draft.chance(0.7) else draft.let(f"F.linear({scaled_x}, {_weights(draft, x, y)[2]})")
    return _add(draft, y, low_rank(draft, scaled_x, n, draft.kind(x)))


def _vera(draft: Draft, x: str, y: str) -> str:
    n, k, r, dtype = features(draft, y), features(draft, x), _rank(draft), draft.kind(x)
    a, b = draft.parameter(r, k, dtype=dtype), draft.parameter(n, r, dtype=dtype)
    d, v = draft.parameter(r, dtype=dtype), draft.parameter(n, dtype=dtype)
    if draft.chance(0.3):  # both larger and sliced, as PEFT keeps them
        a = draft.let(f"{draft.parameter(f'2*{r}', k, dtype=dtype)}[:{r}]")
    return _add(draft, y, draft.let(f"{v} * F.linear({d} * F.linear({x}, {a}), {b})"))


def _hadamard(draft: Draft, x: str, y: str) -> str:
    """LoHa."""
    n, k, r, dtype = features(draft, y), features(draft, x), _rank(draft), draft.kind(x)
    first, second = (f"{draft.parameter(n, r, dtype=dtype)} @ {draft.parameter(r, k, dtype=dtype)}" for _ in range(2))
    delta = draft.let(f"({first}) * ({second})")
    return _add(draft, y, draft.let(f"F.linear({x}, {delta} * {draft.number()})"))


def _divisors(draft: Draft, size: int) -> list[int]:
    return [d for d in (1, 2, 3, 4, 6, 8) if size and size % d == 0]


def _kron(draft: Draft, x: str, y: str) -> str:
    """LoKr: ``w1 ⊗ w2``, with factors of factors."""
    n, k, dtype = draft.shape(y)[-1], draft.shape(x)[-1], draft.kind(x)
    if not n or not k:
        raise Unfit("nothing to divide")
    p, q = draft.pick(*_divisors(draft, n)), draft.pick(*_divisors(draft, k))
    w1 = draft.parameter(str(p), str(q), dtype=dtype)
    w2 = draft.parameter(str(n // p), str(k // q), dtype=dtype)
    if draft.chance(0.3):
        r = _rank(draft)
        left, right = draft.parameter(str(n // p), r, dtype=dtype), draft.parameter(r, str(k // q), dtype=dtype)
        w2 = draft.let(f"{left} @ {right}")
    delta = draft.let(draft.pick(f"torch.kron({w1}, {w2})", f"torch.kron({w1}, {w2}) * {draft.number()}"))
    if draft.chance(0.2):
        return draft.let(f"F.linear({x}, {_weights(draft, x, y)[2]} + {delta})")
    return _add(draft, y, draft.let(f"F.linear({x}, {delta})"))


def _gaws(draft: Draft, x: str, y: str) -> str:
    """``I ⊗ G`` on slices of the features, or ``G ⊗ I``."""
    n, k = draft.shape(y)[-1], draft.shape(x)[-1]
    blocks = [d for d in _divisors(draft, k) if n % d == 0 and d > 1]
    if not blocks:
        raise Unfit("no common divisor")
    p, dtype = draft.pick(*blocks), _factor_dtype(draft, y)
    x = x if draft.kind(x) == dtype else draft.let(f"{x}.to({dtype})")
    g = draft.parameter(str(n // p), str(k // p), dtype=dtype)
    v = draft.parameter(str(k // p), dtype=dtype, kind="positive")
    if draft.chance(0.6):
        slices = draft.let(draft.pick(f"{x}.unflatten(-1, ({p}, {k // p}))", f"{x}.view(*{x}.shape[:-1], {p}, -1)"))
        product = draft.pick(
            f"F.linear({slices}, {g})",
            f"{slices} @ {g}.T",
            f"F.linear({slices} * {v}, {g})",
            f"F.linear({slices}, {g} * {v})",
        )
        delta = draft.let(f"({product}).flatten(-2)")
    else:
        slices = draft.let(f"{x}.unflatten(-1, ({k // p}, {p})).mT{draft.pick('', '.contiguous()')}")
        delta = draft.let(f"F.linear({slices}, {draft.pick(g, f'{g} * {v}')}).mT.flatten(-2)")
    return _add(draft, y, delta)


def _blocks(draft: Draft, x: str, y: str) -> str:
    """GraLoRA: two batched products over blocks of features."""
    n, k, dtype = draft.shape(y)[-1], draft.shape(x)[-1], draft.kind(x)
    blocks = [d for d in (2, 2, 4) if n and k and n % d == 0 and k % d == 0]
    if not blocks:
        raise Unfit("no common divisor")
    p = draft.pick(*blocks)
    r = p * draft.pick(1, 1, 1, 2)
    a = draft.parameter(str(p), str(k // p), str(r), dtype=dtype)
    b = draft.parameter(str(p), str(r), str(n // p), dtype=dtype)
    inner = draft.let(f"torch.einsum('...ni,nir->...nr', {x}.unflatten(-1, ({p}, {k // p})), {a})")
    dealt = draft.let(f"{inner}.unflatten(-1, ({p}, {r // p})).transpose(-3, -2).flatten(-2)")
    dealt = inner if draft.chance(0.15) else dealt
    return _add(draft, y, draft.let(f"torch.einsum('...jr,jro->...jo', {dealt}, {b}).flatten(-2)"))


def _convolved(draft: Draft, x: str, y: str) -> str:
    """Convolutions along tokens, of one of them or, but for the last, of three."""
    n, k, dtype = features(draft, y), features(draft, x), draft.kind(x)
    if len(draft.shape(x)) not in (2, 3) or 0 in draft.shape(x):
        raise Unfit("no image")
    r, size, more = _rank(draft), *draft.pick(("1", ""), ("1", ""), ("3", ", padding=1"))
    image = draft.let(f"{x}.mT{'[None]' * (len(draft.shape(x)) == 2)}{draft.pick('', '.contiguous()')}")
    w, a = draft.parameter(n, k, size, dtype=dtype), draft.parameter(r, k, size, dtype=dtype)
    bias = draft.parameter(n, dtype=dtype) if draft.chance(0.3) else "None"
    base = draft.let(f"F.conv1d({image}, {w}, {bias}{more})")
    b = draft.parameter(n, r, "1", dtype=dtype)
    delta = scaled(draft, draft.let(f"F.conv1d({draft.let(f'F.conv1d({image}, {a}{more})')}, {b})"))
    return draft.let(f"({base} + {delta}).mT{'[0]' * (len(draft.shape(x)) == 2)}")


def _rotated(draft: Draft, x: str, y: str) -> str:
    """A base weight times a rotation that parameters make (OFT), by way of a series."""
    _, k, w, dtype = _weights(draft, x, y)
    r = draft.parameter(k, k, dtype=dtype)
    skew = draft.let(f"{r} - {r}.T")
    q = draft.let(f"torch.eye({k}, dtype={dtype}, device={x}.device) + {skew}") if draft.chance(0.5) else skew
    return draft.let(f"F.linear({x}, {w} @ {q})")


def _on_a_product(draft: Draft, x: str, y: str) -> str:
    """An adapter whose activation is another linear's product."""
    other = projection(draft, x, features(draft, x))
    y = projection(draft, other, features(draft, y)) if draft.chance(0.5) else y
    return draft.pick(_lora, _kron, _gaws)(draft, other, y)  # type: ignore[no-any-return]


# ---- near misses ------------------------------------------------------------------------------------------


def _near_miss(draft: Draft, x: str, y: str) -> str:
    """What is no adapter of this projection, though little tells it from one."""
    n, dtype = features(draft, y), draft.kind(y)
    way = draft.rng.randrange(12)
    if way < 4:
        wrong = draft.pick(f"{x}.sin()", f"{x} + 1", f"{x}.flip(0)", f"{x}.roll(1, 0)", f"{x} * {x}", f"{x}.relu()")
        return _add(draft, y, low_rank(draft, draft.let(wrong), n, draft.kind(x)))
    delta = low_rank(draft, x, n, dtype)
    if way < 6:
        bent = draft.pick("tanh()", "flip(-1)", "sum(-1, keepdim=True)", "mean(0, keepdim=True)")
        return draft.let(f"{y} + {delta}.{bent}")
    if way == 6:
        return draft.let(draft.pick(f"{y} * {delta}", f"torch.maximum({y}, {delta})", f"{y}.sigmoid() + {delta}"))
    if way == 7:
        return draft.let(f"({y} + {delta}) + ({y} - {delta}).tanh()")
    tokens = draft.shape(y)[-2] if len(draft.shape(y)) > 1 else 1
    p = draft.parameter(str(tokens), dtype=dtype, kind="positive")
    if way == 8:
        return draft.let(f"({y} + 2 * {delta}) * {p}[:, None]")
    if way == 9:
        return draft.let(f"{y} * {p}[:, None]")
    if way == 10:
        return draft.let(f"{y} + {low_rank(draft, draft.let(f'{x} * {p}[:, None]'), n, dtype)}")
    other = draft.pick(torch.int64, torch.bool, torch.float64, torch.int32)
    mask = draft.parameter(draft.pick(n, "1"), dtype=other, kind="mask")
    return draft.let(draft.pick(f"({y} + {delta}) * {mask}", f"{y} * {mask}", f"{y} + {delta} * {mask}"))


KINDS: list[tuple[Callable[[Draft, str, str], str], float]] = [
    (_lora, 12),
    (_deltas_first, 1),
    (_added_in_product, 1),
    (_in_place, 0.5),
    (_merged, 1.5),
    (_dora, 1.5),
    (_vector_on_rows, 1.5),
    (_vector_on_columns, 1),
    (_vera, 1),
    (_hadamard, 1),
    (_kron, 2),
    (_gaws, 3),
    (_blocks, 2),
    (_convolved, 1.5),
    (_rotated, 0.5),
    (_on_a_product, 1),
    (_near_miss, 3),
]
