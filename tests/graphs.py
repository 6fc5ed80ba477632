"""Captures the graphs that our passes see, and runs them stage by stage, without Inductor.

What a pass has made is judged by what it means: the reference executor runs it, and the text of every kernel is printed
and none is built. What kernels compute has tests of its own (`codegen`, `runtime`); whole pipelines that end in real
kernels are captured with ``kernels=True``.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition
from torch._inductor.decomposition import select_decomp_table
from torch.utils._pytree import tree_leaves

from gawscompile.backend import placeholders_of, stored_inputs
from gawscompile.ir.recipe import iota
from gawscompile.ir.records import GraphRecord
from gawscompile.options import Options
from gawscompile.passes import INFERENCE, PIPELINE
from gawscompile.passes.context import Context, verify
from gawscompile.planning.table import Program
from gawscompile.runtime import ops, polyfills
from gawscompile.runtime.attention import ATTEND
from gawscompile.runtime.banked import SNAPSHOT
from gawscompile.watch.guards import watch_frame
from tests.fuzz import reference


def printed(program: str) -> None:
    """Print the kernels of a program, as `ops.prepare` does, and build none of them."""
    Program.parse(program).sources()


@contextmanager
def without_kernels() -> Iterator[None]:
    """Groups are lowered, their kernels are printed, and none is built."""
    with mock.patch.object(ops, "prepare", printed):
        yield


@dataclass
class Captured:
    """One inference graph with the real inputs and outputs of the call that made it. With `kernels` those of its groups
    are built and run."""

    graph: torch.fx.Graph
    module: torch.fx.GraphModule
    inputs: list[Any]
    outputs: list[torch.Tensor]
    stored: frozenset[int] = frozenset()
    kernels: bool = False

    def until(self, stage: str | None = None) -> Context:
        """Run the pipeline over a copy, up to and including `stage`, checking values after every pass."""
        if self.kernels:
            ops.ensure_loaded()
            return self._until(stage)
        with without_kernels():
            return self._until(stage)

    def _until(self, stage: str | None) -> Context:
        stored = placeholders_of(self.graph, self.stored)
        context = Context.of(self.graph, Options(), GraphRecord("test"), stored, holder=self.module)
        for module in PIPELINE:
            context.stage = module.__name__.rpartition(".")[2]
            if context.training and module in INFERENCE:
                continue
            module.run(context.graph, context)
            verify(context)
            context.graph.lint()
            if context.stage == stage:
                break
        return context

    def run(self, context: Context) -> list[torch.Tensor]:
        """The outputs of a rewritten graph for the captured inputs."""
        return self.run_graph(context.graph)

    def run_graph(self, graph: torch.fx.Graph) -> list[torch.Tensor]:
        """The outputs of a graph that has the captured one's inputs."""
        if self.kernels or not any(node.target in (*ops.OPS, ATTEND, SNAPSHOT) for node in graph.nodes):
            found = torch.fx.Interpreter(self.module, graph=graph).run(*self.inputs)
        else:
            found = reference.run(graph, self.module, self.inputs).outputs
        return [out for out in tree_leaves(found) if isinstance(out, torch.Tensor)]


def capture(
    function: Callable[..., Any], *args: Any, dynamic: bool | None = False, kernels: bool = False, **kwargs: Any
) -> Captured:
    """The one graph that AOTAutograd makes of ``function(*args, **kwargs)`` for inference."""
    found: list[Captured] = []

    def compiler(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            outputs = gm(*inputs)
            tensors = [out for out in outputs if isinstance(out, torch.Tensor)]
            found.append(Captured(gm.graph, gm, list(inputs), tensors, stored[0], kernels))
            return outputs

        return run

    stored = []
    through = aot_autograd(fw_compiler=compiler, inference_compiler=compiler, decompositions=select_decomp_table())

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        stored.append(stored_inputs(gm, inputs))
        return through(gm, inputs)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=dynamic)(*args, **kwargs)
    (captured,) = found
    return captured


@functools.cache
def llama_graph(layers: int = 2, dtype: torch.dtype = torch.float32, dynamic: bool = False) -> Captured:
    """`small_llama`, called with two rows of five tokens. Tests share it: tracing it takes much longer than what is
    tried with it, and `Captured.until` works on a copy."""
    return capture(small_llama(dtype, layers), tokens(2, 5), use_cache=False, dynamic=dynamic)


@functools.cache
def bert_graph(layers: int = 2, dtype: torch.dtype = torch.float32) -> Captured:
    """`small_bert`, called with two rows of five tokens."""
    return capture(small_bert(dtype, layers), tokens(2, 5))


