"""OpenVINO GenAI as a peer: a model of OpenVINO and its LoRA as a dynamic adapter, which stays unmerged.

OpenVINO runs a model of its own format, which optimum-intel writes. That wants an older transformers, so it has an
environment of its own; a model is written once::

    python -m venv ov && ov/bin/pip install optimum-intel openvino-tokenizers
    ov/bin/optimum-cli export openvino --model DIR --task text-generation-with-past --weight-format fp32 FOLDER
    pip install 'gawscompile[openvino]'
    python -m benchmarks.generate --openvino FOLDER
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

OPENVINO = "OpenVINO"
PRECISION = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Peer:
    """The model of `folder`, with the active LoRA of `model`, if it is a PeftModel; in the dtype of that.

    Raises `ImportError` without openvino-genai, `FileNotFoundError` where `folder` has no model.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        import openvino_genai as genai

        if not (folder / "openvino_model.xml").exists():
            raise FileNotFoundError(f"{folder} has no openvino_model.xml: see benchmarks/genai.py on how to write one")
        self._genai = genai
        precision = PRECISION[model.dtype]
        # keys and values as exact as the weights: they are 8 bits by default
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision}
        settings["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
        self._kept = tempfile.TemporaryDirectory(prefix="gaws-openvino-")
        if hasattr(model, "peft_config"):
            (name,) = model.active_adapters
            model.save_pretrained(self._kept.name, selected_adapters=[name])
            (written,) = Path(self._kept.name).rglob("adapter_model.safetensors")
            config = model.peft_config[name]
            if config.use_rslora or config.rank_pattern or config.alpha_pattern:
                raise ValueError("OpenVINO takes one scale for all modules: lora_alpha / r")
            scale = config.lora_alpha / config.r  # OpenVINO multiplies B A by this alone
            mode = genai.AdapterConfig.Mode.MODE_DYNAMIC
            settings["adapters"] = genai.AdapterConfig(genai.Adapter(str(written)), scale, mode)
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False  # the same prompt comes in every round
        settings["scheduler_config"] = scheduler
        self._pipeline = genai.LLMPipeline(str(folder), "CPU", **settings)

    def generate(self, ids: torch.Tensor, new: int) -> tuple[list[int], list[float]]:
        """`new` tokens after a prompt of one row, and the seconds after which each of them was there."""
        import openvino

        genai = self._genai
        times: list[float] = []
        begun = time.perf_counter()

        class Stamps(genai.StreamerBase):  # type: ignore[name-defined]
            def write(self, tokens: Any) -> Any:
                times.extend([time.perf_counter() - begun] * (len(tokens) if isinstance(tokens, list) else 1))
                return genai.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        prompt = (openvino.Tensor(one.numpy()) for one in (ids, torch.ones_like(ids)))
        config = genai.GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False, ignore_eos=True)
        found = self._pipeline.generate(genai.TokenizedInputs(*prompt), config, Stamps())
        return list(found.tokens[0]), times
