# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Right answers of greedy decoding, for tasks whose answers can be verified."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .batches import encode_prompt
from .tasks import Example, Task


@torch.no_grad()
def accuracy(model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, size: int = 16) -> dict:
    """{"accuracy": the part of the test examples whose greedy answer is right}."""
    if task.verify is None:
        return {}
    right = 0
    for start in range(0, len(task.test), size):
        examples = task.test[start : start + size]
        answers = greedy_answers(model, tokenizer, examples)
        right += sum(task.verify(answer, example) for answer, example in zip(answers, examples, strict=True))
    return {"accuracy": round(right / len(task.test), 4)}


def greedy_answers(model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: tuple[Example, ...]) -> list[str]:
    """The text up to the end token, two tokens longer than the longest right answer at most."""
    prompts = [encode_prompt(tokenizer, example) for example in examples]
    length = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (length - len(prompt)) + prompt for prompt in prompts])  # (examples, tokens)
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    longest = max(len(tokenizer(example.completion, add_special_tokens=False).input_ids) for example in examples)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=longest + 3,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    answers = out[:, length:].tolist()
    end = tokenizer.eos_token_id
    return [tokenizer.decode(answer[: answer.index(end)] if end in answer else answer).strip() for answer in answers]
