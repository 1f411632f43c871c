# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The proximal term on the factors of one adapter: the penalty's gradient, the proximal operator, the projection."""

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
from .delta_space import stack_modules
from .precision import read_anchors, read_weights, write_weights
from .shards import local_part, total, totals
from .updates import AdapterUpdate, FactorUpdate


_Item = TypeVar("_Item")


def penalty_gradients(update: AdapterUpdate, weight: float | Tensor) -> Iterator[tuple[FactorUpdate, Tensor]]:
    """Each updated factor with the gradient of its penalty times `weight`. For `proximal_mode="coupled"`."""
    if update.adapter.config.proximal_space == "factors":
        for strength, factors in _grouped(update.factors(), lambda factor: factor.strength):
            values = read_weights(factors)
            gradients = factor_gradient(values, read_anchors(factors, values), weight * strength)
            yield from zip(factors, gradients, strict=True)
        return
    for stack in stack_modules(update.active_modules, update.adapter):
        weights = stack.weights * stack.strengths * weight
        yield from stack.unstack(*delta_gradient(stack.a, stack.b, stack.a0, stack.b0, weights, stack.moment))


def apply_proximal_operator(update: AdapterUpdate, gate: Tensor | None) -> None:
    """The proximal operator, with each factor's learning rate; a `gate` of 0 leaves the factors unchanged."""
    if update.adapter.config.proximal_space == "factors":
        for _, factors in _grouped(update.factors(), _rate_and_strength):
            values, step = read_weights(factors), factors[0].learning_rate * factors[0].strength
            factor_proximal_step_(values, read_anchors(factors, values), step, gate)
            write_weights(factors, values)
        return
    for stack in stack_modules(update.active_modules, update.adapter):
        rates_a, rates_b = stack.rates(gate)
        stack.store(*delta_proximal_step(stack.a, stack.b, stack.a0, stack.b0, rates_a, rates_b, stack.moment))


def risk_inner_product(factors: list[FactorUpdate], gradients: list[Tensor]) -> Tensor:
    """⟨∇R(θ), θ−θ0⟩ over all given factors, summed over the processes that hold shards of them.

    Where modules have different λ it is Σ_m λ_m·⟨∇_m R, θ_m−θ0_m⟩: the rate at which the proximal term changes the
    risk.
    """
    weighted = len({factor.strength for factor in factors}) > 1

    def local_sum(members: list[int]) -> Tensor:
        products = []
        for strength, chosen in _grouped(members, lambda i: factors[i].strength):
            values = read_weights([factors[i] for i in chosen])
            anchors = read_anchors([factors[i] for i in chosen], values)
            product = inner_product([local_part(gradients[i]) for i in chosen], values, anchors)
            products.append(strength * product if weighted else product)
        return products[0] if len(products) == 1 else torch.stack([p.to(products[0].device) for p in products]).sum()

    return total([factor.parameter for factor in factors], local_sum)


def prepare_projection(factors: list[FactorUpdate], gradients: list[Tensor]) -> None:
    """Selective Projection Decay before the step: records which tensors fire, and their distance from the anchor."""
    values = read_weights(factors)
    local_gradients = [local_part(gradient) for gradient in gradients]
    squares, products = projection_sums(values, read_anchors(factors, values), local_gradients)
    parameters = [factor.parameter for factor in factors]
    squares, products = totals(squares, parameters), totals(products, parameters)
    for factor, square, product in zip(factors, squares, products, strict=True):
        factor.fires, factor.squared_distance = (product > 0).to(product), square


def apply_projection(factors: list[FactorUpdate], gate: Tensor | None) -> Tensor:
    """Selective Projection Decay after the step; returns the fraction of the tensors that fired."""
    fires, before = [], []
    for factor in factors:
        assert factor.fires is not None and factor.squared_distance is not None
        fires.append(factor.fires if gate is None else factor.fires * gate.to(factor.fires))
        before.append(factor.squared_distance)
    values = read_weights(factors)
    anchors = read_anchors(factors, values)
    after = totals(projection_sums(values, anchors)[0], [factor.parameter for factor in factors])
    projection_step_(values, anchors, fires, before, after, [factor.strength for factor in factors])
    write_weights(factors, values)
    return torch.stack([fired.to(fires[0]) for fired in fires]).mean()


def _rate_and_strength(factor: FactorUpdate) -> tuple:
    rate = factor.learning_rate
    return (id(rate) if isinstance(rate, Tensor) else rate, factor.strength)


def _grouped(items: list[_Item], key: Callable[[_Item], Any]) -> list[tuple[Any, list[_Item]]]:
    groups: dict[Any, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.items())
