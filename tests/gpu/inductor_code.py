"""Prints what Inductor makes of an adapted model on an H100 that is not there: a JSON line for each way to compile it.

A script, as it puts another `torch.cuda` and another driver of Triton into its process. Graph, shapes and devices are
fake, so Inductor goes all the way to its code and stops where it would load it.
"""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any

os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_FX_GRAPH_CACHE": "0"}
os.environ |= {"TRITON_DEFAULT_FP_FUSION": "1"}  # Triton 3.9 warns where it is unset

import peft
import torch
import torch._subclasses.fake_tensor as fake_tensor
from torch._dynamo.device_interface import CudaInterface
from torch._guards import TracingContext, tracing
from torch._inductor import compile_fx, graph
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._triton import has_triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gawscompile.backend import GawsPass
from gawscompile.options import Options

CASES = {
    "opaque": (1, Options(strict=True)),
    "transparent": (1, Options(strict=True, transparent=True)),
    "many": (40, Options(strict=True, transparent=True)),
    "tuned": (40, Options(strict=True, transparent=True, autotune=True)),
}
"""Tokens and options."""

H100 = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    total_memory=80 << 30,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    gcnArchName="",
)


class Driver:
    """As much of Triton's as printing code asks for."""

    utils = SimpleNamespace(
        get_device_properties=lambda _: {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32}
    )

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


class Two(torch.nn.Module):
    """Two projections of one activation, and one that a residual is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = torch.nn.Linear(256, 512, bias=False), torch.nn.Linear(256, 128)
        self.o = torch.nn.Linear(512, 256, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + self.o(self.q(x).sin()), self.v(x)


class Printed(BaseException):
    """Ends Inductor's work once it has the code."""


def install() -> None:
    """An H100, as far as Inductor looks."""
    driver._active = Driver()
    fake_tensor.init_gpu_context = lambda _: None
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H100,
        "get_device_capability": (9, 0),
        "get_device_name": H100.name,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "mem_get_info": (70 << 30, 80 << 30),
        **dict.fromkeys(("_lazy_init", "set_rng_state", "set_device", "synchronize"), None),
        **dict.fromkeys(("_exchange_device", "_maybe_exchange_device"), 0),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
        if hasattr(CudaInterface, name):
            setattr(CudaInterface, name, staticmethod(getattr(torch.cuda, name)))
    CudaInterface.get_compute_capability = staticmethod(lambda *_: 90)
    CudaInterface.Worker.get_device_properties = staticmethod(lambda *_: H100)
    CudaInterface.Worker.current_device = staticmethod(lambda: 0)
    for name in ("getDevice", "exchangeDevice", "maybeExchangeDevice", "getCurrentRawStream"):
        setattr(torch._C, f"_cuda_{name}", lambda *_: 0)
    torch._C._cuda_getDeviceCount = lambda: 1
    has_triton.cache_clear()  # torchao, which PEFT imports where it is installed, asked before there was an H100

    def stop(self: Any) -> None:
        code, _ = self.codegen()
        raise Printed(getattr(code, "value", code))

    graph.GraphLowering._compile_to_module = graph.GraphLowering.compile_to_module = stop


def code_of(tokens: int, options: Options) -> tuple[list[str], str]:
    """The plans of the groups, and Inductor's code."""
    model = peft.get_peft_model(Two(), peft.LoraConfig(r=16, target_modules=["q", "v", "o"])).bfloat16().eval()
    names, parameters = zip(*model.named_parameters(), strict=True)
    mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)

    def call(x: torch.Tensor, *parameters: torch.Tensor) -> Any:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    with mode, torch.no_grad():
        inputs = [torch.empty(1, tokens, 256, device="cuda", dtype=torch.bfloat16)]
        inputs += [torch.empty(p.shape, dtype=p.dtype, device="cuda") for p in parameters]
        traced = make_fx(call, decomposition_table=select_decomp_table())(*inputs)
    traced.graph.eliminate_dead_code()
    hook = GawsPass(options, "not there", "cuda")
    hook(traced.graph)
    traced.recompile()
    assert hook.record is not None
    try:
        with V.set_fake_mode(mode), tracing(TracingContext(mode)), torch.no_grad():
            compile_fx.compile_fx_inner(traced, inputs, is_inference=True, static_input_idxs=[])
    except Printed as printed:
        return [group.plan for group in hook.record.groups], str(printed)
    raise AssertionError("Inductor loaded no code")


def main() -> None:
    install()
    for name, (tokens, options) in CASES.items():
        plans, code = code_of(tokens, options)
        print(json.dumps({"case": name, "plans": plans, "code": code}))


if __name__ == "__main__":
    main()
