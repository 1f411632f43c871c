# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The models that steps are measured on, and the sets of modules that are adapted."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from examples.benchmarks.language.models import load_language_model
from peft_linear.recommendation.cost import StepCost, StepModule


Ranks = dict[str, int]


def smollm2() -> nn.Module:
    return load_language_model("smollm2-135m")[0]


def llama() -> nn.Module:
    """12 layers of width 512, random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=8192,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    """12 layers of width 512, random weights, no dropout."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=512,
        n_layer=12,
        n_head=8,
        vocab_size=8192,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=128, use_cache=False))


MODELS: dict[str, Callable[[], nn.Module]] = {"smollm2-135m": smollm2, "llama": llama, "gpt2": gpt2, "tiny": tiny}


def sets(cost: StepCost) -> dict[str, Ranks]:
    """{what is adapted: ranks}."""
    modules = cost.modules
    layers = 1 + max(module.layer for module in modules if module.layer is not None)

    def where(wanted: Callable[[StepModule], bool], rank: int = 8) -> Ranks:
        return {module.name: rank for module in modules if wanted(module)}

    def between(first: float, last: float) -> Callable[[StepModule], bool]:
        return lambda module: module.layer is not None and first * layers <= module.layer < last * layers

    chance = set(random.Random(0).sample([module.name for module in modules], max(1, len(modules) // 5)))
    found = {
        "all linear": where(lambda module: True),
        "all linear, rank 1": where(lambda module: True, rank=1),
        "all linear, rank 32": where(lambda module: True, rank=32),
        "MLP": where(is_mlp),
        "attention": where(lambda module: not is_mlp(module)),
        "q and v": where(is_query_or_value),
        "down": where(is_down),
        "first third": where(between(0, 1 / 3)),
        "middle third": where(between(1 / 3, 2 / 3)),
        "last third": where(between(2 / 3, 1)),
        "last half": where(between(1 / 2, 1)),
        "last four layers": where(between((layers - 4) / layers, 1)),
        "MLP of the last half": where(lambda module: is_mlp(module) and between(1 / 2, 1)(module)),
        "random fifth": where(lambda module: module.name in chance),
        "last layer's down": where(lambda module: is_down(module) and between((layers - 1) / layers, 1)(module)),
    }
    return {name: ranks for name, ranks in found.items() if ranks}


def is_mlp(module: StepModule) -> bool:
    return "mlp" in module.name


def is_query_or_value(module: StepModule) -> bool:
    return module.name.endswith(("q_proj", "v_proj", "c_attn"))


def is_down(module: StepModule) -> bool:
    return module.name.endswith(("down_proj", "mlp.c_proj"))


def batch(model: nn.Module, examples: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 128, (examples, tokens), generator=torch.Generator().manual_seed(0))
    device = next(model.parameters()).device
    return {"input_ids": ids.to(device), "labels": ids.to(device)}


def names(ranks: Ranks) -> Sequence[str]:
    return list(ranks)
