# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A small BERT whose linear layers are quantised, by a linear of our own or by bitsandbytes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers import small_models as small


class Int8Linear(nn.Module):
    """A quantised linear of no library: integers and a scale a row, no `weight` with a gradient."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.detach())
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale, self.bias)


def quantised(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = small.seeded(small.bert, dtype=dtype, hidden_size=64, intermediate_size=128)
    for name, linear in list(model.bert.encoder.named_modules()):
        if isinstance(linear, nn.Linear):
            model.bert.encoder.set_submodule(name, convert(linear, kind))
    return model.requires_grad_(False)


def convert(linear: nn.Linear, kind: str) -> nn.Module:
    if kind == "ours":
        return Int8Linear(linear)
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes has no build for this platform")
    options = {"bias": linear.bias is not None}
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False, **options)
    else:
        layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, quant_type=kind, **options)
        layer.support_avx512bf16_for_cpu = False  # else the slow twin's passes would use other, bf16 kernels
    layer.load_state_dict(linear.state_dict(), strict=False)
    return layer.to("cpu")  # quantises
