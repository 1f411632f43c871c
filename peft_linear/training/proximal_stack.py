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
"""The factors that one optimizer step moves, and modules of equal shapes stacked for their r×r computations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn

from ..tuners.proximal_lora.tracked import Factors


@dataclass
class Stepped:
    """One factor that the optimizer is about to step."""

    value: nn.Parameter
    anchor: Tensor | None
    learning_rate: float | Tensor
    strength: float  # λ
    fires: Tensor | None = None  # selective projection decay: 0 or 1 for this tensor
    distance: Tensor | None = None  # likewise: ‖θ−θ0‖ before the step


@dataclass
class ModuleStep:
    """The factors of one module, with what the optimizer does to each; None for one that it leaves alone."""

    factors: Factors
    a: Stepped | None
    b: Stepped | None

    @property
    def strength(self) -> float:
        """λ of the module."""
        return self.stepped()[0].strength

    def stepped(self) -> list[Stepped]:
        """The factors that the optimizer steps, A before B."""
        return [step for step in (self.a, self.b) if step is not None]


class ModuleStack:
    """Modules of equal shapes, stacked, so that their r×r computations are one call."""

    def __init__(self, modules: list[ModuleStep], adapter_name: str) -> None:
        self._modules = modules
        self._views = [matrices(m.factors.layer, m.factors.a, m.factors.b) for m in modules]
        self.a = torch.stack([a for a, _ in self._views])
        self.b = torch.stack([b for _, b in self._views])
        first = modules[0].factors.anchor
        self.a0 = self.b0 = None
        if first.a is not None and first.b is not None:
            anchors = [matrices(f.layer, f.anchor.a, f.anchor.b) for f in (m.factors for m in modules)]
            self.a0 = torch.stack([a for a, _ in anchors])
            self.b0 = torch.stack([b for _, b in anchors])
        scalings = [float(m.factors.layer.scaling[adapter_name]) for m in modules]
        self.squared_scalings = self._column([s * s for s in scalings])

    def _column(self, values: list[Any]) -> Tensor:
        plain = not any(isinstance(value, Tensor) for value in values)
        dtype = torch.float32 if self.a.device.type == "mps" else torch.float64
        column = (
            torch.tensor(values, dtype=dtype, device=self.a.device)
            if plain
            else torch.stack([torch.as_tensor(v, dtype=dtype, device=self.a.device).reshape(()) for v in values])
        )
        return column.reshape(-1, *[1] * (self.a.dim() - 1))

    @property
    def strengths(self) -> Tensor:
        """λ per module."""
        return self._column([module.strength for module in self._modules])

    def rates(self, gate: Tensor | None) -> tuple[Tensor, Tensor]:
        """ηλs² for A and for B, per module; 0 for a factor that the optimizer does not step."""
        columns = []
        for steps in ([m.a for m in self._modules], [m.b for m in self._modules]):
            rates = [0.0 if step is None else step.learning_rate for step in steps]
            column = self._column(rates) * self.squared_scalings * self.strengths
            columns.append(column if gate is None else column * gate.to(column))
        return columns[0], columns[1]

    def store(self, new_a: Tensor, new_b: Tensor) -> None:
        """Writes back into the parameters that the optimizer steps."""
        for index, (module, (a, b)) in enumerate(zip(self._modules, self._views, strict=True)):
            if module.a is not None:
                a.copy_(new_a[index])
            if module.b is not None:
                b.copy_(new_b[index])

    def unstack(self, like_a: Tensor, like_b: Tensor) -> Iterator[tuple[Stepped, Tensor]]:
        """The stepped factors with their part of a stacked quantity, shaped as the parameters."""
        for index, module in enumerate(self._modules):
            factors = module.factors
            a, b = torch.empty_like(factors.a), torch.empty_like(factors.b)
            a_view, b_view = matrices(factors.layer, a, b)
            if module.a is not None:
                a_view.copy_(like_a[index])
                yield module.a, a
            if module.b is not None:
                b_view.copy_(like_b[index])
                yield module.b, b


def stack_modules(modules: list[ModuleStep], adapter_name: str) -> Iterator[ModuleStack]:
    """Stacks the modules that have the same shapes, dtype, device and kind of anchor."""
    groups: dict[tuple, list[ModuleStep]] = {}
    for module in modules:
        a, b, anchor = module.factors.a, module.factors.b, module.factors.anchor
        product = anchor.a is not None and anchor.b is not None
        groups.setdefault((a.shape, b.shape, a.dtype, a.device, product, type(module.factors.layer)), []).append(
            module
        )
    for members in groups.values():
        yield ModuleStack(members, adapter_name)


def matrices(layer: LoraLayer, a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Views of the factors as matrices (..., r, d_in) and (..., d_out, r) whose product is the change of the weight.

    Convolution kernels are flattened over input and window; adapters of a 3-D expert parameter get a leading dimension
    of experts, those of a grouped convolution one of groups.
    """
    experts = layer.num_experts if isinstance(layer, ParamWrapper) else 1
    a_matrix = a.flatten(1)
    if experts > 1:
        return a_matrix.reshape(experts, -1, a_matrix.shape[-1]), b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
    b_matrix = b.flatten(1)
    groups = a_matrix.shape[0] // b_matrix.shape[1]
    if groups > 1:
        return a_matrix.unflatten(0, (groups, -1)), b_matrix.unflatten(0, (groups, -1))
    return a_matrix, b_matrix
