"""``torch.compile(model, backend="gaws")``, whole.

    torch.compile → Dynamo → AOTAutograd → our passes, as Inductor's joint-graph pass → Inductor for all the rest

The hook is ``joint_custom_pre_pass``, whose ``uuid`` carries a hash of all our sources and options into Inductor's
cache keys: an edited pass invalidates what it compiled, and a warm start runs no pass at all.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import torch
from torch._dynamo.exc import RestartAnalysis, TorchDynamoException
from torch._dynamo.utils import counters, dynamo_timed
from torch._inductor.custom_graph_pass import CustomGraphPass

from gawscompile import cache
from gawscompile.analysis import collectives
from gawscompile.codegen import build
from gawscompile.ir.records import GraphRecord, Reason, plain
from gawscompile.observe import observer
from gawscompile.observe.dump import Dump
from gawscompile.observe.progress import Progress
from gawscompile.observe.store import RECORDS
from gawscompile.options import OptionError, Options, process_fuel
from gawscompile.passes import INFERENCE, PIPELINE
from gawscompile.passes.context import Context, Rewrite, VerifierError, inputs_of, trains, verify
from gawscompile.planning import devices
from gawscompile.runtime import (
    bound,
    eager_generate,
    executor,
    first_calls,
    forks,
    gpu,
    lost_records,
    operand_checks,
    ops,
    pages,
    polyfills,
)
from gawscompile.runtime.ranks import Ranks, RanksError
from gawscompile.runtime.recompile_limits import LIMITS
from gawscompile.verify import unfinished
from gawscompile.verify.containment import Attempts, said
from gawscompile.verify.proof import verify_rewrites
from gawscompile.verify.work import account
from gawscompile.watch.guards import watch_frame

log = logging.getLogger("gawscompile")

STAGES = {stage.__name__.rpartition(".")[2]: stage for stage in PIPELINE}

# torch.compile has asked for the backend: nothing is traced yet.
polyfills.install()
eager_generate.install()
forks.install()
ops.start_loading()


def gaws(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend. `options` are ours and Inductor's (`gawscompile.options.Options`); `mode` is Inductor's.

    Raises `OptionError` for options that do not exist. What our passes cannot take is left to Inductor.
    """
    from torch._inductor import list_mode_options

    polyfills.install()
    LIMITS.compiling()
    first_calls.say(gm, example_inputs)
    ours, inductor = Options.split(options)
    ours = _checked(ours)
    if mode and mode != "default":
        inductor = {**list_mode_options(mode), **inductor}
    if inductor.get("max_autotune"):
        ours = dataclasses.replace(ours, autotune=True)
    kind = _kind(example_inputs)
    watch_frame(ours.watch, ours.bind)
    ranks = Ranks.of(gm, example_inputs, kind)
    with devices.planning_for(ranks.machine(devices.of(kind) if kind in ("cpu", "cuda") else None)):
        compiled, record, failure = _compile(gm, example_inputs, ours, inductor, kind)
    objection = ranks.objection(record, failure)
    if not objection:
        bound.compiled(compiled)
        return compiled
    if failure is not None and (ours.strict or (record is None and ranks.alone)):
        raise failure
    if ranks.alone:
        how, reason = f"building kernels: {failure}", Reason.INTERNAL_ERROR
    else:
        how, reason = objection, Reason.RANKS
        if ours.strict:
            raise RanksError(objection)
    if record is not None:
        record.reject_all(reason, how)
    if ranks.first:
        log.warning("gaws: %s. This graph is left to Inductor. %s", how, _reproduce())
    return _untouched(gm, example_inputs, inductor, ranks)