def capture_joint(function: Callable[..., Any], *args: Any, dynamic: bool | None = False, **kwargs: Any) -> Captured:
    """The one graph of forward and backward that AOTAutograd makes of ``function(*args, **kwargs)``, which gives one
    tensor, with random inputs and gradients of its outputs."""
    found: list[Captured] = []
    stored: list[frozenset[int]] = []

    def partition(gm: torch.fx.GraphModule, *rest: Any, **settings: Any) -> Any:
        found.append(Captured(copy.deepcopy(gm.graph), gm, [], [], stored[0]))
        return default_partition(gm, *rest, **settings)

    def compiler(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        return gm.forward

    table = select_decomp_table()
    through = aot_autograd(fw_compiler=compiler, bw_compiler=compiler, partition_fn=partition, decompositions=table)

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        stored.append(stored_inputs(gm, inputs))
        return through(gm, inputs)

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=dynamic)(*args, **kwargs)
    (captured,) = found
    captured.inputs += map(_drawn, captured.graph.find_nodes(op="placeholder"))
    captured.outputs += captured.run_graph(captured.graph)
    return captured


def _drawn(node: torch.fx.Node) -> Any:
    """A random value of an input; of a symbolic size the one that it was traced with."""
    fake = node.meta["val"]
    if not isinstance(fake, torch.Tensor):
        return fake.node.hint
    sizes = [size if isinstance(size, int) else size.node.hint for size in fake.shape]
    generator = torch.Generator().manual_seed(len(node.name) + sum(map(ord, node.name)))
    if not fake.is_floating_point():
        return torch.zeros(sizes, dtype=fake.dtype)
    numbers = torch.randn(sizes, generator=generator)
    return (numbers / max(1, sizes[-1]) ** 0.5 if len(sizes) == 2 else numbers).to(fake.dtype)


def rewriting(records: list[GraphRecord], kernels: bool = True, watch: bool = True) -> Callable[..., Any]:
    """A backend that runs our passes and no Inductor, for any number of graphs; `records` get what each pass said.
    `watch`: with our watch in the place of guards."""
    polyfills.install()  # the real backend may have loaded in this process before PEFT did

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        stored = stored_inputs(gm, inputs)
        watch_frame(watch, watch)

        def compiler(joint: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            context = Captured(joint.graph, joint, [], [], stored, kernels).until()
            records.append(context.record)
            for node in context.graph.find_nodes(op="call_function", target=torch.ops.prims.iota.default):
                node.target = iota  # eager has no kernel for an eye of more than 255
            module = torch.fx.GraphModule(joint, context.graph)
            return module.forward if kernels else lambda *inputs: reference.run(module.graph, module, inputs).outputs

        decompositions = select_decomp_table()
        through = aot_autograd(fw_compiler=compiler, inference_compiler=compiler, decompositions=decompositions)
        return through(gm, inputs)

    return backend


def count(context: Context, target: Any) -> int:
    return len(context.graph.find_nodes(op="call_function", target=target))


def randomise(model: torch.nn.Module, seed: int = 0, scale: float = 0.1) -> torch.nn.Module:
    """Give every LoRA B a random value: zeros would hide an adapter that was dropped."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


class Pair(torch.nn.Module):
    """Two projections of one activation and one after them, each with a LoRA: the smallest model that has it all."""

    def __init__(self, width: int = 32, rank: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in "qko":
            linear = torch.nn.Linear(width, width)
            linear.a = torch.nn.Parameter(torch.randn(rank, width) / width**0.5)
            linear.b = torch.nn.Parameter(torch.randn(width, rank) / rank**0.5)
            self.add_module(name, linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def adapted(layer: Any, x: torch.Tensor) -> torch.Tensor:
            return layer(x) + 2.0 * torch.nn.functional.linear(torch.nn.functional.linear(x, layer.a), layer.b)

        return x + adapted(self.o, adapted(self.q, x).tanh() * adapted(self.k, x))


def small_llama(dtype: torch.dtype = torch.float32, layers: int = 2, lora: Any = 8, **changes: Any) -> torch.nn.Module:
    """A random Llama with grouped-query attention; `lora`: a rank for all linears, a LoraConfig, or None."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**{**sizes, "head_dim": 16, "vocab_size": 128, "num_hidden_layers": layers, **changes})
    model: Any = LlamaForCausalLM(config)
    return _adapted(model.to(dtype).eval(), lora, "all-linear")


def small_bert(dtype: torch.dtype = torch.float32, layers: int = 2, lora: Any = 8) -> torch.nn.Module:
    """A random BERT encoder, biases everywhere."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4, vocab_size=128
    )
    model: Any = BertModel(config)
    return _adapted(model.to(dtype).eval(), lora, ["query", "key", "value", "dense"])


def _adapted(model: torch.nn.Module, lora: Any, targets: Any) -> torch.nn.Module:
    if lora is None:
        return model
    import peft  # takes long, and programs of tests without a PEFT model do not need it

    config = peft.LoraConfig(r=lora, lora_alpha=2 * lora, target_modules=targets) if isinstance(lora, int) else lora
    return randomise(peft.get_peft_model(model, config).eval())


def tokens(*shape: int, vocabulary: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))
