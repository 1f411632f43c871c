# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A small BERT with ProximalLoRA, and a few steps of training."""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import nn

from peft_linear.tuners.proximal_lora import ProximalLoraConfig
from tests.helpers import small_models


OPTIONS = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
BATCH = {"input_ids": torch.arange(1, 13).reshape(2, 6), "labels": torch.tensor([0, 2])}


def base(seed=0):
    torch.manual_seed(seed)
    return small_models.bert().float().eval()


def proximal(lam=2.0, seed=1, **kwargs):
    model = base()
    torch.manual_seed(seed)
    return get_peft_model(model, ProximalLoraConfig(proximal_lambda=lam, **OPTIONS | kwargs))


def train(model, steps=3):
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**BATCH).loss.backward()
        optimizer.step()
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(**BATCH).logits


def trained(**kwargs):
    return train(proximal(**kwargs))
