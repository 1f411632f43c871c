# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Factors as matrices whose product is the change of the weight, and modules of equal shapes stacked.

In delta space and in function space the proximal term needs r×r matrices of each module; stacking makes them one call
for many modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor

from ..functional.second_moment import SecondMoment
from ..tuners.proximal_lora.tracked import Factors, TrackedAdapter
from .precision import whole_weights, write_weights
from .shards import part_of, whole
from .updates import FactorUpdate, ModuleUpdate


class ModuleStack:
    """Modules of equal shapes, stacked along a new first dimension. Sharded factors are gathered."""

    def __init__(self, modules: list[ModuleUpdate], adapter: TrackedAdapter) -> None:
        self._modules = modules
        self._whole = [(whole_weights(m.lora.a, m.a), whole_weights(m.lora.b, m.b)) for m in modules]
        self._views = [matrices(m.lora.layer, *pair) for m, pair in zip(modules, self._whole, strict=True)]
        self.a = torch.stack([a for a, _ in self._views])
        self.b = torch.stack([b for _, b in self._views])
        anchors = [pair for pair in (anchor_matrices(m.lora) for m in modules) if pair is not None]
        self.a0 = torch.stack([a for a, _ in anchors]) if anchors else None
        self.b0 = torch.stack([b for _, b in anchors]) if anchors else None
        self.moment: SecondMoment | None = None  # of the modules' inputs, in function space
        scales = [1.0] * len(modules)
        if adapter.config.proximal_space == "function":
            self.moment, scales = adapter.moments(tuple(m.lora.name for m in modules), self.a)
        scalings = [float(m.lora.layer.scaling[adapter.name]) for m in modules]
        self.weights = self._column([s * s * scale for s, scale in zip(scalings, scales, strict=True)])

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
        """ηλs²g for A and for B, per module (g = 1 in delta space); 0 for a factor that is not updated."""
        columns = []
        for factors in ([m.a for m in self._modules], [m.b for m in self._modules]):
            rates = [0.0 if factor is None else factor.learning_rate for factor in factors]
            column = self._column(rates) * self.weights * self.strengths
            column = column.clamp(max=torch.finfo(column.dtype).max ** 0.25)  # λ → ∞ without infinity times zero
            columns.append(column if gate is None else column * gate.to(column))
        return columns[0], columns[1]

    def store(self, new_a: Tensor, new_b: Tensor) -> None:
        """Writes new values, stacked, into the parameters that the optimizer updates."""
        changed = []
        for index, module in enumerate(self._modules):
            for factor, view, new, full in zip(
                (module.a, module.b), self._views[index], (new_a, new_b), self._whole[index], strict=True
            ):
                if factor is not None:
                    view.copy_(new[index])
                    if full is not factor.parameter or factor.place is not None:  # gathered, in more bits, or copied
                        changed.append((factor, part_of(full, factor.parameter)))
        if changed:
            write_weights([factor for factor, _ in changed], [part for _, part in changed])

    def unstack(self, like_a: Tensor, like_b: Tensor) -> Iterator[tuple[FactorUpdate, Tensor]]:
        """The updated factors, each with its slice of a stacked quantity, shaped as the factor's local shard."""
        for index, module in enumerate(self._modules):
            a, b = (torch.empty_like(full) for full in self._whole[index])
            a_view, b_view = matrices(module.lora.layer, a, b)
            if module.a is not None:
                a_view.copy_(like_a[index])
                yield module.a, part_of(a, module.a.parameter)
            if module.b is not None:
                b_view.copy_(like_b[index])
                yield module.b, part_of(b, module.b.parameter)


def stack_modules(modules: list[ModuleUpdate], adapter: TrackedAdapter) -> Iterator[ModuleStack]:
    """Stacks the modules that have the same shapes, dtype, device and kind of anchor."""
    groups: dict[tuple, list[ModuleUpdate]] = {}
    for module in modules:
        _, layer, a, b, anchor = module.lora
        product = anchor.a is not None and anchor.b is not None
        groups.setdefault((a.shape, b.shape, a.dtype, a.device, product, type(layer)), []).append(module)
    for members in groups.values():
        yield ModuleStack(members, adapter)


def matrices(layer: LoraLayer, a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Views of the factors as matrices (..., r, d_in) and (..., d_out, r) whose product is the change of the weight.

    Convolution kernels are flattened over input channels and window; a 3-D parameter of experts gets a leading
    dimension of experts, a grouped convolution one of groups.
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


def anchor_matrices(factors: Factors) -> tuple[Tensor, Tensor] | None:
    """The anchors of both factors as `matrices`; None where one of them, and so their product, is zero."""
    a, b = factors.anchor.a, factors.anchor.b
    return None if a is None or b is None else matrices(factors.layer, whole(a), whole(b))
