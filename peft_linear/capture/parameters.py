# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Parameters that are always trained but belong to no layer of a known kind: norms and embeddings in a task head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .layers import Conv1D, Layer, Linear, is_plain, layer_kind
from .recorder import recording
from .targets import base_model


def head_parameters(head: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    """The floating-point parameters of `head`, a tied one once."""
    found = {id(p): p for module in head.values() for p in module.parameters() if p.is_floating_point()}
    return list(found.values())


def split_parameters(head: Mapping[str, nn.Module], model: nn.Module) -> tuple[dict[str, Layer], list[nn.Parameter]]:
    """The layers of `head` by name, and every floating-point parameter that is not the weight or bias of one.

    A layer counts as one if its weight acts in its own forward, as x Wᵀ + b, and nowhere else in `model`.
    """
    uses = Counter(id(own) for module in base_model(model).modules() for own in _own(module))
    layers: dict[str, Layer] = {}
    for prefix, module in head.items():
        passed_by = {id(inner.out_proj) for inner in module.modules() if isinstance(inner, nn.MultiheadAttention)}
        for name, inner in module.named_modules(prefix=prefix):
            kind = layer_kind(inner)
            layer = None if kind is None else kind(name, inner)
            if layer is None or layer.weight is None or id(inner) in passed_by:
                continue
            shared = any(uses[id(own)] > 1 for own in _own(layer.base))
            if not shared and (kind not in (Linear, Conv1D) or is_plain(layer.base)):
                layers[name] = layer
    covered = {id(parameter) for layer in layers.values() for parameter in (layer.weight, layer.bias)}
    return layers, [parameter for parameter in head_parameters(head) if id(parameter) not in covered]


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module._parameters.values() if parameter is not None]


@contextmanager
def differentiable(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """`parameters`, and no others, take gradients inside the block; the model is in eval mode, and as before after."""
    with recording(model, {}):
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)


def parameter_rows(parameters: Sequence[nn.Parameter], outputs: Tensor) -> Tensor:  # (B·C, P, 1)
    """Jacobian rows of the outputs (B, C) of a batch, one backward pass for each example and output.

    Slow, and right for every kind of parameter; heads have few outside linear layers. The passes reach no further
    down than these parameters.
    """
    rows = []
    for value in outputs.reshape(-1):
        gradients = torch.autograd.grad(
            value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([gradient.reshape(-1) for gradient in gradients]).detach())
    stacked = torch.stack(rows)[:, :, None]
    return stacked if stacked.dtype in (torch.float32, torch.float64) else stacked.float()
