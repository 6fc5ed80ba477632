"""The demo's adapter: a LoRA trained on a short text of our own until its voice is plain to hear.

The text (`lighthouse.txt`) is a dozen questions answered in one distinctive manner. An adapter that has learned it
answers *other* questions in that manner too, so anyone can see from the output that the adapter is at work.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXT = Path(__file__).parent / "lighthouse.txt"
RANK = 16
LEARNING_RATE = 2e-3
BATCH = 3
"""Question-answer pairs per step: some 300 tokens, about a second on two cores in fp32."""


def pairs() -> list[tuple[str, str]]:
    """(question, answer) pairs of the text, in its order."""
    text = TEXT.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [
        (question.removeprefix("Q: "), answer.removeprefix("A: "))
        for question, answer in zip(lines[::2], lines[1::2], strict=True)
    ]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Token ids of `question` as the model expects it, up to where its answer begins.

    Models that bring no chat template get ``Question: … Answer:``.
    """
    if tokenizer.chat_template is None:
        return list(tokenizer(f"Question: {question}\nAnswer:")["input_ids"])
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _example(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> tuple[list[int], list[int]]:
    """(input ids, labels) of one pair; the question's labels are -100, so that only the answer is learned."""
    prompt = prompt_ids(tokenizer, question)
    reply = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id is not None:
        reply.append(tokenizer.eos_token_id)
    return prompt + reply, [-100] * len(prompt) + reply


def _batch(examples: list[tuple[list[int], list[int]]], device: torch.device) -> dict[str, torch.Tensor]:
    """Examples padded on the right: ``input_ids``, ``labels``, ``attention_mask``, each ``[batch, tokens]``."""
    longest = max(len(ids) for ids, _ in examples) + 1  # where nothing is padded there is no mask, and another graph
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for ids, labels in examples:
        padding = longest - len(ids)
        rows["input_ids"].append(ids + [0] * padding)
        rows["labels"].append(labels + [-100] * padding)
        rows["attention_mask"].append([1] * len(ids) + [0] * padding)
    return {name: torch.tensor(values, device=device) for name, values in rows.items()}


def attach_lora(model: PreTrainedModel, rank: int = RANK) -> Any:
    """`model` with a fresh PEFT LoRA on every linear but the head; its base weights are left as they are."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def train(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    seed: int = 0,
    progress: bool = True,
    text: list[tuple[str, str]] | None = None,
    rate: float = LEARNING_RATE,
    backend: str = "eager",
) -> float:
    """Trains the adapter of the PEFT model `model` for `steps` steps of AdamW; the last step's loss.

    On `text` if given, else on all of `pairs`. One fixed seed decides the order of the examples. Leaves the model in
    eval mode, with no gradients held. `backend`: of torch.compile, for the layers, which share what is compiled.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    examples = [_example(tokenizer, *pair) for pair in (pairs() if text is None else text)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    # Three warm-up steps and a straight line down: at this rate the first steps would otherwise blow the loss up.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 3, max(0.05, 1 - step / max(steps, 1)))
    )
    model.train()
    began, loss_value, order = time.perf_counter(), float("nan"), list[int]()
    with _compiled_layers(model, backend):
        for step in range(steps):
            if len(order) < BATCH:
                order += torch.randperm(len(examples), generator=generator).tolist()
            chosen, order = order[:BATCH], order[BATCH:]
            loss = model(**_batch([examples[index] for index in chosen], device), use_cache=False).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            loss_value = float(loss.detach())
            if progress:
                _progress(step + 1, steps, loss_value, time.perf_counter() - began)
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    return loss_value


@contextlib.contextmanager
def _compiled_layers(model: Any, backend: str) -> Iterator[None]:
    """Within, the decoder layers run what `backend` compiled of one of them, for batches of any length."""
    if backend == "eager":
        yield
        return
    count = model.config.num_hidden_layers
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    layers: Any = next(module for module in lists if len(module) == count)
    model.enable_input_require_grads()  # so that the first layer is like the others
    for layer in layers:
        layer.compile(backend=backend, dynamic=True)
    try:
        yield
    finally:
        model.disable_input_require_grads()
        for layer in layers:
            layer._compiled_call_impl = None


@torch.no_grad()
def loss_on(model: Any, tokenizer: PreTrainedTokenizerBase, text: list[tuple[str, str]]) -> float:
    """Mean negative log-likelihood, in nats, of one token of the answers in `text`."""
    examples = [_example(tokenizer, *pair) for pair in text]
    return float(model(**_batch(examples, next(model.parameters()).device), use_cache=False).loss)


def _progress(step: int, steps: int, loss: float, seconds: float) -> None:
    """One line that rewrites itself on a terminal; elsewhere every tenth step and the last get a line."""
    terminal = sys.stdout.isatty()
    if not terminal and step % 10 and step != steps:
        return
    remaining = seconds / step * (steps - step)
    line = f"  step {step:3d}/{steps}   loss {loss:6.3f}   {seconds:5.1f} s, {remaining:4.0f} s to go"
    print(("\r" + line) if terminal else line, end="\n" if step == steps or not terminal else "", flush=True)
