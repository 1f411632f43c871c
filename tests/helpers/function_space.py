# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A random reference for the modules of an adapter, and the same as dense matrices for the reference by hand."""

from __future__ import annotations

import torch

from peft_linear.functional.second_moment import SecondMoment
from peft_linear.tuners.proximal_lora import ProximalReference, set_proximal_reference
from peft_linear.tuners.proximal_lora.state import find_adapters


def with_reference(model):
    """Gives the model a reference if its adapter needs one."""
    if model.peft_config["default"].proximal_space == "function":
        set_proximal_reference(model, statistics(model))
    return model


def statistics(model):
    """The same for all models of the same modules."""
    generator = torch.Generator().manual_seed(11)

    def random(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    widths = {name: a.shape[1] for name, _, a, _ in find_adapters(model)[0].layers()}
    moments = {name: SecondMoment(random(width), random(2, width)) for name, width in widths.items()}
    scales = {name: float(random(1)) + 0.1 for name in widths}
    return ProximalReference(moments, {n: n for n in widths}, scales, dict.fromkeys(widths, 0.5), 100, 2)


def metric(reference):
    """{name of a factor A: (C, dense; g in units of λ)} as a function."""
    unit = reference.unit(reference.names)

    def of(name):
        module = name.split(".lora_A")[0].removeprefix("base_model.model.")
        moment = reference.moment(module)
        return torch.diag(moment.diagonal) + moment.factors.T @ moment.factors, reference.scales[module] / unit

    return of
