# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A model, a tokenizer and data small enough for the command line to be run many times."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)


WORDS = ["[PAD]", "[UNK]", "words", *"0123456789", *[f"{kind}{i}" for kind in "abc" for i in range(8)]]


def tiny_tokenizer():
    """Splits at spaces; no special tokens but padding."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def save_model(folder, causal=False):
    """A random model of two layers (an encoder without a head) and its tokenizer, as `from_pretrained` wants them."""
    torch.manual_seed(0)
    if causal:
        config = GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=16, pad_token_id=0)
        model = GPT2LMHeadModel(config)
    else:
        config = BertConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
        )
        model = BertModel(config)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    if causal:
        tokenizer.eos_token = "[UNK]"  # a text ends with it in training
    tokenizer.save_pretrained(folder)
    return folder


def save_data(path, count=24):
    """Texts whose class shows in their words."""
    rows = [
        {"text": " ".join(f"{'abc'[i % 3]}{(i * k) % 8}" for k in range(1, 5)), "label": i % 3} for i in range(count)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path
