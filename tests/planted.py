"""Faults to plant: edits of the compiler that make it wrong, and a model on which each of them shows.

    python -m tests.planted [NAME …]

plants each in a copy of the project, asks who notices, and prints a table. Some minutes a fault on a busy machine.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fault import Fault
from tests.faults import FAULTS

__all__ = ["FAULTS", "ROOT", "Zoo", "in_copy", "judged", "planted", "suite"]

ROOT = Path(__file__).parent.parent


class Zoo(nn.Module):
    """Everything that the faults touch, in one graph: k 64, adapters of two ranks, odd widths, near misses."""

    def __init__(self) -> None:
        from gawscompile.ir.banked import (  # here: who plants faults has imported nothing of the compiler
            UNIT,
            Use,
            pack,
        )

        super().__init__()
        torch.manual_seed(0)
        shapes = {"q": 64, "k": 32, "v": 32, "o": 64, "odd": 13, "twice": 24}
        shapes |= {"gate": 40, "up": 40, "last": 13, "rows": 32}
        self.w = nn.ParameterDict({name: nn.Parameter(torch.randn(n, 64) / 8) for name, n in shapes.items()})
        ranks = dict.fromkeys((*shapes, "again"), 8) | {"odd": 5}
        self.a = nn.ParameterDict({name: nn.Parameter(torch.randn(r, 64) / 8) for name, r in ranks.items()})
        self.b = nn.ParameterDict({name: nn.Parameter(torch.randn(n, ranks[name]) / 3) for name, n in shapes.items()})
        self.b["again"] = nn.Parameter(torch.randn(24, 8) / 3)
        self.bias, self.offset = nn.Parameter(torch.randn(13)), nn.Parameter(torch.randn(32))
        self.wide = nn.Linear(64, 24, dtype=torch.float64)
        self.turned = nn.Parameter(torch.randn(63, 40) / 8)  # [in, out]
        self.w1, self.w2 = nn.Parameter(torch.randn(4, 8) / 3), nn.Parameter(torch.randn(12, 8) / 3)
        self.grouped = nn.Parameter(torch.randn(48, 64) / 8)
        self.magnitude, self.widened = nn.Parameter(torch.rand(32) + 0.5), nn.Parameter(torch.randn(24, 32) / 6)
        self.blocks = nn.ParameterList([torch.randn(2, 32, 4) / 5, torch.randn(2, 4, 32) / 2])
        self.register_buffer("quantised", torch.randint(-9, 9, (24, 64), dtype=torch.int8))
        self.keys, self.values = (nn.Parameter(torch.randn(1, 2, 5, 16)) for _ in range(2))
        entries = [[Use(48, 64, 8, 10, -1.0, 1.0), Use(0, 16, 8, 8, 0.5, 1.0)]]
        self.pool = nn.Parameter(torch.randn(96 * UNIT) / 5)
        self.register_buffer("entries", pack(entries, 2))
        self.register_buffer("seen", torch.tensor([True, True, False, True, False]))
        self.register_buffer("signed", torch.randint(-128, 128, (24, 64), dtype=torch.int8))
        self.register_buffer("unsigned", torch.randint(0, 256, (24, 64), dtype=torch.uint8))
        self.register_buffer("nibbles", torch.randint(0, 256, (24, 32), dtype=torch.uint8))
        self.scales = nn.ParameterList([torch.rand(24, 1) / 99, torch.rand(24, 2, 1) / 99, torch.rand(48, 1) / 9])
        self.middle = nn.Parameter(torch.rand(48, 1) + 7)
        self.zeros = nn.Parameter(torch.rand(24, 2, 1) * 99)

    def delta(self, name: str, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a[name]), self.b[name])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (F.linear(x, self.w[name]) + 2.0 * self.delta(name, x) for name in "qkv")
        mixed = q.tanh()
        o = x + (F.linear(mixed, self.w["o"]) + 0.5 * self.delta("o", mixed))
        odd = F.linear(o, self.w["odd"], self.bias) + 3.0 * self.delta("odd", o)
        sine, cosine = o.sin(), o.cos()
        twice = F.linear(sine, self.w["twice"]) + 2.0 * self.delta("twice", sine) + self.delta("again", sine)
        alpha = torch.add(F.linear(cosine, self.w["k"]), self.delta("k", cosine), alpha=3)
        other = F.linear(o.exp(), self.w["v"]) + self.delta("v", (o + 1).tanh())
        gated = o.sigmoid()
        grouped = F.linear(gated, self.grouped) + 0.5 * F.linear(gated, torch.kron(self.w1, self.w2))
        turned = k.tanh().repeat(1, 1, 2)[..., :63] @ self.turned
        bent = o.abs().sqrt()
        gate, up = (F.linear(bent, self.w[name]) + 2.0 * self.delta(name, bent) for name in ("gate", "up"))
        product = F.silu(gate) * up
        apart = o.erf()
        norm = (self.b["rows"] @ self.a["rows"] + self.w["rows"]).norm(dim=1)  # sources in another order than operands
        scaled = self.magnitude / norm * (F.linear(apart, self.w["rows"]) + self.delta("rows", apart)) + self.offset
        stream = torch.cat([o.sigmoid(), k.tanh()], -1) + torch.cat([cosine, v.tanh()], -1)
        h, z = stream.split([64, 32], -1)
        streamed = F.linear(h, self.w["twice"]) + F.linear(z, self.widened)
        flat = o.atan()
        kept = F.linear(flat, self.quantised.to(x.dtype) / 64) - self.delta("twice", flat)
        steep = o.sinh()
        inner = torch.einsum("...ni,nir->...nr", steep.unflatten(-1, (2, 32)), self.blocks[0]).unflatten(-1, (2, 2))
        dealt = torch.einsum("...jr,jro->...jo", inner.transpose(-3, -2).flatten(-2), self.blocks[1]).flatten(-2)
        blocks = F.linear(steep, self.w["q"]) + 2.0 * dealt
        bowed = o.cosh()
        last = alpha.tanh()[..., :13] * 2 + (F.linear(bowed, self.w["last"]) + self.delta("last", bowed))
        cached = [one[:, :, None].expand(1, 2, 2, 5, 16).reshape(1, 4, 5, 16) for one in (self.keys, self.values)]
        queries = o.asinh().reshape(1, -1, 4, 16).transpose(1, 2)
        seen = self.seen.expand(1, 1, queries.shape[2], 5)
        attended = F.scaled_dot_product_attention(queries, *cached, attn_mask=seen)
        square = o.square()
        banked = F.linear(square, self.w["o"])
        banked = banked + torch.ops.gaws.banked(square, self.pool, self.entries, banked, None)
        answers = (q, k, v, o, odd, twice, alpha, other, grouped, turned, product, scaled, streamed, kept, blocks, last)
        return *answers, attended, banked, *self.packed((o * 2).tanh()), self.wide(o.double())

    def packed(self, x: Tensor) -> tuple[Tensor, ...]:
        """By weights kept as codes: a scale for each row, for each group of columns with a zero, and of 4 bits."""
        rows = self.signed.to(x.dtype) * self.scales[0]
        groups = (self.unsigned.view(24, 2, 32).to(x.dtype) - self.zeros) * self.scales[1]
        halves = torch.empty([48, 32], dtype=torch.uint8)
        halves[:24] = (self.nibbles & 240) >> 4
        halves[24:] = self.nibbles & 15
        halves = ((halves.to(x.dtype) - self.middle) * self.scales[2]).view(24, 64)
        return F.linear(x, rows) + self.delta("twice", x), F.linear(x, groups.view(24, 64)), F.linear(x, halves)


# --- Planting ------------------------------------------------------------------------------------------------


def copied(folder: Path) -> Path:
    """What tests need of the project, in `folder`."""
    for part in ("gawscompile", "tests", "benchmarks", "docs"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def planted(name: str, folder: Path) -> Path:
    """A copy of the project with the fault in it."""
    fault = FAULTS[name]
    copied(folder)
    file = folder / "gawscompile" / fault.file
    text = file.read_text()
    assert text.count(fault.old) == 1, f"the fault {name!r} no longer applies: bring it up to date"
    file.write_text(text.replace(fault.old, fault.new))
    return folder


@functools.cache
def _shared() -> Path:
    """Caches for all faults: a folder with Inductor's, which holds what it has found out of the machine's vectors (that
    takes half a minute) and no graph, and ours, whose kernels are named by what they are built from."""
    folder = Path(tempfile.mkdtemp(prefix="gaws-planted-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    places = {"GAWS_CACHE_DIR": folder / "gaws", "TORCHINDUCTOR_CACHE_DIR": folder / "inductor"}
    environment = {**os.environ, **{k: str(v) for k, v in places.items()}, "PYTHONPATH": str(ROOT)}
    program = "from gawscompile.codegen import build; build.fingerprint()"
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    return folder


def _environment(folder: Path, fault: Fault | None) -> dict[str, str]:
    """Of a copy: its graphs are kept in it, and its kernels too if it has a fault in the keeping."""
    if not (folder / "inductor").exists():
        shutil.copytree(_shared() / "inductor", folder / "inductor")
    apart = fault is None or fault.file in ("cache.py", "codegen/build.py")
    kernels = (folder if apart else _shared()) / "gaws"
    places = {"GAWS_CACHE_DIR": kernels, "TORCHINDUCTOR_CACHE_DIR": folder / "inductor", "PYTHONPATH": folder}
    return {**os.environ, **{name: str(place) for name, place in places.items()}}


def in_copy(folder: Path, *arguments: str, fault: Fault | None = None) -> subprocess.CompletedProcess[str]:
    """Python in a copy."""
    given = {"cwd": folder, "env": _environment(folder, fault), "capture_output": True, "text": True}
    return subprocess.run([sys.executable, *arguments], **given)


def forked(folder: Path, *arguments: str, fault: Fault | None = None) -> subprocess.CompletedProcess[str]:
    """The same in a child of this process, which has imported the libraries: that takes them ten seconds. For a process
    that has imported nothing of the compiler."""
    environment = _environment(folder, fault)
    child = os.fork()
    if child == 0:
        code: Any = 1
        try:
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            _become(folder, environment, arguments)
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(code))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = ((folder / name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(arguments, code, *said)


def _become(folder: Path, environment: dict[str, str], arguments: Sequence[str]) -> None:
    """What ``python arguments`` does in a copy: ``-m module …`` or ``-c program``."""
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:] = [str(folder), *(place for place in sys.path if Path(place).resolve() != ROOT)]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("gawscompile", "tests", "benchmarks")]:
        del sys.modules[name]
    kind, what, *rest = arguments
    sys.argv = [what, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "program", "exec"), {"__name__": "__main__"})


# --- Who notices ---------------------------------------------------------------------------------------------

PYTEST = ("-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider")
Run = Callable[..., "subprocess.CompletedProcess[str]"]
"""`in_copy` or `forked`."""


def suite(name: str, folder: Path, run: Run = in_copy) -> subprocess.CompletedProcess[str]:
    """The tests of a fault that is planted in `folder`."""
    fault = FAULTS[name]
    if fault.by == "fuzz":
        return run(folder, "-m", "tests.fuzz", *fault.tests.split(), fault=fault)
    chosen = ["-m", "slow" if fault.by == "slow" else "not slow"]
    return run(folder, *PYTEST, *chosen, *fault.tests.split(), fault=fault)


@functools.cache
def holds(test: str) -> bool:
    """Whether a test passes where no fault is planted: one that fails in every copy notices nothing."""
    folder = _sound()
    return forked(folder, *PYTEST, test, fault=None).returncode == 0


@functools.cache
def _sound() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="gaws-sound-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return copied(folder)


PROGRAM = """
import copy, json, logging, torch, gawscompile
from gawscompile.backend import GawsPass
from gawscompile.options import Options
from gawscompile.planning import devices
from tests.graphs import capture
from tests.planted import Zoo
messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("gawscompile").addHandler(handler)
torch.set_num_threads(2)
if @LIBRARY@:
    from tests.passes.test_choose_plan import FAST_LIBRARY
    devices.cpu = lambda: FAST_LIBRARY