def _compile(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], ours: Options, inductor: dict[str, Any], kind: str
) -> tuple[Any, GraphRecord | None, Exception | None]:
    """A graph through our passes and Inductor, with its kernels built: what runs it, what became of it, what failed.
    Without a record, it was the compile that did."""
    from torch._inductor.compile_fx import compile_fx

    traced = observer.wanted(ours)
    key = _key(gm, example_inputs, ours.key(traced), inductor, kind)
    stored = stored_inputs(gm, example_inputs)
    hook = GawsPass(ours, key, kind, traced, stored)
    hook.unavailable = hook.unavailable or _cpp_wrapper(inductor)
    weights = [example_inputs[i] for i in stored] if ours.huge_pages and kind == "cpu" else []
    hook.names = observer.names(gm) if traced else []
    number = len(RECORDS)
    with (
        Progress(f"graph {number}") as progress,
        pages.beside(weights),
        operand_checks.without_ours(hook.operands),
        executor.reading(ours.executor and kind == "cpu") as wrappers,
    ):
        hook.say = progress.say
        progress.say("torch's passes")
        try:
            compiled: Any = compile_fx(gm, list(example_inputs), config_patches=_with_hook(inductor, hook))
        except RestartAnalysis:  # Dynamo traces once more
            raise
        except Exception as error:
            if hook.record and hook.dumps:  # what there is, up to the pass that failed
                observer.show(number, hook.record, hook.dumps, ours)
            return None, None, error
        if hook.record is None and RECORDS.lacks(hook.key, traced):
            lost_records.passes_alone(gm, example_inputs, _with_hook(inductor, hook), hook)
        record = RECORDS.compiled(hook.key, hook.record)
        wrappers.tell(record)
        observer.show(number, record, hook.dumps, ours, traced)
        try:
            _build(record, progress)
        except Exception as error:  # as above, and a disk that is full by now
            return compiled, record, error
    return compiled, record, None


def _untouched(gm: torch.fx.GraphModule, inputs: Sequence[Any], inductor: dict[str, Any], ranks: Ranks) -> Any:
    """A graph as Inductor compiles it alone, on all ranks. Raises what that raises; `RanksError` where it is another
    rank that fails."""
    from torch._inductor.compile_fx import compile_fx

    if ranks.alone:
        return compile_fx(gm, list(inputs), config_patches=inductor)
    compiled, failure = None, None
    try:
        compiled = compile_fx(gm, list(inputs), config_patches=inductor)
    except RestartAnalysis:
        raise
    except Exception as error:
        failure = error
    if objection := ranks.objection(None, failure):
        raise failure or RanksError(objection)
    return compiled


def _build(record: GraphRecord, progress: Progress) -> None:
    """Wait for a graph's kernels, which are all on their way."""
    programs = list(dict.fromkeys(group.program for group in record.groups))
    with dynamo_timed("gaws.kernels"):
        for program in programs:
            ops.prepare(program)
        for number, program in enumerate(programs, 1):
            progress.say(f"kernel {number} of {len(programs)}")
            ops.build_all([program])


def stored_inputs(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> frozenset[int]:
    """Which inputs of Dynamo's graph are a module's: parameters, buffers, tensors in its attributes. By their index."""
    found = set()
    for i, (node, value) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=False)):
        source = getattr(node, "_dynamo_source", None)
        while source is not None and not re.search("ParamBuffer|NNModule", type(source).__name__):
            source = getattr(source, "base", None)
        if isinstance(value, torch.nn.Parameter) or (source is not None and isinstance(value, torch.Tensor)):
            found.add(i)
    return frozenset(found)


def placeholders_of(graph: torch.fx.Graph, stored: frozenset[int]) -> list[torch.fx.Node]:
    """AOTAutograd's inputs that are those."""
    found = []
    for node in graph.find_nodes(op="placeholder"):
        said = node.meta.get("desc")
        index = said.idx if type(said).__name__ == "PlainAOTInput" else None
        if index in stored or type(said).__name__ in ("ParamAOTInput", "BufferAOTInput"):
            found.append(node)
    return found


def register() -> None:
    """Makes the name "gaws" known to torch.compile where no installed package does: a checkout on the path has no entry
    point. Does nothing where it is known."""
    if "gaws" not in torch._dynamo.list_backends():
        torch._dynamo.register_backend(gaws, "gaws")


def _reproduce() -> str:
    return f"To reproduce with a traceback: GAWS_STRICT=1 {shlex.join([sys.executable, *sys.argv])}"


