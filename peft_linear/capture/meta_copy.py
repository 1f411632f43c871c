# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A model's structure without its numbers: a copy on the meta device, without adapters, to count operations on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .layers import Linear
from .targets import base_model


_HOOKS = tuple(
    name for name, value in vars(nn.Module()).items() if name.endswith(("_hooks", "_with_kwargs", "_always_called"))
)


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the base model whose parameters and buffers have shapes only; nothing in it requires a gradient.

    Adapters and trained copies are left out, and quantised linear layers are ordinary ones in the precision in which
    the model computes. Hooks stay where they are: they would be called with tensors that hold no numbers.
    """
    root = base_model(model)
    memo: dict[int, Any] = {}
    for module in root.modules():
        memo |= {id(hooks): type(hooks)() for name, hooks in vars(module).items() if name in _HOOKS}
        for parameter in module._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = nn.Parameter(_shape_of(parameter), requires_grad=False)
        for tensor in (*module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor):
                memo[id(tensor)] = _shape_of(tensor)
    copied = copy.deepcopy(root, memo)
    _replace(copied, compute_dtype(root))
    return copied.eval()


def compute_dtype(model: nn.Module) -> torch.dtype:
    """That of the first parameter of floating-point numbers."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _shape_of(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="meta")


def _replace(parent: nn.Module, dtype: torch.dtype) -> None:
    for name, child in list(parent.named_children()):
        if isinstance(child, BaseTunerLayer):
            child = child.get_base_layer()
        elif isinstance(child, AuxiliaryTrainingWrapper):
            child = child.original_module
        if Linear.accepts(child) and (layer := Linear(name, child)).weight is None:
            child = nn.Linear(*layer.shape, bias=layer.bias is not None, device="meta", dtype=dtype)
            child.requires_grad_(False)
        setattr(parent, name, child)
        _replace(child, dtype)
