# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A small model for one oddity at a time, and the relative error of its kernels against per-example autograd."""

from __future__ import annotations

import torch
from torch import nn

from tests import reference


class TwoLayers(nn.Module):
    """`b(tanh(a(x)))` in float64, each of its layers of a given class."""

    def __init__(self, a=nn.Linear, b=nn.Linear):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.a, self.b = a(4, 6), b(6, 3)
        self.double()

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def numbers(sizes=(5, 3)):
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(size, 4, generator=generator, dtype=torch.float64)} for size in sizes]


def first_output(model, batch):
    return model(**batch)[0]


def error(kernel, parameters, model, batches, output=first_output):
    """‖K − JJᵀ‖/‖JJᵀ‖."""
    expected = reference.kernel(model, list(parameters), batches, output)
    return float((kernel - expected).norm() / expected.norm())
