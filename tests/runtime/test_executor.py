"""Inductor's wrapper run in C++: what the Python does, line for line, or the Python itself and why."""

from __future__ import annotations

import weakref
from types import FunctionType

import pytest
import torch
from torch._C import _dynamo
from torch._inductor.select_algorithm import extern_kernels

import gawscompile
from gawscompile.observe.store import RECORDS
from gawscompile.options import Options
from gawscompile.runtime import executor, ops, wrapper
from tests.graphs import small_llama, tokens

SPEC = "gemv_cpp | k=6 x=f32; n=6 w=f32 out=f32 lora(r=2 f32 s=2.0); n=3 w=f32 out=f32"
W, A, B, V = (torch.randn(*shape) for shape in ((6, 6), (2, 6), (6, 2), (3, 6)))
NAMES = {
    "torch": torch,
    "aten": torch.ops.aten,
    "extern_kernels": extern_kernels,
    "empty_strided_cpu": _dynamo.guards._empty_strided_cpu,
    "reinterpret_tensor": _dynamo.guards._reinterpret_tensor,
    "assert_size_stride": _dynamo.guards.assert_size_stride,
    "assert_alignment": _dynamo.guards.assert_alignment,
}


@pytest.fixture(scope="module", autouse=True)
def loaded():
    ops.ensure_loaded()


def both(lines, *inputs, stem="arg{}_1", frees=False):
    """A wrapper of these lines in Python, and its executor."""
    names = [stem.format(i) for i in range(len(inputs))]
    body = "\n    ".join([f"{', '.join(names)}, = args", "args.clear()", *lines])
    source = f"def call(args):\n    {body}\n"
    scope = dict(NAMES)
    exec(source, scope)
    python = scope["call"]
    assert isinstance(python, FunctionType)
    return python, executor.Executor(wrapper.Code(source, scope, None if frees else inputs), python)


LINES = {
    "views": [
        "buf0 = reinterpret_tensor(arg0_1, (3, 2), (1, 2), 1)",
        "buf1 = aten.clone.default(buf0)",
        "return (buf1, reinterpret_tensor(buf1, (2, 2), (2, 1), 2), arg0_1, )",
    ],
    "aliases outlive names": [
        "buf0 = empty_strided_cpu((2, 3), (3, 1), torch.float32)",
        "aten.copy_.default(buf0, arg0_1)",
        "buf1 = reinterpret_tensor(buf0, (6, ), (1, ), 0); del buf0  # reuse",
        "buf2 = buf1; del buf1  # reuse",
        "buf3 = aten.mul.Scalar(buf2, 2)",
        "del buf2",
        "return (buf3, )",
    ],
    "several results": [
        "buf0 = torch.ops.aten.sort.default(arg0_1, -1, True)",
        "buf1 = buf0[0]",
        "buf2 = buf0[1]",
        "del buf0",
        "return (buf1, buf2, )",
    ],
    "a list of results": [
        "buf0 = torch.ops.aten.split.Tensor(arg0_1, 2, dim=1)",
        "buf1 = aten.clone.default(buf0[1])",
        "return (buf1, )",
    ],
    "lists, none, numbers, types": [
        "buf0 = aten.sum.dim_IntList(arg0_1, [0, 1], True, dtype=torch.float64)",
        "buf1 = aten.add.Tensor(arg0_1, arg0_1, alpha=0.5)",
        "buf2 = aten.cat.default([buf1, arg0_1], dim=1)",
        "buf3 = aten.gelu.default(buf2, approximate='tanh')",
        "buf4 = aten.clamp.default(buf3, None, 0.25)",
        "return (buf0, buf2, buf4, )",
    ],
    "matmul in place": [
        "buf0 = empty_strided_cpu((2, 2), (2, 1), torch.float32)",
        "extern_kernels.mm(arg0_1, reinterpret_tensor(arg0_1, (3, 2), (1, 3), 0), out=buf0)",
        "buf1 = empty_strided_cpu((2, 2), (2, 1), torch.float32)",
        "extern_kernels.addmm(buf0, buf0, buf0, alpha=0.5, beta=2, out=buf1)",
        "return (buf1, )",
    ],
    "checks": [
        "assert_size_stride(arg0_1, (2, 3), (3, 1), 'input')",
        "buf0 = aten.relu.default(arg0_1)",
        "assert_size_stride(buf0, (2, 3), (3, 1), 'relu')",
        "assert_alignment(buf0, 16, 'relu')",
        "return (buf0, )",
    ],
    "an input is written": ["aten.add_.Scalar(arg0_1, 1.5)", "return (arg0_1, )"],
}


