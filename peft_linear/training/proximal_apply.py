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
"""The proximal term of one adapter in one step: the penalty's gradient, the proximal operator, the projection."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..functional.projection import projection_conditions, projection_step_
from ..functional.proximal import delta_gradient, delta_proximal_step, factor_gradient, factor_proximal_step_
from .proximal_find import AdapterStep
from .proximal_stack import Stepped, stack_modules


def penalty_gradients(part: AdapterStep, factor: float | Tensor) -> Iterator[tuple[Stepped, Tensor]]:
    """The gradient of the penalty for each factor that is stepped, times `factor`. For `proximal_mode="coupled"`."""
    if part.adapter.config.proximal_space == "factors":
        for strength, steps in _by(part.stepped(), lambda step: step.strength):
            gradients = factor_gradient([s.value for s in steps], [s.anchor for s in steps], factor * strength)
            yield from zip(steps, gradients, strict=True)
        return
    for stack in stack_modules(part.pulled, part.adapter.name):
        weights = stack.squared_scalings * stack.strengths * factor
        yield from stack.unstack(*delta_gradient(stack.a, stack.b, stack.a0, stack.b0, weights))


def apply_decoupled(part: AdapterStep, gate: Tensor | None) -> None:
    """The proximal operator, with each factor's learning rate; `gate` (0 or 1) stops it."""
    if part.adapter.config.proximal_space == "factors":
        for _, steps in _by(part.stepped(), _rate_and_strength):
            step_size = steps[0].learning_rate * steps[0].strength
            factor_proximal_step_([s.value for s in steps], [s.anchor for s in steps], step_size, gate)
        return
    for stack in stack_modules(part.pulled, part.adapter.name):
        rates_a, rates_b = stack.rates(gate)
        stack.store(*delta_proximal_step(stack.a, stack.b, stack.a0, stack.b0, rates_a, rates_b))


def prepare_projection(part: AdapterStep, gradients: list[Tensor]) -> None:
    """Selective projection decay: notes before the step which tensors fire, and where they are."""
    steps = part.stepped()
    fires, distances = projection_conditions(gradients, [s.value for s in steps], [s.anchor for s in steps])
    for step, fired, distance in zip(steps, fires, distances, strict=True):
        step.fires, step.distance = fired, distance


def apply_projection(part: AdapterStep, gate: Tensor | None) -> Tensor:
    """Selective projection decay after the step; returns the fraction of the tensors that fired."""
    steps, fires, distances = part.stepped(), [], []
    for step in steps:
        assert step.fires is not None and step.distance is not None
        fires.append(step.fires if gate is None else step.fires * gate.to(step.fires))
        distances.append(step.distance)
    projection_step_(
        [s.value for s in steps], [s.anchor for s in steps], fires, distances, [s.strength for s in steps]
    )
    return torch.stack([fired.to(fires[0]) for fired in fires]).mean()


def _rate_and_strength(step: Stepped) -> tuple:
    rate = step.learning_rate
    return (id(rate) if isinstance(rate, Tensor) else rate, step.strength)


def _by(steps: list[Stepped], key: Any) -> list[tuple[Any, list[Stepped]]]:
    groups: dict[Any, list[Stepped]] = {}
    for step in steps:
        groups.setdefault(key(step), []).append(step)
    return list(groups.items())
