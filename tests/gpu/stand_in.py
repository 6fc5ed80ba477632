"""A stand-in for a GPU, so that what runs only on one is run before there is one: nothing here says how fast a GPU is.

In a process with ``TRITON_INTERPRET=1``, `install` makes this machine's CPU pass for an H100:

- the backend plans its groups for an H100, and `gaws::project` on CPU tensors is the op of `gawscompile.runtime.gpu`,
  whose Triton kernels run in the interpreter;
- Inductor is replaced by the graph that it would get, run as it is: so all that a model computes passes the dispatcher;
- `torch.cuda` gets streams and events, and graphs that record the dispatcher's calls and replay them on the same
  tensors: an input at another address, Python that would have to run again and a read by the host show as on a GPU.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

aten = torch.ops.aten
_handles = itertools.count(1)


class Stream:
    """As much of ``torch.cuda.Stream`` as we use; work on it is done at once."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.cuda_stream = next(_handles)

    def wait_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)

    def synchronize(self) -> None:
        refuse_capturing("a synchronization")


class Event:
    """A point in time, of the host."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.timing, self.at = enable_timing, 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end_event: Event) -> float:
        assert self.timing and end_event.timing and self.at <= end_event.at, "recorded in this order, for timing"
        return (end_event.at - self.at) * 1e3


class CUDAGraph:
    """The dispatcher's calls of one capture; `replay` makes them again, on the same tensors, into the same results."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] | None = None

    def replay(self) -> None:
        assert self.calls is not None, "nothing was captured"
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                inputs = {storage(t) for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)}
                olds = [t for t in tree_flatten(out)[0] if isinstance(t, torch.Tensor)]
                if not func._schema.is_mutable and olds and all(storage(t) in inputs for t in olds):
                    continue  # a view of what is there
                news = [t for t in tree_flatten(func(*args, **kwargs))[0] if isinstance(t, torch.Tensor)]
                for old, new in zip(olds, news, strict=True):
                    if storage(old) != storage(new):
                        old.copy_(new)


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # or Dynamo would skip what it has compiled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            refuse_capturing("a read by the host")
        if func is torch.ops.gaws.schedule.default:  # Python, of whose calls a capture sees the kernels
            from gawscompile.runtime.banked import taken

            with self:
                return taken(*args[:2])
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


_state = SimpleNamespace(stream=Stream(), capturing=False)


def refuse_capturing(what: str) -> None:
    if _state.capturing:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")


@contextlib.contextmanager
def stream(stream: Stream | None):
    before, _state.stream = _state.stream, stream or _state.stream
    try:
        yield
    finally:
        _state.stream = before


class graph:
    """As ``torch.cuda.graph``: captures what runs in the block."""

    default_capture_stream = Stream()

    def __init__(
        self, cuda_graph: CUDAGraph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> None:
        self.cuda_graph, self.on = cuda_graph, stream or self.default_capture_stream

    def __enter__(self) -> None:
        self.recorder, self.before = _Recorder(), _state.stream
        _state.stream, _state.capturing = self.on, True
        self.recorder.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.recorder.__exit__(*error)
        _state.stream, _state.capturing = self.before, False
        self.cuda_graph.calls = self.recorder.calls


def current_stream(device: Any = None) -> Stream:
    return _state.stream


def synchronize(device: Any = None) -> None:
    refuse_capturing("a synchronization")


def is_current_stream_capturing() -> bool:
    return bool(_state.capturing)


def current_device() -> int:
    return 0


def device_count() -> int:
    return 1


def get_device_name(device: Any = None) -> str:
    return "NVIDIA H100 (a stand-in on this CPU)"


def get_device_capability(device: Any = None) -> tuple[int, int]:
    return (9, 0)


def get_device_properties(device: Any = None) -> Any:
    return SimpleNamespace(multi_processor_count=132, L2_cache_size=1 << 8, max_threads_per_multi_processor=2048)


REPLACED = (
    *("Stream", "Event", "CUDAGraph", "stream", "graph", "current_stream", "synchronize"),
    *("is_current_stream_capturing", "current_device", "device_count"),
    *("get_device_name", "get_device_capability", "get_device_properties"),
)
"""Names of `torch.cuda` that this module stands in for."""


def eager_fx(gm: Any, example_inputs: Any, *, config_patches: dict[str, Any] | None = None, **_: Any) -> Any:
    """In the place of Inductor's ``compile_fx``: the joint-graph passes, and then the graph as it is."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor.decomposition import select_decomp_table

    found = (config_patches or {}).get("joint_custom_pre_pass") or []
    hooks = found if isinstance(found, list) else [found]

    def compiler(traced: Any, _: Any) -> Any:
        for hook in hooks:
            hook(traced.graph)
        traced.recompile()
        return make_boxed_func(traced.forward)

    backend = aot_autograd(fw_compiler=compiler, inference_compiler=compiler, decompositions=select_decomp_table())
    return backend(gm, list(example_inputs))


def installed() -> bool:
    """Whether this process has it."""
    return os.environ.get("GAWS_GPU_STAND_IN") == "1"


def install() -> None:
    """From here on, in this process, the CPU passes for an H100."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("the stand-in needs TRITON_INTERPRET=1 from the start of its process")
    import torch._inductor.compile_fx as fx

    from gawscompile import backend
    from gawscompile.calibration import gpu_timing
    from gawscompile.planning import devices
    from gawscompile.runtime import attention, gpu, ops
    from tests.codegen.triton_interpret_cases import repair_interpreter

    repair_interpreter()
    for name in REPLACED:
        setattr(torch.cuda, name, globals()[name])
    gpu_timing.DEVICE, gpu_timing.COPIED = "cpu", 1 << 16
    fx.compile_fx = eager_fx
    backend._kind = lambda inputs: "cuda"
    devices.of = lambda kind: devices._gpu(0)
    ops.LIBRARY.impl("project", gpu.project, "CPU")
    ops.LIBRARY.impl("attend", attention.on_gpu, "CPU")
    ops.ensure_loaded = lambda: None  # whose kernel would take the op's place on CPU tensors