class GawsPass(CustomGraphPass):
    """Our pipeline as one Inductor graph pass. Collects its record."""

    def __init__(
        self, options: Options, key: str, kind: str = "cpu", traced: bool = False, stored: frozenset[int] = frozenset()
    ) -> None:
        self.options = options
        self.key = key
        self.kind = kind
        self.traced = traced
        self.stored = stored
        self.names: list[str] = []  # of the graph's inputs, for dumps
        self.operands: set[str] = set()  # names of inputs that only our op reads
        self.say: Callable[[str], None] = log.debug
        self.record: GraphRecord | None = None
        self.dumps: list[Dump] = []
        # Now, not in a pass: a graph from a warm cache runs no pass and calls the op all the same.
        self.unavailable = _unavailable(kind)

    def uuid(self) -> Any:
        """What decides the outcome beside the graph: our sources and options, the machine and compiler planned for."""
        compiler = self.unavailable[1] if self.unavailable else build.fingerprint() if self.kind == "cpu" else ""
        versions = (_torch_version(), _triton_version(), compiler)
        state = (self.options.key(self.traced), str(sorted(self.stored)))
        return cache.digest(cache.source_hash(), *state, _device(self.kind), *versions).encode()

    def __deepcopy__(self, memo: Any) -> GawsPass:
        return self  # ahead-of-time compilation copies its options; the record must reach who asked for it

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.record = self.record or GraphRecord(self.key)  # the branches of a torch.cond come one by one
        attempts, dumps = Attempts(self.record), len(self.dumps)
        while True:
            self.context: Context | None = None
            try:
                self.rewrite(graph, self.record, attempts.barred)
            except TorchDynamoException:
                raise
            except Exception as error:
                if self.options.strict:
                    raise
                if self.context and attempts.another(self.context, error):
                    del self.dumps[dumps:]
                    continue
                how = said(self.context, error) if self.context else f"before the first pass: {plain(str(error))}"
                self.record.reject_all(Reason.INTERNAL_ERROR, how)
                log.warning("gaws: %s. This graph is left to Inductor. %s", how, _reproduce())
            else:
                if attempts.barred:
                    how = "; ".join(attempts.barred.values())
                    log.warning("gaws: %s. That is undone and left to Inductor, all else stands. %s", how, _reproduce())
            finally:
                self.context = None  # it holds two copies of the graph
            return

    def rewrite(self, graph: torch.fx.Graph, record: GraphRecord, barred: dict[Rewrite, str]) -> None:
        """Run `PIPELINE` over a copy of the graph; only a copy that came through whole takes its place. Rewrites that
        are `barred` do not go ahead."""
        given = {name: value for name, value in dataclasses.asdict(self.options).items() if name != "dump"}
        dump = Dump(self.key, given, self.names) if self.traced else None
        if dump:
            dump.capture(graph, Context(graph, self.options, record).module_path)
            self.dumps.append(dump)
        refusal = _refusal(graph, self.unavailable, self.options, self.kind)
        if refusal is not None:
            record.reject_all(*refusal)
            log.info("gaws: %s", record.notes[-1])
            return
        stored = placeholders_of(graph, self.stored)
        context = self.context = Context.of(graph, self.options, record, stored, barred, complain=self._complain)
        work = context.graph
        for number, (name, stage) in enumerate(STAGES.items(), 1):
            context.stage = name
            self.say(f"{name}, pass {number} of {len(STAGES)}")
            try:
                if name not in self.options.disable and not (context.training and stage in INFERENCE):
                    counters["gaws"]["passes"] += 1
                    with dynamo_timed(f"gaws.{name}"):
                        stage.run(work, context)
                        verify(context)
            finally:  # also the graph in which a pass failed
                if dump:
                    dump.step(name, work, record, observer.matches(context), name not in self.options.disable)
        record.notes += [f"undone: {how}" for how in barred.values()]
        if self.options.disable or context.ended or barred:
            context.stage = "spelled_out"
            unfinished.finish(context)
            verify(context)
            if dump:
                dump.step("spelled_out", work, record)
        if self.options.verify:
            context.stage = "verify"
            verify_rewrites(context)
            if dump:
                dump.step("verify", work, record)
        self._account(context)
        self.say("Inductor")
        gpu.inline(work)
        work.eliminate_dead_code()
        record.collectives += collectives.listed(work)
        _take_over(graph, work)
        self.operands |= operand_checks.only_operands(graph)

    def _account(self, context: Context) -> None:
        """Numbers for `explain` alone: where they cannot be had, the graph is as good without."""
        try:
            account(context)
        except Exception as error:
            self._complain(f"what groups spare is not known: {type(error).__name__}: {error}")

    def _complain(self, message: str) -> None:
        """Something of ours was wrong, and was put right: an error for those who asked for one, else a warning."""
        if self.options.strict:
            raise VerifierError(message)
        log.warning("gaws: %s", message)


def _checked(ours: Options) -> Options:
    """Passes that are to be disabled exist; what is left of the process's fuel. Raises `OptionError`."""
    if unknown := [name for name in ours.disable if name not in STAGES]:
        raise OptionError(f"option 'disable': there is no pass {unknown[0]!r}; passes are {', '.join(STAGES)}")
    fuel = process_fuel()
    if fuel is not None and ours.fuel is None:
        ours = dataclasses.replace(ours, fuel=max(0, fuel - RECORDS.matches()))
    return ours


