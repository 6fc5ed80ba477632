"""Level 1: the passes. A random program's graph goes through the pipeline, and what becomes of it is run by the
reference executor beside the graph as it was: no kernel is built, so that a minute has thousands of cases.

Beside answers, every case checks that passes neither raise nor add guards, that nodes are what they say they are, that
records tell what was fused, and now and then that a second run of a pass matches nothing and that `verify` proves all.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from gawscompile.codegen import triton
from gawscompile.ir.recipe import hoisted
from gawscompile.ir.records import GraphRecord, Reason
from gawscompile.ir.sums import linear, operator_group, operator_sum, project
from gawscompile.options import Options
from gawscompile.passes.context import Context, Rewrite, verify
from gawscompile.planning.table import Program as Planned
from gawscompile.runtime.ops import OPS
from gawscompile.verify import proof, unfinished
from gawscompile.verify.work import account
from tests.fuzz import data, graphs, judge, reference
from tests.fuzz.config import STAGES, Config, without_kernels
from tests.fuzz.coverage import Coverage, Failure
from tests.fuzz.programs import Program
from tests.fuzz.shrink import shrink
from tests.fuzz.structure import generate

LEVEL = 1
BOUNDED = re.compile("relu|tanh|sigmoid|silu|gelu|softmax|exp|maximum|sin|cos|norm")
"""Functions of which inf is a number."""

TWICE = tuple(name for name in STAGES if name not in ("choose_plan", "recover_operators"))
"""The passes that match nothing when they run again. What has a plan cannot be planned anew; parts of a sum that was
left as it was for one of them may be sums once that one is settled."""

BACKWARD = ("sink_scales", "gather_summands", "turn_products", "join_gradients", "recompute_inputs")
"""Passes over the gradients of a graph, which no block has."""
MUST_REACH: dict[str, frozenset[str]] = {
    # no block makes these yet
    "pass": frozenset(STAGES) - {"join_banks", "join_collectives", *BACKWARD},
    "plan": frozenset({"gemv_cpp", *triton.PLANS}),
    "reason": frozenset(
        reason.name
        for reason in (
            Reason.DEVICE,
            Reason.DTYPE,
            Reason.MIXED_DTYPES,
            Reason.WEIGHT_COMPUTED,
            Reason.WEIGHT_LAYOUT,
            Reason.NO_BASE,
            Reason.SEVERAL_BASES,
            Reason.RESHAPED,
            Reason.SCALE,
            Reason.FACTOR_SHAPE,
            Reason.LIBRARY,
            Reason.ATTENTION,
            Reason.DISABLED,
            Reason.FUEL,
        )
    ),
}
"""The other reasons need gradients, a missing compiler, Dynamo, or a failure."""


@dataclass
class Outcome:
    """Of one case: what is wrong, if anything, and what was reached."""

    kind: str = ""
    message: str = ""
    record: GraphRecord = field(default_factory=lambda: GraphRecord("fuzz"))

    @property
    def failed(self) -> bool:
        return bool(self.kind)

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}" if self.failed else "right"


def run(seed: int, coverage: Coverage) -> Failure | None:
    """One case. Raises only where the fuzzer itself is at fault."""
    program = generate(seed)
    config = Config.of(seed, program)
    outcome = check(program, config)
    _cover(coverage, program, config, outcome.record)
    if not outcome.failed:
        return None
    small, config, outcome = shrink(program, config, outcome, check)
    call = [
        "# as the fuzzer runs it:",
        "from tests.fuzz.passes import Config, check",
        "from tests.fuzz.programs import Input, Program, Step",
        "",
        f"print(check({small!r}, {config}))",
    ]
    kind: Any = outcome.kind
    return Failure(LEVEL, seed, kind, outcome.message, small.source("\n".join(call)))


def check(program: Program, config: Config) -> Outcome:
    """Compile a program and judge the result."""
    traced = graphs.trace(program, config.device, config.symbolic, config.shared)
    if config.one_module:
        for node in traced.graph.nodes:
            node.meta["nn_module_stack"] = {"self": ("L['self']", torch.nn.Module)}
    outcome = Outcome()
    with without_kernels(config):
        guards = len(traced.shape_env.guards) if traced.shape_env else 0
        try:
            barred = _barred(traced, config) if config.barred is not None else {}
            context = rewrite(traced, config, outcome.record, barred=barred)
            if config.proven:
                _prove(context)
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{at.filename.rpartition('/')[2]}, {at.name}"
            return replace(outcome, kind="crash", message=f"{type(error).__name__} ({where}): {error}")
        fault = records(context, config)
        # to spell out what is left of a part of the pipeline, torch may add guards of its own
        whole = not (config.disable or context.ended or barred)
        if whole and traced.shape_env and len(traced.shape_env.guards) != guards:
            fault = f"a pass added the guard {traced.shape_env.guards[-1].expr}"
        fault = fault or compare(program, traced, context, config)
    return outcome if fault is None else replace(outcome, kind="wrong", message=fault)


# ---- the pipeline -----------------------------------------------------------------------------------------


class _Watched(Context):
    """Keeps every rewrite that goes ahead, by the name that it has in every run."""

    def allows(self, *nodes: Node) -> bool:
        found = super().allows(*nodes)
        if found and self.under_way is not None:
            self.__dict__.setdefault("rewrites", []).append(self.under_way)
        return found


def _barred(traced: graphs.Traced, config: Config) -> dict[Rewrite, str]:
    """The one of a graph's rewrites that is to be barred."""
    context = rewrite(traced, config, GraphRecord("fuzz"))
    found = context.__dict__.get("rewrites", [])
    return {found[(config.barred or 0) % len(found)]: "barred by the fuzzer"} if found else {}


