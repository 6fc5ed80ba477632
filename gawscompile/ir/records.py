"""What the compiler did to a graph: every linear, every group, every rejection with its typed reason.

Records are plain data. They are written to the cache beside the compiled graph, so that a process with a warm cache,
in which no pass runs, explains itself as the first one did.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Reason(str, Enum):
    """Why a linear, or an adapter of one, was left as it was."""

    GRADIENTS = "gradients are needed, and training is off (as on GPUs by default): the graph is left to Inductor"
    DEVICE = "no generated kernels for this device: the graph is left to Inductor"
    NO_TRITON = "generated kernels for a GPU need Triton and it cannot be imported: the graph is left to Inductor"
    NO_COMPILER = "generated C++ needs a compiler and none was found: the graph is left to Inductor"
    CPP_WRAPPER = "Inductor's cpp_wrapper cannot call an op that returns a list: the graph is left to Inductor"
    DTYPE = "no generated kernels for this dtype"
    MIXED_DTYPES = "activation and base weight differ in dtype"
    WEIGHT_COMPUTED = "the weight is computed in the graph (quantised, merged or reparametrised), not a parameter"
    WEIGHT_LAYOUT = "the weight is not stored as whole rows or columns (strided, empty, of symbolic size)"
    NO_BASE = "a product of two weights without a base projection beside it"
    SEVERAL_BASES = "more than one base projection of one activation in a sum"
    RESHAPED = "the sum is formed on a view whose symbolic sizes cannot be undone"
    SCALE = "the base projection itself is scaled"
    FACTOR_SHAPE = "the factors do not form a smaller update (rank zero, too wide, costlier than a dense one)"
    EPILOGUE = "what follows stays an operation of its own"
    BANK = "what a bank adds stays an operation of its own"
    ATTENTION = "attention stays with the library"
    COLLECTIVE = "an all-reduce of its own stays"
    RANKS = "another rank does not run it alike: all ranks leave the graph to Inductor"
    CONVOLUTION = "the adapter of a convolution stays with the library"
    LIBRARY = "no adapter here, and the library's matmul is estimated faster for this many tokens"
    NOT_TRACED = "no compiled graph has it under this name (not called, called by another module, unrolled as tiny)"
    DISABLED = "a pass that it needs is disabled (options={'disable': […]})"
    FUEL = "the fuel ran out before it (options={'fuel': n}, GAWS_FUEL)"
    RECORD_LOST = "its graph came from a warm cache whose record is gone: what became of it is not known"
    UNPROVEN = "verify found the rewrite to differ from its original, which stays in its place"
    INTERNAL_ERROR = "a rewrite failed and was undone: what it was of is left to Inductor"


def plain(text: str) -> str:
    """A name for people to read: printable, on one line, of bounded length, whatever a module was called."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:300])


@dataclass
class LinearRecord:
    """One linear of the graph. `status` is "fused" (runs in a generated kernel) or "rejected" (left as it was)."""

    path: str
    shape: tuple[int | str, int | str]
    dtype: str
    status: str = "rejected"
    operators: str = ""
    adapters: int = 0
    hoisted: int = 0  # operands that are computed once per state of their sources
    group: int | None = None
    plan: str | None = None
    kernel: str | None = None
    reason: str | None = None
    detail: str | None = None
    stage: str | None = None
    shard: str = ""  # how ranks share its weight, where `explain` looked
    backward: bool = False  # it is what a backward makes of its output's gradient

    @property
    def name(self) -> str:
        return f"{self.path} (backward)" if self.backward else self.path


@dataclass
class Work:
    """What something costs to run: launches, and bytes to and from memory (an expression, where sizes are symbolic)."""

    launches: int
    bytes: str


@dataclass
class GroupRecord:
    """Projections of one activation that run as one op."""

    index: int
    members: list[str]
    tokens: str
    plan: str
    spec: str
    kernel: str
    costs: dict[str, str] = field(default_factory=dict)
    prefix: str = ""
    suffix: str = ""
    table: str = ""
    """Plans for every number of tokens, where `plan` has only the row that is needed."""

    before: Work | None = None
    """Of the traced operations that the group stands for (`gawscompile.verify.work`)."""

    after: Work | None = None
    """Of its kernels, by the plan of the first row."""

    measured: float | None = None
    """Seconds a call on this machine, where `explain` was asked to measure."""

    @property
    def program(self) -> str:
        """What the op takes: emitter, plan table, spec, and the recipes of what is hoisted."""
        return f"{self.prefix}{self.plan} | {self.spec}{self.suffix}"


@dataclass
class GraphRecord:
    """One compiled graph."""

    key: str
    linears: list[LinearRecord] = field(default_factory=list)
    groups: list[GroupRecord] = field(default_factory=list)
    passes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    matches: int = 0
    """Rewrites that went ahead, of all passes: so much fuel the graph took."""
    collectives: list[str] = field(default_factory=list)
    """Those that are left to Inductor, in their order: what each does, in which group."""
    wrapper: str = ""
    """How the code that Inductor prints around our kernels runs, on a CPU (`gawscompile.runtime.executor`)."""
    lost: bool = False
    """The graph came from a warm cache, and what our passes did to it is not known."""

    def linear(self, path: str) -> LinearRecord | None:
        return next((entry for entry in self.linears if entry.path == path), None)

    def drop_group(self, index: int) -> None:
        """A group is no more; the later ones move up."""
        del self.groups[index]
        for group in self.groups[index:]:
            group.index -= 1
        for entry in self.linears:
            if entry.group == index:
                entry.group = entry.plan = entry.kernel = None
            elif entry.group is not None and entry.group > index:
                entry.group -= 1

    def reject_all(self, reason: Reason, detail: str = "") -> None:
        """The whole graph is left alone, for one reason."""
        self.notes.append(f"{reason.value}{': ' + detail if detail else ''}")
        self.groups.clear()
        for entry in self.linears:
            entry.status, entry.reason, entry.detail = "rejected", reason.name, detail or reason.value
            entry.group = entry.plan = entry.kernel = None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=True)

    @staticmethod
    def from_json(text: str) -> GraphRecord:
        data: dict[str, Any] = json.loads(text)
        linears = [LinearRecord(**{**entry, "shape": tuple(entry["shape"])}) for entry in data.pop("linears")]
        groups = [GroupRecord(**entry) for entry in data.pop("groups")]
        for group in groups:
            group.before, group.after = (Work(**w) if isinstance(w, dict) else w for w in (group.before, group.after))
        return GraphRecord(linears=linears, groups=groups, **data)
