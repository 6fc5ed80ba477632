"""What `explain` gives back: as text, as plain data, as a page."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import sympy

from gawscompile.debug.frames import Trouble
from gawscompile.ir.records import GroupRecord, LinearRecord, Work, plain

MANY = (1, 16, 128)
"""Numbers of tokens for which times are predicted where the number is symbolic."""


@dataclass
class Report:
    """An entry for every linear of the model, the groups they run in, and what else there is to know.

    ``str(report)`` is for people, `to_dict` the same as plain data, `to_html` as a page.
    """

    linears: list[LinearRecord]
    groups: list[GroupRecord]
    graphs: int
    passes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)
    guards: int | None = None
    watched: int = 0
    """How many of the guards are checked only after a change."""
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def guard_seconds(self) -> float | None:
        """What a call spends on guards, where that was measured."""
        return self.parts.get("guards")

    @property
    def fused(self) -> list[LinearRecord]:
        """The linears that run in generated kernels."""
        return [entry for entry in self.linears if entry.status == "fused"]

    def summary(self) -> str:
        """The outcome in one line."""
        adapted = [entry for entry in self.linears if entry.adapters]
        fused = sum(entry.status == "fused" for entry in adapted)
        reasons = Counter(entry.reason for entry in self.linears if entry.status != "fused")
        rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=str)) or "none"
        return (
            f"{len(self.linears)} linears in {self.graphs} graph(s): {len(self.fused)} fused into {len(self.groups)} "
            f"groups; with adapters {fused} of {len(adapted)} fused; left as they were: {rejected}"
        )

    def verdict(self) -> str:
        """One paragraph in words."""
        said = [_extent(self.linears, self.groups)]
        before, after = (_sum([getattr(group, name) for group in self.groups]) for name in ("before", "after"))
        if before and after:
            said.append(
                f"Their kernels take {_many(after.launches, 'launch', 'launches')} where the graph as traced has "
                f"{_many(before.launches, 'operation')}{_bytes_spared(before, after)}."
            )
        predicted = [predict(group) for group in self.groups]
        if self.groups and all(isinstance(seconds, float) for seconds in predicted):
            text = f"The cost model gives them {sum(predicted) * 1e3:.3g} ms a call"  # type: ignore[arg-type]
            measured = [group.measured for group in self.groups]
            if None not in measured:
                text += f"; alone and with cold weights they took {sum(measured) * 1e3:.3g} ms"  # type: ignore[arg-type]
            said.append(text + ".")
        count = Counter({kind: 0 for kind in ("graph break", "recompile")})
        for trouble in self.troubles:
            count[trouble.kind] += trouble.count
        worst = next(iter(self.troubles), None)
        if worst is None:
            said.append("The graph did not break, and nothing was compiled twice.")
        else:
            kinds = " and ".join(_many(times, kind) for kind, times in sorted(count.items()))
            said.append(f"{kinds}; the first: {worst.cause.rstrip('.')}. Remedy: {worst.remedy.rstrip('.')}.")
        if self.guards is not None:
            cost = f" ({self.guard_seconds * 1e6:.0f} µs)" if self.guard_seconds is not None else ""
            rest = f", and {self.watched} more after a change alone" if self.watched else ""
            said.append(f"Each call checks {_many(self.guards - self.watched, 'guard')} first{cost}{rest}.")
        return " ".join(map(_line, said))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: ``linears``, ``groups``, ``graphs``, ``passes``, ``notes``, ``summary``, ``verdict`` …"""
        return {
            "summary": self.summary(),
            "verdict": self.verdict(),
            "graphs": self.graphs,
            "linears": [asdict(entry) for entry in self.linears],
            "groups": [asdict(group) | {"predicted": predict(group)} for group in self.groups],
            "passes": dict(self.passes),
            "notes": list(self.notes),
            "troubles": [asdict(trouble) for trouble in self.troubles],
            "guards": self.guards,
            "watched": self.watched,
            "guard_seconds": self.guard_seconds,
            "parts": dict(self.parts),
        }

    def tables(self) -> list[tuple[str, list[Sequence[str]]]]:
        """(title, rows), the headers first: linears, groups (alike ones once), what Dynamo had trouble with."""
        linears: list[Sequence[str]] = [("linear", "shape", "dtype", "group", "plan, or why not", "operators")]
        for entry in self.linears:
            why = entry.plan or f"{entry.reason}: {entry.detail}"
            group = "-" if entry.group is None else str(entry.group)
            linears.append((entry.name, "{}x{}".format(*entry.shape), entry.dtype, group, why, entry.operators))
        if any(entry.shard for entry in self.linears):
            shards = ["over ranks", *(entry.shard for entry in self.linears)]
            linears = [(*row[:2], shard, *row[2:]) for row, shard in zip(linears, shards, strict=True)]
        found = [("Every linear", linears)]
        alike: dict[tuple[str, ...], list[GroupRecord]] = {}
        for one in self.groups:
            alike.setdefault((one.program, one.tokens, str(one.before)), []).append(one)
        rows = [_row(groups) for groups in alike.values()]
        if rows:
            titles = ("groups", "first", "m", "plan", "for every m", "launches", "bytes", "estimates in µs", "measured")
            found.append(("Groups: of kernels against operations as traced, and why this plan", [titles, *rows]))
        if self.parts:
            whole = sum(self.parts.values())
            parts = [(name, f"{taken * 1e3:.3f}", f"{taken / whole:.0%}") for name, taken in self.parts.items()]
            found.append(("Where a call's time goes", [("part", "ms", "share"), *parts]))
        if self.troubles:
            troubles = [(str(t.count), t.kind, t.cause, t.remedy) for t in self.troubles]
            found.append(("Breaks and recompiles", [("times", "what", "cause", "remedy"), *troubles]))
        return found

    def __str__(self) -> str:
        lines = [self.summary(), *[f"note: {_line(note)}" for note in self.notes], "", self.verdict()]
        for title, rows in self.tables():
            widths = [max(len(plain(row[i])) for row in rows) for i in range(len(rows[0]))]
            table = ["  ".join(plain(cell).ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
            table.insert(1, "  ".join("-" * width for width in widths))
            lines += ["", *([title] if title != "Every linear" else []), *map(str.rstrip, table)]
        return "\n".join(lines)

    def to_html(self) -> str:
        """The same as one page, without network."""
        parts = [f"<h1>gawscompile explain</h1><p>{_escaped(self.summary())}</p><p>{_escaped(self.verdict())}</p>"]
        parts += [f"<p>note: {_escaped(note)}</p>" for note in self.notes]
        for title, (head, *rows) in self.tables():
            cells = "".join(f"<th>{_escaped(cell)}</th>" for cell in head)
            body = "".join("<tr>" + "".join(f"<td>{_escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            parts.append(f"<h2>{_escaped(title)}</h2><table><tr>{cells}</tr>{body}</table>")
        return PAGE.replace("BODY", "\n".join(parts))


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>gawscompile explain</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>body { font: 14px/1.5 system-ui, sans-serif; margin: 24px; color: #1d2430; max-width: 1500px }
table { border-collapse: collapse; font-size: 13px } td, th { text-align: left; padding: 2px 14px 2px 0;
border-bottom: 1px solid #e3e6ec; vertical-align: top; overflow-wrap: anywhere }</style></head>
<body>
BODY
</body></html>
"""


def predict(group: GroupRecord) -> float | dict[int, float] | None:
    """Seconds a call by the cost model: for the group's number of tokens, or for some numbers where it is symbolic."""
    if not group.costs:
        return None
    if group.tokens.isdecimal():
        return _seconds(group.costs[_plan_for(group, int(group.tokens))], int(group.tokens))
    return {m: _seconds(group.costs[_plan_for(group, m)], m) for m in MANY}


def _plan_for(group: GroupRecord, m: int) -> str:
    for row in group.plan.split(", "):
        plan, _, bound = row.partition("<=")
        if not bound or m <= int(bound):
            return plan
    raise ValueError(f"no row of {group.plan} is for {m} tokens")


def _seconds(cost: str, m: int) -> float:
    symbol = sympy.Symbol("m", integer=True, positive=True)
    return float(sympy.sympify(cost, locals={"m": symbol}).subs(symbol, m))


def _together(members: list[str]) -> str:
    """``layers.0.self_attn.{q_proj, k_proj, v_proj}``."""
    parents = {path.rpartition(".")[0] for path in members}
    if len(members) == 1 or len(parents) > 1 or parents == {""}:
        return " + ".join(members)
    return f"{parents.pop()}.{{{', '.join(path.rpartition('.')[2] for path in members)}}}"


def _row(groups: list[GroupRecord]) -> Sequence[str]:
    """One line for groups that are alike."""
    first = groups[0]
    tokens = [int(first.tokens)] if first.tokens.isdecimal() else MANY
    costs = [
        f"{plan} {' / '.join(f'{_seconds(cost, m) * 1e6:.3g}' for m in tokens)}" for plan, cost in first.costs.items()
    ]
    note = "" if len(tokens) == 1 else f" at m = {' / '.join(map(str, tokens))}"
    before, after = first.before, first.after
    taken = [group.measured for group in groups if group.measured is not None]
    return (
        str(len(groups)),
        _together(first.members),
        first.tokens,
        first.plan,
        first.table or first.plan,
        f"{after.launches} for {before.launches}" if before and after else "-",
        f"{_size(after.bytes)} for {_size(before.bytes)}" if before and after else "-",
        ", ".join(costs) + note,
        f"{min(taken) * 1e6:.3g} µs" if taken else "-",
    )


def _size(text: str) -> str:
    if not text.isdecimal():
        return text
    number = float(text)
    for unit in ("B", "kB", "MB"):
        if number < 1000 or unit == "MB":
            return f"{number:.3g} {unit}"
        number /= 1000
    raise AssertionError


def _sum(works: list[Work | None]) -> Work | None:
    known = [work for work in works if work is not None]
    if not known or len(known) != len(works):
        return None
    total = sum(int(work.bytes) for work in known) if all(work.bytes.isdecimal() for work in known) else ""
    return Work(sum(work.launches for work in known), str(total))


def _bytes_spared(before: Work, after: Work) -> str:
    return f", and move {_size(after.bytes)} where those move {_size(before.bytes)}" if after.bytes else ""


def _extent(linears: list[LinearRecord], groups: list[GroupRecord]) -> str:
    adapted = [entry for entry in linears if entry.adapters]
    fused, left = sum(e.status == "fused" for e in adapted), [e for e in linears if e.status != "fused"]
    if not linears:
        return "There is no linear here."
    ours = f"{fused} of {_many(len(adapted), 'linear')} with adapters and " if adapted else "No linear has an adapter; "
    run = f"{sum(entry.status == 'fused' for entry in linears)} of all {len(linears)} run fused"
    text = f"{ours}{run}, in {_many(len(groups), 'group')}."
    if left:
        (reason, count), *_ = Counter(entry.reason for entry in left).most_common(1)
        example = next(entry for entry in left if entry.reason == reason)
        text += f" {_many(len(left), 'is', 'are')} left as they were, {count} for {reason}"
        text += f": {example.name}: {example.detail}."
    return text


def _many(count: int, what: str, several: str = "") -> str:
    return f"{count} {what if count == 1 else several or what + 's'}"


def _line(text: str) -> str:
    """Printable, on one line, whatever a module was called; not cut as short as a name."""
    return "".join(plain(text[i : i + 300]) for i in range(0, min(len(text), 3000), 300))


def _escaped(text: str) -> str:
    return html.escape(_line(text))
