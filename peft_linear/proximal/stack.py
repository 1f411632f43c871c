# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The factors that one optimizer step moves, and modules of equal shapes stacked for their r×r computations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn

from ..tuners.proximal_lora.tracked import Factors
from .shards import local_part, part_of, whole


@dataclass
class Stepped:
    """One factor that the optimizer is about to step."""

    value: nn.Parameter
    anchor: Tensor | None
    learning_rate: float | Tensor
    strength: float  # λ
    fires: Tensor | None = None  # selective projection decay: 0 or 1 for this tensor
    distance: Tensor | None = None  # likewise: ‖θ−θ0‖² before the step

    @property
    def part(self) -> Tensor:
        """The factor, or what this process holds of it."""
        return local_part(self.value)

    @property
    def start(self) -> Tensor | None:
        """The anchor of `part`."""
        return None if self.anchor is None else part_of(self.anchor, self.value)


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
    """Modules of equal shapes, stacked, so that their r×r computations are one call. Sharded factors are gathered."""

    def __init__(self, modules: list[ModuleStep], adapter_name: str) -> None:
        self._modules = modules
        self._whole = [(whole(m.factors.a), whole(m.factors.b)) for m in modules]
        self._views = [matrices(m.factors.layer, *pair) for m, pair in zip(modules, self._whole, strict=True)]
        self.a = torch.stack([a for a, _ in self._views])
        self.b = torch.stack([b for _, b in self._views])
        starts = [pair for pair in (anchor_matrices(module.factors) for module in modules) if pair is not None]
        self.a0 = torch.stack([a for a, _ in starts]) if starts else None
        self.b0 = torch.stack([b for _, b in starts]) if starts else None
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
            for step, view, new, full in zip(
                (module.a, module.b), (a, b), (new_a, new_b), self._whole[index], strict=True
            ):
                if step is not None:
                    view.copy_(new[index])
                    if full is not step.value:  # a gathered copy
                        step.part.copy_(part_of(full, step.value))

    def unstack(self, like_a: Tensor, like_b: Tensor) -> Iterator[tuple[Stepped, Tensor]]:
        """The stepped factors with what belongs to them of a stacked quantity, shaped as the parts held here."""
        for index, module in enumerate(self._modules):
            a, b = (torch.empty_like(full) for full in self._whole[index])
            a_view, b_view = matrices(module.factors.layer, a, b)
            if module.a is not None:
                a_view.copy_(like_a[index])
                yield module.a, part_of(a, module.a.value)
            if module.b is not None:
                b_view.copy_(like_b[index])
                yield module.b, part_of(b, module.b.value)


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


def anchor_matrices(factors: Factors) -> tuple[Tensor, Tensor] | None:
    """The anchors of both factors as `matrices`; None where one of them is zero, and so their product."""
    a, b = factors.anchor.a, factors.anchor.b
    return None if a is None or b is None else matrices(factors.layer, whole(a), whole(b))
