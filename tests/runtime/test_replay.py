"""A graph of constant sizes run again: the same numbers as by its steps, wherever inputs and results lie."""

from __future__ import annotations

import threading

import pytest
import torch

from gawscompile.runtime import ops
from tests.runtime.test_executor import both

PAIR = "gemv_cpp | k=6 x=f32; n=6 w=f32 out=f32 lora(r=2 f32 s=2.0); n=3 w=f32 out=f32"
ADDED = "gemv_cpp | k=6 x=f32; n=6 w=f32 out=f32 residual=f32"
LIBRARY = "gemm_accumulate | k=6 x=f32; n=6 w=f32 out=f32 lora(r=2 f32 s=2.0)"
W, A, B, V = (torch.randn(*shape) for shape in ((6, 6), (2, 6), (6, 2), (3, 6)))


@pytest.fixture(scope="module", autouse=True)
def loaded():
    ops.ensure_loaded()


def project(out, x, operands, program):
    return f"{out} = torch.ops.gaws.project.default({x}, [{operands}], {program!r})"


LINES = {
    "projections one after the other": [
        project("buf0", "arg0_1", "arg1_1, arg2_1, arg3_1, arg4_1", PAIR),
        "buf1 = buf0[0]",
        "buf2 = buf0[1]",
        "del buf0",
        project("buf3", "reinterpret_tensor(buf1, (2, 6), (6, 1), 0)", "arg1_1, arg0_1", ADDED),
        "del buf1",
        "buf4 = buf3[0]",
        "assert_size_stride(buf4, (2, 6), (6, 1), 'project')",
        "return (buf4, buf2, )",
    ],
    "results are inputs, views and twice the same": [
        project("buf0", "arg0_1", "arg1_1, arg2_1, arg3_1, arg4_1", PAIR),
        "buf1 = buf0[0]",
        "buf2 = buf0[1]",
        "buf3 = reinterpret_tensor(buf1, (2, 3), (6, 1), 2)",
        "return (arg0_1, buf3, buf2, reinterpret_tensor(arg1_1, (3, ), (2, ), 1), buf1, None, )",
    ],
    "memory is shared by liveness": [
        project("buf0", "arg0_1", "arg1_1, arg0_1", ADDED),
        "buf1 = buf0[0]; del buf0",
        *(
            line
            for i in range(2, 14, 2)
            for line in (
                project(f"buf{i}", f"buf{i - 1}", f"arg1_1, buf{max(i - 3, 1)}", ADDED),
                f"buf{i + 1} = buf{i}[0]",
                f"del buf{i}",
            )
        ),
        "return (buf13, )",
    ],
    "an activation that dies where its product is made": [
        project("buf0", "arg0_1", "arg1_1, arg0_1", ADDED),
        "buf1 = buf0[0]; del buf0",
        project("buf2", "buf1", "arg1_1, arg0_1", ADDED),
        "buf3 = buf2[0]; del buf1",
        project("buf4", "buf3", "arg1_1, arg0_1", ADDED),
        "buf5 = buf4[0]; del buf3",
        "return (buf5, )",
    ],
    "by the library, with places for results": [
        project("buf0", "arg0_1", "arg1_1, arg2_1, arg3_1", LIBRARY),
        "buf1 = buf0[0]",
        project("buf2", "buf1", "arg1_1, arg0_1", ADDED),
        "buf3 = buf2[0]",
        "return (buf3, )",
    ],
    "attention": [
        "buf0 = torch.ops.gaws.attend.default(reinterpret_tensor(arg0_1, (1, 2, 1, 6), (12, 6, 6, 1), 0), "
        "reinterpret_tensor(arg1_1, (1, 1, 6, 6), (36, 36, 6, 1), 0), "
        "reinterpret_tensor(arg1_1, (1, 1, 6, 6), (36, 36, 6, 1), 0), None, 0.5, 'attend d=6 x=f32')",
        "buf1 = buf0",
        "assert_size_stride(buf1, (1, 2, 1, 6), (12, 6, 6, 1), 'attend')",
        project("buf2", "reinterpret_tensor(buf1, (2, 6), (6, 1), 0)", "arg1_1, arg0_1", ADDED),
        "buf3 = buf2[0]",
        "return (buf3, )",
    ],
}


def drawn():
    return [torch.randn(2, 6), *(one.clone() for one in (W, A, B, V))]