def rewrite(
    traced: graphs.Traced,
    config: Config,
    record: GraphRecord,
    until: str | None = None,
    barred: dict[Rewrite, str] | None = None,
) -> Context:
    """Run the pipeline over a copy, as the backend does. Raises what passes raise, and `VerifierError`."""
    inputs = list(traced.graph.find_nodes(op="placeholder"))
    stored = [inputs[i] for i in traced.stored] if config.stored else []
    options = Options(strict=True, fuel=config.fuel, disable=config.disable)
    context = _Watched.of(traced.graph, options, record, stored, barred, holder=traced.module)
    work = context.graph
    for name, stage in STAGES.items():
        context.stage = name
        if name not in config.disable:
            stage.run(work, context)
            verify(context)
            work.lint()
            if config.twice and name in TWICE and config.fuel is None:
                _again(name, stage, context)
        if name == until:
            return context
    if config.disable or context.ended or barred:
        context.stage = "spelled_out"
        unfinished.finish(context)
        verify(context)
    work.eliminate_dead_code()
    work.lint()
    return context


def _again(name: str, stage: Any, context: Context) -> None:
    """A second run matches nothing, and is forgotten."""
    record, matched = context.record, context.record.passes.get(name, 0)
    linears, notes, matches = len(record.linears), len(record.notes), record.matches
    stage.run(context.graph, context)
    if record.passes.get(name, 0) != matched:
        raise AssertionError(f"a second run of {name} matches")
    del record.linears[linears:], record.notes[notes:]
    record.matches = matches


def _prove(context: Context) -> None:
    """`verify` finds nothing, and the account of a group can be made."""
    account(context)
    said: list[str] = []
    context.complain = said.append
    context.stage = "verify"
    proof.verify_rewrites(context)
    context.graph.lint()
    if said:
        raise AssertionError(said[0])


def records(context: Context, config: Config) -> str | None:
    """What the record says that is not so."""
    record = context.record
    planned = [node for node in context.graph.nodes if node.op == "call_function" and node.target in OPS]
    programs = sorted(str(node.args[2]) for node in planned)
    if sorted(group.program for group in record.groups) != programs:
        return f"records {[group.program for group in record.groups]} where {programs} are in the graph"
    members = sum(len(Planned.parse(program).spec.projections) for program in programs)
    fused = [entry for entry in record.linears if entry.status == "fused"]
    if len(fused) != members or sum(len(group.members) for group in record.groups) != members:
        return f"{len(fused)} linears are recorded as fused, {members} are"
    for entry in record.linears:
        if entry.status == "fused" and (entry.group is None or entry.reason):
            return f"a fused linear with reason {entry.reason} and group {entry.group}"
        if entry.status == "rejected" and entry.reason not in Reason.__members__:
            return f"a linear was left alone for the reason {entry.reason}"
    ours = {linear, operator_sum, operator_group, project, hoisted}
    left = [node.name for node in context.graph.nodes if node.op == "call_function" and node.target in ours]
    return f"{left} are no operations of torch's" if left else None


