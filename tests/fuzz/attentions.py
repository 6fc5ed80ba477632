"""Attention: by the library's op, and written out as products around a softmax; what looks like it, and is another."""

from __future__ import annotations

from tests.fuzz.bases import features, projection
from tests.fuzz.programs import Draft, Unfit


def attention(draft: Draft, x: str, widths: list[str]) -> str:
    """Heads of x over keys and values: projections of it, or a cache. Back in x's features, where they fit."""
    if len(draft.shape(x)) != 3:
        raise Unfit("heads need rows and tokens")
    groups = draft.pick(1, 2)
    heads = groups * draft.pick(1, 2)
    if draft.shape(x)[-1] % heads or not draft.shape(x)[-1]:
        raise Unfit("heads of equal sizes")
    q = draft.let(f"{x}.unflatten(-1, ({heads}, -1)).transpose(1, 2)")
    rows, _, queries, size = draft.shape(q)
    k, v = _cached(draft, x, groups, size) if draft.chance(0.6) else _projected(draft, x, heads)
    times = heads // draft.shape(k)[1]
    if draft.chance(0.15):
        q = draft.let(draft.pick(f"{q}.contiguous()", f"{q}.mT.contiguous().mT", f"{q}.float().to({q}.dtype)"))
    if times > 1:
        k, v = (_repeated(draft, one, times) for one in (k, v))
    mask = _mask(draft, rows, heads, queries, draft.shape(k)[2], draft.kind(q))
    out = _by_library(draft, q, k, v, mask) if draft.chance(0.25) else _written_out(draft, q, k, v, mask, heads)
    if draft.chance(0.2):
        return out
    merged = draft.let(f"{out}.transpose(1, 2).reshape({rows}, {queries}, -1)")
    return projection(draft, merged, features(draft, x)) if draft.chance(0.5) else merged


def _cached(draft: Draft, x: str, groups: int, size: int) -> tuple[str, str]:
    rows, length = draft.shape(x)[0], draft.size(draft.pick(1, 3, 5, 8))
    wide = draft.pick(*[size] * 9, size + 1)
    layout = draft.pick("t", "t", "t", "t.transpose(1, 2).contiguous().transpose(1, 2)", "t.mT.contiguous().mT")
    return (
        draft.new("x", (str(rows), str(groups), length, str(size)), draft.kind(x), "normal", layout),
        draft.new("x", (str(rows), str(groups), length, str(wide)), draft.kind(x), "normal", layout),
    )


def _projected(draft: Draft, x: str, heads: int) -> tuple[str, str]:
    made = (projection(draft, x, features(draft, x)) for _ in range(2))
    k, v = (draft.let(f"{one}.unflatten(-1, ({heads}, -1)).transpose(1, 2)") for one in made)
    return k, v


def _repeated(draft: Draft, one: str, times: int) -> str:
    rows, groups, length, size = draft.shape(one)
    wide = f"({rows}, {groups}, {times}, {length}, {size})"
    around = f"({rows}, {times}, {groups}, {length}, {size})"
    whole = f"({rows}, {groups * times}, {length}, {size})"
    return draft.let(
        draft.pick(
            *[f"{one}[:, :, None].expand{wide}.reshape{whole}"] * 4,
            f"{one}.repeat_interleave({times}, 1)",
            f"{one}[:, None].expand{around}.reshape{whole}",  # heads in another order
        )
    )


def _mask(draft: Draft, rows: int, heads: int, queries: int, keys: int, dtype: object) -> str:
    """What is added to scores, or nothing. A query sees its first key."""
    lead = draft.pick(f"{rows}, 1", f"{rows}, {heads}", "1, 1", f"1, {heads}")
    seen = f"(torch.arange({keys}) <= torch.arange({queries})[:, None] + {max(keys - queries, 0)})"
    least = draft.pick("float('-inf')", f"torch.finfo({dtype}).min")
    return str(
        draft.pick(
            "",
            "",
            draft.let(f"torch.where({seen}[None, None], 0.0, {least}).to({dtype})"),
            draft.let(f"torch.where({seen}.expand({lead}, {queries}, {keys}), 0.0, {least}).to({dtype})"),
            draft.new("x", (*lead.split(", "), str(draft.pick(1, queries)), str(keys)), draft.dtype, "normal"),
            draft.new("x", (str(queries), str(keys)), draft.dtype, "normal"),
        )
    )