def at_once(*actions):
    """Each in a thread of its own. Raises what the first of them raised."""
    failed = []

    def guarded(action):
        try:
            action()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def compare(python, steps, inputs):
    want, got = python(list(inputs)), steps(list(inputs))
    assert len(want) == len(got)
    for one, other in zip(want, got, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.equal(one, other) and one.stride() == other.stride()
    return got


@pytest.mark.parametrize("name", LINES)
def test_every_call_gives_the_numbers_of_the_first(name):
    inputs = drawn()
    python, steps = both(LINES[name], *inputs)
    kept = []
    for call in range(5):
        inputs = drawn()
        inputs[1].mul_(call + 1)  # weights are read in every call, wherever they are by then
        kept.append((python(list(inputs)), compare(python, steps, inputs)))
        assert steps.replays() == (call > 0)
    for want, got in kept:  # results are the caller's: no later call writes to them
        assert all(one is None or torch.equal(one, other) for one, other in zip(want, got, strict=True))


def test_an_input_that_is_returned_is_itself():
    inputs = drawn()
    _, steps = both(LINES["results are inputs, views and twice the same"], *inputs)
    for _ in range(3):
        got = steps(list(inputs))
        assert got[0] is inputs[0]
        assert got[1].untyped_storage().data_ptr() == got[4].untyped_storage().data_ptr()
        assert got[3].untyped_storage().data_ptr() == inputs[1].untyped_storage().data_ptr()


def test_other_inputs_are_laid_out_for_themselves_and_bad_ones_are_the_same_error():
    inputs = drawn()
    python, steps = both(LINES["projections one after the other"], *inputs)
    for _ in range(3):
        compare(python, steps, inputs)
    assert steps.replays() == 1
    bad = [*inputs[:3], inputs[3].double(), inputs[4]]
    with pytest.raises(RuntimeError, match="no longer has the dtype, shape or device"):
        steps(list(bad))
    turned = [inputs[0], inputs[1].t().contiguous().t(), *inputs[2:]]  # by its own copy, as before
    compare(python, steps, turned)
    compare(python, steps, inputs)
    assert steps.replays() == 1
    many = torch.randn(9, 2, 6)
    for one in many:  # at other offsets
        compare(python, steps, [one, *inputs[1:]])
    assert steps.replays() == 1
    with torch.inference_mode():
        compare(python, steps, [one.clone() for one in inputs])  # of other dispatch keys
    assert steps.replays() == 2


@pytest.mark.parametrize(
    ("why", "lines"),
    [
        ("an op that is not ours", ["buf0 = aten.relu.default(arg0_1)", "return (buf0, )"]),
        (
            "more than 1 MB",
            [
                "buf0 = empty_strided_cpu((1024, 1024), (1024, 1), torch.float32)",
                "buf1 = reinterpret_tensor(buf0, (2, ), (1, ), 0)",
                project("buf2", "arg0_1", "arg1_1, arg0_1", ADDED),
                "buf3 = buf2[0]",
                "return (buf3, )",
            ],
        ),
        (
            "from the library",
            [project("buf0", "arg0_1", "arg1_1, arg2_1, arg3_1", LIBRARY), "buf1 = buf0[0]", "return (buf1, )"],
        ),
    ],
    ids=["an op of aten", "more memory than is kept", "a result of the library's"],
)
def test_what_is_not_laid_out_runs_by_its_steps_and_says_why(why, lines, caplog):
    inputs = drawn()
    python, steps = both(lines, *inputs)
    with caplog.at_level("INFO", "gawscompile"):
        for _ in range(4):
            compare(python, steps, inputs)
    assert steps.replays() == 0 and why in steps.why_not()
    assert caplog.text.count(why) == 1


def test_threads_run_one_graph_at_once():
    inputs = drawn()
    python, steps = both(LINES["memory is shared by liveness"], *inputs)

    def run():
        for _ in range(200):
            compare(python, steps, drawn())

    at_once(*[run] * 6)
    assert 1 <= steps.replays() <= 4


def test_the_profiler_sees_it():
    inputs = drawn()
    _, steps = both(LINES["projections one after the other"], *inputs)
    steps(list(inputs))
    with torch.profiler.profile() as profile:
        steps(list(inputs))
    assert [event.name for event in profile.events()].count("gaws::project") == 2
