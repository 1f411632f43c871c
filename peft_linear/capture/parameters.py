# Copyright 2026 The peft-linear authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Parameters that are trained in full but belong to no linear map: norms, embeddings and the like in a task head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .batches import Batch, evaluate, progress_bar
from .outputs import OutputFunction
from .recorder import recording
from .targets import linear_shape


def split_parameters(head: Mapping[str, nn.Module]) -> tuple[dict[str, nn.Module], list[nn.Parameter]]:
    """The linear maps of `head` by name, and every floating-point parameter that is not the weight or bias of one."""
    linear: dict[str, nn.Module] = {}
    for prefix, module in head.items():
        for name, inner in module.named_modules(prefix=prefix):
            weight = getattr(inner, "weight", None)
            if linear_shape(inner) is not None and isinstance(weight, nn.Parameter) and weight.is_floating_point():
                linear[name] = inner
    covered = {id(parameter) for module in linear.values() for parameter in module.parameters(recurse=False)}
    other = {
        id(parameter): parameter
        for module in head.values()
        for parameter in module.parameters()
        if parameter.is_floating_point() and id(parameter) not in covered
    }
    return linear, list(other.values())


def parameter_rows(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: Sequence[Batch],
    function: OutputFunction,
    device: torch.device,
    progress: bool,
) -> Tensor:  # (n, P)
    """Jacobian rows with respect to `parameters`, one backward pass for each example and output.

    Slow, and right for every kind of parameter; heads have few that are not linear maps. The passes reach no further
    down than these parameters.
    """
    rows = []
    with recording(model, {}) as _:
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            for number, batch in enumerate(progress_bar(list(batches), progress, "other head parameters")):
                outputs = evaluate(model, batch.to(device), function, number)
                for value in outputs.reshape(-1):
                    gradients = torch.autograd.grad(
                        value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
                    )
                    rows.append(torch.cat([gradient.reshape(-1) for gradient in gradients]).detach())
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
    return torch.stack(rows)
