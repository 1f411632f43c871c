# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The proximal term of one adapter in one step: the penalty's gradient, the proximal operator, the projection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..functional.projection import projection_step_, projection_sums
from ..functional.proximal import (
    delta_gradient,
    delta_proximal_step,
    factor_gradient,
    factor_proximal_step_,
    inner_product,
)
from .find import AdapterStep
from .shards import local_part, total, totals
from .stack import Stepped, stack_modules


_Item = TypeVar("_Item")


def penalty_gradients(part: AdapterStep, factor: float | Tensor) -> Iterator[tuple[Stepped, Tensor]]:
    """The gradient of the penalty for each factor that is stepped, times `factor`. For `proximal_mode="coupled"`."""
    if part.adapter.config.proximal_space == "factors":
        for strength, steps in _by(part.stepped(), lambda step: step.strength):
            gradients = factor_gradient([s.part for s in steps], [s.start for s in steps], factor * strength)
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
            factor_proximal_step_([s.part for s in steps], [s.start for s in steps], step_size, gate)
        return
    for stack in stack_modules(part.pulled, part.adapter.name):
        rates_a, rates_b = stack.rates(gate)
        stack.store(*delta_proximal_step(stack.a, stack.b, stack.a0, stack.b0, rates_a, rates_b))


def risk_product(steps: list[Stepped], gradients: list[Tensor]) -> Tensor:
    """⟨∇R(θ), θ−θ0⟩ over all factors given, those of other processes included.

    Where modules have different λ, each counts with its own: Σ_m λ_m·⟨∇_m R, θ_m−θ0_m⟩ is what the pull does to the
    risk.
    """
    weighted = len({step.strength for step in steps}) > 1

    def here(members: list[int]) -> Tensor:
        products = []
        for strength, chosen in _by(members, lambda i: steps[i].strength):
            product = inner_product(
                [local_part(gradients[i]) for i in chosen],
                [steps[i].part for i in chosen],
                [steps[i].start for i in chosen],
            )
            products.append(strength * product if weighted else product)
        return products[0] if len(products) == 1 else torch.stack([p.to(products[0].device) for p in products]).sum()

    return total([step.value for step in steps], here)


def prepare_projection(part: AdapterStep, gradients: list[Tensor]) -> None:
    """Selective projection decay: notes before the step which tensors fire, and where they are."""
    steps = part.stepped()
    squares, products = projection_sums(
        [s.part for s in steps], [s.start for s in steps], [local_part(gradient) for gradient in gradients]
    )
    values = [step.value for step in steps]
    squares, products = totals(squares, values), totals(products, values)
    for step, square, product in zip(steps, squares, products, strict=True):
        step.fires, step.distance = (product > 0).to(product), square


def apply_projection(part: AdapterStep, gate: Tensor | None) -> Tensor:
    """Selective projection decay after the step; returns the fraction of the tensors that fired."""
    steps, fires, before = part.stepped(), [], []
    for step in steps:
        assert step.fires is not None and step.distance is not None
        fires.append(step.fires if gate is None else step.fires * gate.to(step.fires))
        before.append(step.distance)
    values, starts = [s.part for s in steps], [s.start for s in steps]
    after = totals(projection_sums(values, starts)[0], [s.value for s in steps])
    projection_step_(values, starts, fires, before, after, [s.strength for s in steps])
    return torch.stack([fired.to(fires[0]) for fired in fires]).mean()


def _rate_and_strength(step: Stepped) -> tuple:
    rate = step.learning_rate
    return (id(rate) if isinstance(rate, Tensor) else rate, step.strength)


def _by(items: list[_Item], key: Callable[[_Item], Any]) -> list[tuple[Any, list[_Item]]]:
    groups: dict[Any, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.items())
