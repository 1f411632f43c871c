# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A tiny network with LoRA or ProximalLoRA, and training loops on it, with and without the reference."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from peft_linear.functional.second_moment import SecondMoment
from peft_linear.tuners.proximal_lora import ProximalLoraConfig, ProximalReference, set_proximal_reference
from tests.helpers.reference_proximal import ReferenceProximal, lora_parameters


TARGETS = ["0", "2"]
ALPHA, RANK = 6, 3


def adapted(config, seed=1):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))
    torch.manual_seed(seed)
    return get_peft_model(base, config)


def lora(**kwargs):
    return adapted(LoraConfig(target_modules=TARGETS, r=RANK, lora_alpha=ALPHA, **kwargs))


def proximal(lam=1.0, seed=1, **kwargs):
    config = ProximalLoraConfig(target_modules=TARGETS, r=RANK, lora_alpha=ALPHA, proximal_lambda=lam, **kwargs)
    model = adapted(config, seed)
    if config.proximal_space == "function":
        set_proximal_reference(model, statistics())
    return model


def statistics():
    """A reference of the network, of its two layers."""
    generator = torch.Generator().manual_seed(11)

    def random(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    moments = {name: SecondMoment(random(d), random(2, d)) for name, d in zip(TARGETS, (5, 7), strict=True)}
    own = dict(zip(TARGETS, TARGETS, strict=True))
    return ProximalReference(moments, own, {"0": 0.3, "2": 1.2}, dict.fromkeys(TARGETS, 0.5), 100, 2)


def metric(name):
    """C, dense, and g in units of λ, of the module of a factor."""
    reference = statistics()
    module = name.split(".lora_A")[0].rpartition(".")[2]
    moment = reference.moment(module)
    return torch.diag(moment.diagonal) + moment.factors.T @ moment.factors, reference.scales[module] / reference.unit(
        TARGETS
    )


def batches(count=12):
    torch.manual_seed(7)
    return [(torch.randn(6, 5), torch.randint(0, 4, (6,))) for _ in range(count)]


def risk(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def groups(model):
    """Two learning rates, as LoRA+ has them."""
    named = lora_parameters(model)
    return [
        {"params": [p for n, p in named.items() if "lora_A" in n], "lr": 0.05},
        {"params": [p for n, p in named.items() if "lora_B" in n], "lr": 0.2},
    ]


def train(model, optimizer, *, clip=None, reference=None, data=None):
    for batch in data or batches():
        optimizer.zero_grad()
        risk(model, batch).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if reference:
            reference.before_step()
        rates = reference.rates(optimizer) if reference else None
        optimizer.step()
        if reference:
            reference.after_step(rates)
    return model


def reference_run(make, *, lam=1.0, space="factors", mode="decoupled", selective=False, **kwargs):
    model = lora()
    reference = ReferenceProximal(
        model, lam=lam, space=space, mode=mode, selective=selective, scaling=ALPHA / RANK, metric=metric
    )
    return train(model, make(groups(model)), reference=reference, **kwargs), reference


def assert_same(model, other, tolerance=1e-12):
    mine, theirs = lora_parameters(model), lora_parameters(other)
    assert list(mine) == list(theirs)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=tolerance, atol=tolerance)
