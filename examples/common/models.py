# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Networks with random weights, and copies that share weights, for measurements of time and memory."""

from __future__ import annotations

import copy

from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)


def bert(layers: int = 6, width: int = 384) -> nn.Module:
    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=4 * width,
        vocab_size=2000,
        num_labels=2,
    )
    return BertForSequenceClassification(config)


def gpt2(layers: int = 12, width: int = 768) -> nn.Module:
    config = GPT2Config(
        vocab_size=2000,
        n_embd=width,
        n_layer=layers,
        n_head=12,
        num_labels=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return GPT2ForSequenceClassification(config)


def llama_1b() -> nn.Module:
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_labels=2,
        pad_token_id=0,
    )
    return LlamaForSequenceClassification(config)


CLASSIFIERS = {  # model, examples, tokens
    "bert-32x128": (bert, 32, 128),
    "bert-128x32": (bert, 128, 32),
    "gpt2-8x64": (gpt2, 8, 64),
    "llama1b-16x128": (llama_1b, 16, 128),  # on a GPU only
    "tiny": (lambda: bert(2, 48), 4, 8),
}


def copy_sharing_weights(model: nn.Module) -> nn.Module:
    """Modules of its own, parameters of the original."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
