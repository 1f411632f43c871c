# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A tiny Llama with a byte tokenizer that stands in for the bench's models."""

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.benchmarks.language import queue
from examples.benchmarks.language.batches import encode
from examples.benchmarks.language.queue import Bench
from examples.benchmarks.language.tasks import load_task


@pytest.fixture(scope="session")
def tokenizer():
    symbols = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    base = Tokenizer(models.BPE({symbol: place for place, symbol in enumerate(symbols)}, []))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<end>", pad_token="<end>")


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tokens(tokenizer):
    """A few examples of every split of a task, encoded."""
    task = load_task("translation_fr")
    counts = {"train": 24, "validation": 8, "test": 8}
    return {
        split: [encode(tokenizer, example) for example in getattr(task, split)[:count]]
        for split, count in counts.items()
    }


@pytest.fixture
def bench(model, tokenizer, monkeypatch):
    """The tiny model, a few examples of one task, two steps."""
    task = load_task("spam")
    short = replace(task, train=task.train[:8], validation=task.validation[:4], test=task.test[:4])
    monkeypatch.setattr(queue, "load_task", lambda name: short)
    return Bench(load=lambda name: (model, tokenizer), steps=2)
