# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Small random models of many architectures, and batches for them; float64 unless told otherwise."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)


VOCABULARY = 50
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "num_labels": 3,
}
DECODER = ENCODER | {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}


def bert(**kwargs) -> nn.Module:
    return BertForSequenceClassification(BertConfig(**ENCODER | kwargs))


def roberta() -> nn.Module:
    return RobertaForSequenceClassification(RobertaConfig(**ENCODER, pad_token_id=0))


def distilbert() -> nn.Module:
    config = DistilBertConfig(
        vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=40, num_labels=3
    )
    return DistilBertForSequenceClassification(config)


def gpt2(causal: bool = False) -> nn.Module:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=40, num_labels=3, pad_token_id=0
    )
    return GPT2LMHeadModel(config) if causal else GPT2ForSequenceClassification(config)


def llama(causal: bool = False, **kwargs) -> nn.Module:
    config = LlamaConfig(**DECODER | kwargs)
    return LlamaForCausalLM(config) if causal else LlamaForSequenceClassification(config)


def qwen3() -> nn.Module:
    return Qwen3ForSequenceClassification(Qwen3Config(**DECODER, head_dim=4, tie_word_embeddings=True))


def t5() -> nn.Module:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        num_labels=3,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5ForSequenceClassification(config)


def vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    return ViTForImageClassification(config)


class Recurrent(nn.Module):
    """A custom module: one linear layer called three times, another one never, a bilinear use of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.step = nn.Linear(16, 16)
        self.unused = nn.Linear(16, 16)
        self.gate = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask):
        state = self.embed(input_ids)
        for _ in range(3):
            state = torch.tanh(self.step(state)) * torch.sigmoid(self.gate(state))
        weights = attention_mask[..., None] / attention_mask.sum(1)[:, None, None]
        return self.head((state * weights).sum(1))


def seeded(factory, *args, seed: int = 0, dtype=torch.float64, **kwargs) -> nn.Module:
    """The model with weights spread out enough that no gradient is tiny; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory(*args, **kwargs)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.3)
    return model.to(dtype).eval()


def text_batches(sizes=(3, 2), length: int = 7, seed: int = 0, padding: str = "right") -> list[dict]:
    """Batches of padded token ids with attention masks and labels; lengths differ between examples and batches."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for number, size in enumerate(sizes):
        width = length + number
        ids = torch.randint(2, VOCABULARY, (size, width), generator=generator)
        mask = torch.ones(size, width, dtype=torch.long)
        for example in range(1, size):
            cut = slice(width - example, None) if padding == "right" else slice(0, example)
            mask[example, cut] = 0
            ids[example, cut] = 0
        labels = torch.randint(0, 3, (size,), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def causal_batches(**kwargs) -> list[dict]:
    batches = text_batches(**kwargs)
    for batch in batches:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"][:, :2] = -100
    return batches


def image_batches(sizes=(3, 2), seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "pixel_values": torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64),
            "labels": torch.randint(0, 3, (size,), generator=generator),
        }
        for size in sizes
    ]


def t5_batches() -> list[dict]:
    """T5's classifier reads the last end-of-sequence token, of which every example needs one (id 1)."""
    batches = text_batches()
    for batch in batches:
        last = batch["attention_mask"].sum(1) - 1
        batch["input_ids"][torch.arange(len(last)), last] = 1
    return batches


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=4, experts_implementation="eager"))


def t5_generator() -> nn.Module:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)