def _torch_version() -> str:
    return str(torch.__version__)


def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


def _kind(inputs: Sequence[Any]) -> str:
    """The one kind of device that a graph's tensors are on ("cpu", "cuda"), "" for none, else several with commas.

    Single numbers may be anywhere: Dynamo makes them of Python's.
    """
    tensors = (value for value in inputs if isinstance(value, torch.Tensor) and value.dim() > 0)
    return ",".join(sorted({value.device.type for value in tensors}))


def _device(kind: str) -> str:
    return devices.of(kind).name if kind in ("cpu", "cuda") else kind


def _unavailable(kind: str) -> tuple[Reason, str] | None:
    """Why no kernels can be had for a kind of device, if so. For CPUs the op is loaded (and built the first time)."""
    if kind == "cuda":
        try:
            import triton
        except Exception as error:  # missing, or broken
            return Reason.NO_TRITON, f"{type(error).__name__}: {error}"
        return None if hasattr(triton, "jit") else (Reason.NO_TRITON, "triton.jit is missing")
    if kind != "cpu":
        return (Reason.DEVICE, kind) if kind else None
    try:
        ops.ensure_loaded()
        build.fingerprint()
    except Exception as error:  # a compiler that is missing or broken, a cache that cannot be written or run from
        return Reason.NO_COMPILER, f"{type(error).__name__}: {error}"
    return None


def _cpp_wrapper(inductor: dict[str, Any]) -> tuple[Reason, str] | None:
    """Compiled just in time, Inductor's C++ wrapper takes the list that our op returns for one tensor, and crashes."""
    if inductor.get("cpp_wrapper", torch._inductor.config.cpp_wrapper):
        return Reason.CPP_WRAPPER, "Inductor's cpp_wrapper is on, and cannot call an op that returns a list"
    return None


def _refusal(
    graph: torch.fx.Graph, unavailable: tuple[Reason, str] | None, options: Options, kind: str
) -> tuple[Reason, str] | None:
    """Why a whole graph, of tensors on that kind of device, is left to Inductor, if it is."""
    training = kind == "cpu" if options.training is None else options.training
    if not training and trains(graph):
        return Reason.GRADIENTS, ""
    if unavailable is not None and unavailable[0] is not Reason.DEVICE:
        log.warning("gaws: %s. Adapters stay unfused: this graph is left to Inductor alone.", unavailable[1])
    return unavailable


def _take_over(graph: torch.fx.Graph, work: torch.fx.Graph) -> None:
    """Put `work` in the place of what `graph` holds (Inductor keeps the graph object that it gave us)."""
    kept = dict.fromkeys(inputs_of(graph))
    for node in reversed(list(graph.nodes)):
        if node not in kept:
            graph.erase_node(node)
    inputs = dict(zip(work.find_nodes(op="placeholder"), kept, strict=True))
    copies: dict[torch.fx.Node, torch.fx.Node] = dict(inputs)
    result = graph.graph_copy(work, copies)
    graph.output(result)


def _key(
    gm: torch.fx.GraphModule, inputs: Sequence[Any], ours: str, inductor: dict[str, Any], kind: str
) -> str:
    """Names one compiled graph, the same in every process: what Dynamo traced, for which inputs, with which code."""
    shapes = [
        f"{tuple(i.shape)}{i.stride()}{i.dtype}{i.device}{i.requires_grad}" if isinstance(i, torch.Tensor) else str(i)
        for i in inputs
    ]
    settings = [ours, str(sorted(inductor.items(), key=str)), _device(kind), torch.__version__]
    modes: list[Any] = [torch.is_grad_enabled()]
    modes += [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    settings += [str(modes), str(torch.is_inference_mode_enabled())]
    return cache.digest(cache.source_hash(), gm.code, *shapes, *settings)


def _with_hook(inductor: dict[str, Any], hook: GawsPass) -> dict[str, Any]:
    """Inductor's options with our pass first, and the user's own joint pass, if any, after it."""
    from torch._inductor import config

    theirs = inductor.get("joint_custom_pre_pass", config.joint_custom_pre_pass)
    if theirs is None:
        return {**inductor, "joint_custom_pre_pass": hook}
    rest = list(theirs) if isinstance(theirs, (list, tuple)) else [theirs]
    return {**inductor, "joint_custom_pre_pass": [hook, *rest]}