# ---- answers ----------------------------------------------------------------------------------------------


def compare(program: Program, traced: graphs.Traced, context: Context, config: Config) -> str | None:
    """What is wrong with the rewritten graph's answers, and after which pass."""
    wrong = _compare(program, traced, context.graph, config, context.record)
    if wrong is None or context.barred:
        return wrong
    for name in STAGES:
        if name not in config.disable:
            partway = rewrite(traced, replace(config, twice=False), GraphRecord("bisect"), name)
            if _compare(program, traced, partway.graph, config, context.record) is not None:
                return f"after {name}: {wrong}"
    return f"after all passes: {wrong}"


def _compare(program: Program, traced: graphs.Traced, graph: Graph, config: Config, record: GraphRecord) -> str | None:
    judgement = judge.Judgement()
    # inf - inf is NaN in one order of a sum and inf in another, which a relu, say, tells apart
    bounded = config.way == "inf" and any(BOUNDED.search(step.text) for step in program.steps)
    # blocks that were merged have zeros beside them: 0 · inf; the library's attention gives zeros for scores of NaN
    library = any("scaled_dot_product" in step.text for step in program.steps)
    spread = bounded or library or "merge_blocks" in record.passes
    for draw in range(judge.DRAWS):
        batch: dict[str, int] = {}
        if traced.symbols and draw % 2 and traced.shape_env and not traced.shape_env.guards:
            apart = 0 if config.shared else 1
            batch = {name: program.sizes[name] + 1 + apart * i for i, name in enumerate(traced.symbols)}
        try:
            theirs = _run(program, traced, traced.graph, config, draw, batch)
        except RuntimeError:
            if not batch:
                raise
            continue  # these sizes do not fit together
        try:
            ours = _run(program, traced, graph, config, draw, batch, truthful=draw == 0)
        except Exception as error:
            return f"the rewritten graph cannot be run: {type(error).__name__}: {error}"
        exact = _run(program, traced, traced.graph, config, draw, batch, exact=True)
        wrong = (judge.structure(ours, theirs) if draw < 2 else None) or judgement.add(
            ours, theirs, exact, spread, bounded
        )
        if wrong is not None:
            return wrong
        if judgement.doubt() is None and draw >= (1 if traced.symbols else 0):
            return None
    return judgement.doubt()


def _run(
    program: Program,
    traced: graphs.Traced,
    graph: Graph,
    config: Config,
    draw: int,
    batch: dict[str, int],
    exact: bool = False,
    truthful: bool = False,
) -> reference.Ran:
    tensors: Sequence[torch.Tensor] = data.tensors(program, 1000 * config.seed + draw, config.way, batch)
    if exact:
        tensors = [t.double() if t.is_floating_point() else t for t in tensors]
    numbers = traced.arguments(program, tensors, batch)
    ran = reference.run(graph, traced.module, numbers, exact, truthful)
    return reference.Ran(ran.outputs, list(tensors))


def _cover(coverage: Coverage, program: Program, config: Config, record: GraphRecord) -> None:
    for name in record.passes.keys() & STAGES.keys():
        coverage.reach("pass", name)
    for group in record.groups:
        for plan, _ in Planned.parse(group.program).table.rows:
            coverage.reach("plan", plan.partition("[")[0])
    reasons = {entry.reason for entry in record.linears if entry.reason}
    said = " ".join(record.notes)
    reasons |= {reason.name for reason in Reason if f"{reason.name}:" in said or reason.value in said}
    for name in sorted(reasons):
        coverage.reach("reason", name)
    for note in program.notes:
        coverage.reach("block", note)
    how = ["symbolic"] * bool(config.symbolic) + ["in place"] * (not program.functional)
    how += ["fuel"] * (config.fuel is not None) + ["disable"] * bool(config.disable)
    how += ["barred"] * (config.barred is not None) + [config.device, config.way]
    for name in how:
        coverage.reach("case", name)
