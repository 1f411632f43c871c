# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Tiny random language models, a tokenizer with a chat template, and rows in every format of supervised data."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)


WORDS = ["<pad>", "<eos>", "<unk>", "user", "assistant", "system", ":", "\n", *[f"w{number}" for number in range(40)]]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : "
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} <eos> {% endgeneration %}"
    "{% else %}{{ m['content'] }} <eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=4)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=4, sliding_window=16)),
}


def language_model(kind: str = "llama", dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[kind]().to(dtype).eval()


def chat_tokenizer(template: str | None = TEMPLATE, **special):
    """Splits at spaces; knows `WORDS`."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", **special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **tokens)
    tokenizer.chat_template = template
    return tokenizer


def words(first: int, count: int = 5) -> str:
    return " ".join(f"w{(first * 7 + step * step) % 40}" for step in range(count))


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def question(i: int) -> str:
    return words(i, 3 + i % 3)


def answer(i: int) -> str:
    return words(i + 3, 2 + i % 4)


def rows_in(kind: str, count: int = 12) -> list[dict]:
    """The same questions and answers in each of the formats."""
    make = {
        "text": lambda i: {"text": words(i, 4 + i % 3)},
        "plain": lambda i: {"prompt": question(i), "completion": " " + answer(i)},
        "messages": lambda i: {"messages": [turn("user", question(i)), turn("assistant", answer(i))]},
        "turns": lambda i: {"prompt": [turn("user", question(i))], "completion": [turn("assistant", answer(i))]},
        "alpaca": lambda i: {"instruction": question(i), "input": "", "output": answer(i)},
        "sharegpt": lambda i: {
            "conversations": [{"from": "human", "value": question(i)}, {"from": "gpt", "value": answer(i)}]
        },
    }[kind]
    return [make(i) for i in range(count)]


# How TRL takes the same rows: written out here, not converted by what is tested.
TRL_KIND = {"alpaca": "turns", "sharegpt": "messages"}
FORMATS = ("text", "plain", "messages", "turns", "alpaca", "sharegpt")


def sft_arguments(folder, **changes):
    """An SFTConfig for a CPU whose DataLoader keeps the order of the rows."""
    from trl import SFTConfig

    given = {
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_steps": 1,
        "per_device_train_batch_size": 5,
        **changes,
    }
    return SFTConfig(output_dir=str(folder), **given)
