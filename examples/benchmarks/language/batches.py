# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Examples to tokens to batches, and the loss of a batch.

The text is `prompt + "\\n" + completion + end token`, without a chat template; labels are -100 on the prompt. A batch
is one row of examples one after the other (no padding): positions restart at every example, from which the model
builds the block-diagonal causal mask. The loss is that of the padded batch, `pad` gives that one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .tasks import Example


MAX_TOKENS = 96
IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """One example's tokens, and the labels: the same tokens, or IGNORED on the prompt and a leading BOS."""

    tokens: list[int]
    labels: list[int]


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, most: int = MAX_TOKENS) -> Encoded:
    """A text of more than `most` tokens loses the start of its prompt, then the end of its completion."""
    answer = [*tokenizer(example.completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    answer = answer[: most - 1]
    head = encode_prompt(tokenizer, example, room=most - len(answer))
    return Encoded([*head, *answer], [IGNORED] * len(head) + answer)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, example: Example, room: int = MAX_TOKENS) -> list[int]:
    """The model's BOS, if it has one, and the last tokens of the prompt, `room` in all."""
    first = [tokenizer.bos_token_id] if starts_with_bos(tokenizer) else []
    prompt = tokenizer(example.prompt + "\n", add_special_tokens=False).input_ids if example.prompt else []
    return [*first, *prompt[max(0, len(prompt) + len(first) - room) :]]


def starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def pack(batch: Sequence[Encoded]) -> dict[str, Tensor]:
    """Input ids, position ids and labels, each (1, tokens); an example's first label is never predicted."""
    labels = [label for one in batch for label in [IGNORED, *one.labels[1:]]]
    return {
        "input_ids": torch.tensor([[token for one in batch for token in one.tokens]]),
        "position_ids": torch.tensor([[place for one in batch for place in range(len(one.tokens))]]),
        "labels": torch.tensor([labels]),
    }


def pad(batch: Sequence[Encoded], pad_token: int) -> dict[str, Tensor]:
    """The same batch as rows padded on the right, each (examples, tokens): what a collator gives."""
    length = max(len(one.tokens) for one in batch)

    def rows(values: Sequence[list[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (length - len(row))] for row in values])

    return {
        "input_ids": rows([one.tokens for one in batch], pad_token),
        "attention_mask": rows([[1] * len(one.tokens) for one in batch], 0),
        "labels": rows([one.labels for one in batch], IGNORED),
    }


def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The cross-entropy of every label of a packed batch, (labels,); equals the model's own loss in the mean.

    Logits are computed at label positions alone. `model` is a causal language model with `model.model` and
    `model.lm_head` and without a cap on its logits; adapters may be inside it, not around it.
    """
    hidden = model.model(  # (1, tokens, width)
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).last_hidden_state
    labels = batch["labels"][:, 1:]  # (1, tokens - 1)
    wanted = labels != IGNORED
    logits = model.lm_head(hidden[:, :-1][wanted])  # (labels, vocabulary)
    return nn.functional.cross_entropy(logits.float(), labels[wanted], reduction="none")


def training_batches(examples: Sequence[Encoded], size: int, count: int, seed: int) -> list[list[Encoded]]:
    """`count` batches in an order drawn from `seed`; the examples come again once all had their turn."""
    draw = random.Random(seed)
    order: list[int] = []
    while len(order) < size * count:
        turn = list(range(len(examples)))
        draw.shuffle(turn)
        order.extend(turn)
    return [[examples[i] for i in order[step * size : (step + 1) * size]] for step in range(count)]


def evaluation_batches(examples: Sequence[Encoded], size: int = 16) -> Iterator[list[Encoded]]:
    for start in range(0, len(examples), size):
        yield list(examples[start : start + size])