wrong = {}
with torch.no_grad():
    x = torch.randn(1, 64 if @LIBRARY@ else 2, 64)
    model = Zoo().eval()
    captured = capture(model, x)
    for verify in (False, True):
        module = torch.fx.GraphModule(captured.module, copy.deepcopy(captured.graph))
        GawsPass(Options(verify=verify), "zoo", stored=captured.stored)(module.graph)
        module.recompile()
        errors = []
        for change in (lambda p: None, lambda p: setattr(p, "data", p.data * 1.05), lambda p: p.data.mul_(1.05)):
            for p in model.parameters():  # what was kept from the calls before shows
                change(p)
            want = copy.deepcopy(model).double()(x.double())
            try:
                got = module(*captured.inputs)
            except RuntimeError as error:
                errors.append(1e9)
                continue
            errors += [((g - w).abs().max() / w.abs().max()).item() for g, w in zip(got, want, strict=True)]
        wrong[verify] = max(errors) if all(e == e for e in errors) else 1e9
print(json.dumps({"wrong": wrong[False], "verified": wrong[True], "messages": messages, "at": gawscompile.__file__}))
"""


@dataclass(frozen=True)
class Judged:
    """What a fault that is planted makes of the zoo: largest errors without `verify` and with it, and its warnings."""

    wrong: float
    verified: float
    messages: list[str]

    @property
    def refused(self) -> list[str]:
        return [message for message in self.messages if "verify refused the rewrite of" in message]


def judged(name: str, folder: Path, run: Run = in_copy) -> Judged:
    """The zoo through our passes, with the fault in them. Raises `RuntimeError` where it does not run."""
    done = run(folder, "-c", PROGRAM.replace("@LIBRARY@", str(FAULTS[name].library)), fault=FAULTS[name])
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    data = json.loads(done.stdout.splitlines()[-1])
    assert data.pop("at").startswith(str(folder))
    return Judged(**data)


def main(names: list[str]) -> int:
    """The table. Returns how many faults are not noticed as they should be."""
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch._functorch.aot_autograd
    import torch._inductor.compile_fx  # noqa: F401

    missed = 0
    print(f"{'fault':<58}{'s':>5}  {'verify':<34}noticed by")
    for name in names or FAULTS:
        fault, start = FAULTS[name], time.monotonic()
        if not fault.shows_here:
            print(f"{name:<58}{'':>5}  — shows on CPUs with {fault.needs}", flush=True)
            continue
        with tempfile.TemporaryDirectory(prefix="gaws-fault-") as place:
            folder = planted(name, Path(place))
            done = suite(name, folder, forked)
            found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
            by = found[1] if found else "the fuzzer" if fault.by == "fuzz" else "nobody"
            noticed = by if done.returncode == 1 else "nobody"
            if found and not holds(by.partition("[")[0]):
                noticed = "nobody"  # it fails without the fault too
            verdict = f"— {fault.unproven}"
            if not fault.unproven:
                seen = judged(name, folder, forked)
                verdict = "refuses" if seen.wrong > 1e-3 > 10 * seen.verified and seen.refused else "MISSES"
        missed += noticed == "nobody" or verdict == "MISSES"
        print(f"{name:<58}{time.monotonic() - start:>5.0f}  {verdict[:32]:<34}{noticed}", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
