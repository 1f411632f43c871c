# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A tiny network with ProximalLoRA, and steps with gradients of zero, in which the term acts alone."""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import nn

from peft_linear.tuners.proximal_lora import ProximalLoraConfig
from tests.helpers.function_space import with_reference
from tests.helpers.reference_proximal import lora_parameters


SGD = torch.optim.SGD


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))


def config(lam=2.0, **kwargs):
    options = {"target_modules": ["0", "2"], "r": 2, "lora_alpha": 4, "proximal_selective": False}
    return ProximalLoraConfig(proximal_lambda=lam, **options | kwargs)


def proximal(**kwargs):
    return with_reference(get_peft_model(mlp(), config(**kwargs)))


def backward(model):
    model(torch.ones(3, 5)).square().sum().backward()


def displaced(model, amount=0.5):
    with torch.no_grad():
        for p in lora_parameters(model).values():
            p.add_(amount)
    return model


def step_at_rest(model, rate=0.5):
    """A step with gradients of zero: all changes are the term's."""
    optimizer = SGD(lora_parameters(model).values(), lr=rate)
    for p in lora_parameters(model).values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return model