@pytest.mark.parametrize("name", LINES)
def test_lines_do_what_they_do_in_python(name):
    x = torch.arange(6.0).view(2, 3) - 2.5
    python, steps = both(LINES[name], x)
    given = [x.clone()], [x.clone()]
    kept = given[0][0], given[1][0]
    want, got = python(given[0]), steps(given[1])
    assert len(want) == len(got) and given[1] == []
    for one, other in zip((*want, kept[0]), (*got, kept[1]), strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride() and one.dtype == other.dtype


def test_sizes_are_computed():
    lines = [
        "s27 = arg1_1",
        "s5 = arg2_1",
        "assert_size_stride(arg0_1, (2, s27), (s27, 1), 'input')",
        "buf0 = empty_strided_cpu((2*s27 + 1, s5 - (-1)*s27), (s27 + s5, 1), torch.int64)",
        "buf1 = empty_strided_cpu((s27 // 4, s27 % 4, (-1)*((-1*s5) // 3)), (12, max(1, s5 // 2), 1), torch.bool)",
        "return (buf0, buf1, )",
    ]
    x = torch.zeros(2, 7)
    python, steps = both(lines, x, 7, 5)
    for n, other in ((7, 5), (13, 8)):
        want, got = python([torch.zeros(2, n), n, other]), steps([torch.zeros(2, n), n, other])
        for one, two in zip(want, got, strict=True):
            assert (one.shape, one.stride(), one.dtype) == (two.shape, two.stride(), two.dtype)


def test_an_input_that_does_not_fit_is_inductors_error_and_nothing_is_done():
    lines = ["aten.add_.Scalar(arg0_1, 1)", "assert_size_stride(arg1_1, (3, ), (1, ), 'input')", "return (arg0_1, )"]
    x = torch.zeros(2)
    _, steps = both(lines, x, torch.zeros(3))
    assert torch.equal(steps([x.clone(), torch.zeros(3)])[0], torch.ones(2))
    with pytest.raises(RuntimeError, match="gaws::execute"):
        steps([x, torch.zeros(3), torch.zeros(3)])
    for stem in ("arg{}_1", "primals_{}"):  # the check comes first, wherever it is printed
        said = []
        named = [line.replace("arg0_1", stem.format(0)).replace("arg1_1", stem.format(1)) for line in lines]
        _, steps = both(named, x, torch.zeros(3), stem=stem)
        steps.wrapper = said.append
        steps([x, torch.zeros(4)])
        assert len(said) == 1 and torch.equal(x, torch.zeros(2))
    with pytest.raises(AssertionError, match="expected size"):
        both([lines[1], lines[0], lines[2]], x, torch.zeros(3))[1]([x, torch.zeros(4)])


def test_an_input_that_is_no_tensor_and_no_size_is_let_lie():
    """A mesh of ranks, say."""
    _, steps = both(["buf0 = aten.relu.default(arg1_1)", "return (buf0, )"], object(), torch.ones(2))
    assert torch.equal(steps([object(), torch.ones(2)])[0], torch.ones(2))
    with pytest.raises(wrapper.Unreadable):
        both(["buf0 = aten.relu.default(arg0_1)", "return (buf0, )"], object(), torch.ones(2))


def test_a_result_that_does_not_fit_is_an_error():
    lines = ["buf0 = aten.relu.default(arg0_1)", "assert_size_stride(buf0, (2, 3), (1, 2), 'relu')", "return (buf0, )"]
    with pytest.raises(RuntimeError, match="relu gave"):
        both(lines, torch.zeros(2, 3))[1]([torch.zeros(2, 3)])


def test_project_is_called_without_the_dispatcher_and_seen_by_the_profiler():
    lines = [
        f"buf0 = torch.ops.gaws.project.default(arg0_1, [arg1_1, arg2_1, arg3_1, arg4_1], {SPEC!r})",
        "buf1 = buf0[0]",
        "buf2 = buf0[1]",
        "return (buf1, buf2, )",
    ]
    inputs = [torch.randn(2, 6), W, A, B, V]
    python, steps = both(lines, *inputs)
    with torch.profiler.profile() as profile:
        got = steps(list(inputs))
    for one, other in zip(python(list(inputs)), got, strict=True):
        assert torch.equal(one, other)
    assert "gaws::project" in [event.name for event in profile.events()]
    with pytest.raises(RuntimeError, match="no longer has the dtype, shape or device"):
        steps([inputs[0], W, A, B.double(), V])


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("if arg0_1: pass", "if arg0_1"),
        ("buf0 = torch.add(arg0_1, arg0_1)", "torch.add"),
        ("extern_kernels.bias_addmm(arg0_1, arg0_1, arg0_1)", "bias_addmm"),
        ("run_intermediate_hooks('x', arg0_1)", "run_intermediate_hooks"),
        ("buf0 = empty_strided_cpu((arg0_1.size(0), ), (1, ), torch.float32)", "size"),
        ("buf0 = empty_strided_cpu((2**3, ), (1, ), torch.float32)", "2 ** 3"),
        ("buf0 = aten.index.Tensor(arg0_1, [arg0_1])", "the argument indices"),
        ("buf0 = aten.add.Tensor(arg0_1, 2)", "the argument other"),
        ("buf0 = aten.relu.default(_tensor_constant0)", "_tensor_constant0"),
        ("buf0 = empty_strided_cpu((2, ), (1, ), torch.complex64)", "torch.complex64"),
    ],
)
def test_lines_that_are_not_known_are_told(line, why):
    with pytest.raises(wrapper.Unreadable, match=why.replace("*", r"\*")):
        both([line, "return (arg0_1, )"], torch.zeros(2))
    with pytest.raises(wrapper.Unreadable, match="end with"):
        both(["return ()"], torch.zeros(2))


