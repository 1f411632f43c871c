# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Parameters that are trained in full but belong to no linear map: norms, embeddings and the like in a task head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .recorder import recording
from .targets import linear_shape


def head_parameters(head: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    """The floating-point parameters of `head`, a tied one once."""
    found = {id(p): p for module in head.values() for p in module.parameters() if p.is_floating_point()}
    return list(found.values())


def split_parameters(head: Mapping[str, nn.Module]) -> tuple[dict[str, nn.Module], list[nn.Parameter]]:
    """The linear maps of `head` by name, and every floating-point parameter that is not the weight or bias of one."""
    linear: dict[str, nn.Module] = {}
    for prefix, module in head.items():
        for name, inner in module.named_modules(prefix=prefix):
            weight = getattr(inner, "weight", None)
            if linear_shape(inner) is not None and isinstance(weight, nn.Parameter) and weight.is_floating_point():
                linear[name] = inner
    covered = {id(parameter) for module in linear.values() for parameter in module.parameters(recurse=False)}
    return linear, [parameter for parameter in head_parameters(head) if id(parameter) not in covered]


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

    Slow, and right for every kind of parameter; heads have few that are not linear maps. The passes reach no further
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