def _by_library(draft: Draft, q: str, k: str, v: str, mask: str) -> str:
    more = f", attn_mask={mask}" if mask else draft.pick("", ", is_causal=True")
    scale = draft.pick("", ", scale=0.5")
    return draft.let(f"F.scaled_dot_product_attention({q}, {k}, {v}{more}{scale})")


def _written_out(draft: Draft, q: str, k: str, v: str, mask: str, heads: int) -> str:
    if draft.chance(0.3):
        q = draft.let(f"{q} * 0.5")
    rows, _, queries, _ = draft.shape(q)
    folded = draft.chance(0.2)
    if folded:
        q, k, v = (draft.let(f"{one}.reshape({rows * heads}, *{one}.shape[2:])") for one in (q, k, v))
    s = draft.let(f"torch.bmm({q}, {k}.mT)" if folded else f"{q} @ {k}.transpose(-1, -2)")
    if folded:
        s = draft.let(f"{s}.view({rows}, {heads}, {queries}, -1)")
    for _ in range(draft.pick(0, 1, 1, 2)):
        s = draft.let(draft.pick(f"{s} * 0.3", f"{s} / 2.0", f"{s} * -0.5", f"{s} / torch.full((), 3.0)", f"{s} + 0.5"))
    if draft.chance(0.3):
        s = draft.let(
            draft.pick(
                *[f"torch.tanh({s} / 0.7) * 0.7"] * 3,
                f"torch.tanh({s} / 2.0) * 3.0",
                f"torch.tanh({s}) * 2",
                f"torch.tanh({s} * 0.5)",
                f"torch.sin({s}) * 2",
            )
        )
    if mask:
        s = draft.let(draft.pick(f"{s} + {mask}", f"{mask} + {s}", f"{s} + {mask}", f"{s} - {mask}.clamp(-9, 9)"))
    if draft.chance(0.1):
        s = draft.let(draft.pick(f"{s}.to(torch.int32).to({s}.dtype)", f"{s}.half().to({s}.dtype)", f"{s} * 0.9"))
    w = _weights(draft, s, heads)
    if draft.chance(0.15):
        w = draft.let(draft.pick(f"torch.dropout({w}, 0.1, False)", f"{w}.half().to({w}.dtype)", f"{w} * 2"))
    if folded:
        w = draft.let(f"{w}.reshape({rows * heads}, {queries}, -1)")
    out = draft.let(f"torch.bmm({w}, {v}).view({rows}, {heads}, {queries}, -1)" if folded else f"{w} @ {v}")
    return draft.let(f"{out} + {w}.sum()") if draft.chance(0.05) else out


def _weights(draft: Draft, s: str, heads: int) -> str:
    rows, _, queries, _ = draft.shape(s)
    dtype = draft.kind(s)
    if draft.chance(0.3):  # sinks
        sinks = draft.new("p", draft.pick((str(heads),), (str(heads),), ("1",)), draft.pick(dtype, dtype, draft.dtype))
        extra = draft.let(f"{sinks}.reshape(1, -1, 1, 1).expand({rows}, {heads}, {queries}, 1).to({dtype})")
        both = draft.let(draft.pick(*[f"torch.cat([{s}, {extra}], -1)"] * 4, f"torch.cat([{extra}, {s}], -1)"))
        if draft.chance(0.6):
            both = draft.let(f"{both} - {both}.max(dim=-1, keepdim=True).values")
        return draft.let(f"torch.softmax({both}, -1)[..., {draft.pick(':-1', ':-1', ':-1', '1:')}]")
    plain = f"torch.softmax({s}, -1)"
    axis = draft.pick("-1", "-1", "-1", "-1", "-1", "-2")
    wide = f"torch.softmax({s}, {axis}, dtype=torch.float32).to({dtype})"
    return draft.let(draft.pick(plain, wide, wide))