@pytest.fixture(autouse=True)
def forgetful_dynamo():
    """Not here: one compiled model serves several tests."""


@pytest.fixture(scope="module")
def compiled():
    """A model for prompts of any length, and the record of its graph."""
    torch._dynamo.reset()
    model = gawscompile.compile(small_llama(layers=1), dynamic=True, options={"strict": True})
    mark = len(RECORDS)
    with torch.no_grad():
        model(tokens(2, 5), use_cache=False)
    (record,) = RECORDS.since(mark)
    return model, record


def test_models_run_by_it_and_get_the_numbers_of_inductors_python(compiled, monkeypatch):
    model, record = compiled
    assert record.wrapper.startswith("Inductor's wrapper runs in C++, as ")
    real, lengths = executor.Executor.__call__, []

    def checked(self, inputs):
        want, got = self.wrapper(list(inputs)), real(self, inputs)
        assert all(torch.equal(one, other) for one, other in zip(want, got, strict=True))
        lengths.append(got[0].shape[-2])
        return got

    monkeypatch.setattr(executor.Executor, "__call__", checked)
    with torch.no_grad():
        for n in (5, 9, 14):
            model(tokens(2, n), use_cache=False)
    assert lengths == [5, 9, 14]


def test_it_is_an_option(monkeypatch):
    assert Options.split({"executor": False})[0].executor is False and Options().executor
    monkeypatch.setenv("GAWS_EXECUTOR", "0")
    assert Options.split(None)[0].executor is False
    with executor.reading(False) as said:
        assert executor._reading.get() is None and said.lines == []


LOOK = torch.library.Library("gaws_tests", "DEF")
LOOK.define("look(Tensor x) -> Tensor")


def test_a_backward_frees_what_it_has_read_and_returns_none_for_gradients_that_nobody_needs():
    alive = []

    def look(x):
        alive.append([one() is not None for one in held])
        return x + 1

    LOOK.impl("look", look, "CPU")
    lines = ["buf0 = aten.sum.default(arg0_1)", "del arg0_1", "buf1 = torch.ops.gaws_tests.look.default(buf0)"]
    inputs = [torch.randn(2, 3), torch.randn(3)]
    want = inputs[0].sum() + 1
    _, run = both([*lines, "return (buf1, None, arg1_1, )"], *inputs, frees=True)
    held = [weakref.ref(one.untyped_storage()) for one in inputs]
    got = run(inputs)
    assert inputs == [] and got[1] is None and len(got) == 3
    torch.testing.assert_close(got[0], want)
    assert alive == [[False, True]]


def test_what_was_lent_comes_back_where_it_does_not_fit():
    lines = ["assert_size_stride(arg1_1, (3, ), (1, ))", "buf0 = aten.add.Tensor(arg0_1, arg1_1)", "return (buf0, )"]
    _, run = both(lines, torch.ones(3), torch.ones(3), frees=True)
    with pytest.raises(AssertionError, match="expected size 4==3"):
        run([torch.ones(3), torch.ones(4)])
    assert run([torch.ones(3), torch.ones(3)])[0].tolist() == [2.0] * 3


@pytest.mark.parametrize("frees", [False, True], ids=["forward", "backward"])
def test_a_mode_sees_every_op(frees):
    from torch.utils.flop_counter import FlopCounterMode

    _, run = both(["buf0 = aten.mm.default(arg0_1, arg0_1)", "return (buf0, None, )"], torch.ones(4, 4), frees=frees)
    with FlopCounterMode(display=False) as counted:
        run([torch.ones(4, 4)])
    assert counted.get_total_flops() == 2 * 4**3


def test_what_was_lent_to_one_is_not_taken_by_another(monkeypatch):
    lines = ["buf0 = aten.add.Tensor(arg0_1, arg1_1)", "return (buf0, )"]
    _, run = both(lines, torch.ones(3), torch.ones(3), frees=True)
    _, other = both(lines, torch.ones(3), torch.ones(3))
    torch.ops.gaws.lend([torch.full((3,), 100.0)] * 2, run._handle)
    assert other([torch.ones(3), torch.ones(3)])[0].tolist() == [2.0] * 3

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run([torch.ones(3), torch.ones(3)])
    assert torch.ops.gaws.lend([], 0) == []


def test_kinds_of_inputs_are_read_where_there_are_no_examples():
    lines = ["arg0_1, arg1_1, arg2_1, arg3_1 = args", "args.clear()", "s0 = arg1_1"]
    lines += ["buf0 = reinterpret_tensor(arg2_1, (s0, 2), (2, 1), 0)", "return (buf0, )"]
    code = wrapper.Code("def call(args):\n    " + "\n    ".join(lines), dict(NAMES), None)
    assert (code.tensors, code.given) == ([2], [1])  # nothing reads the first and the last
