# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0

"""Slow, obviously right twins of the linear theory: explicit features, explicit refits, autograd in the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def ridge_solution(
    features: Tensor,  # (n, P)
    residual: Tensor,  # (n,)
    ridge: float,
) -> Tensor:  # (P,)
    """The minimiser of ½‖Jδ − r‖² + (λ/2)‖δ‖² from its normal equations in the parameters."""
    normal = features.T @ features + ridge * torch.eye(features.shape[1], dtype=features.dtype)
    return torch.linalg.solve(normal, features.T @ residual)


def refit_without_each_example(features: Tensor, residual: Tensor, ridge: float, block_size: int) -> Tensor:
    """Leave-one-example-out residuals by fitting N times."""
    errors = torch.empty_like(residual)
    for first in range(0, len(residual), block_size):
        keep = torch.ones(len(residual), dtype=torch.bool)
        keep[first : first + block_size] = False
        displacement = ridge_solution(features[keep], residual[keep], ridge)
        errors[~keep] = residual[~keep] - features[~keep] @ displacement
    return errors


def descend_in_parameters(
    features: Tensor,  # (n, P)
    outputs0: Tensor,  # (N, C)
    loss: Callable[[Tensor, Tensor], Tensor],  # mean over the examples it is given
    labels: Tensor,
    rates: Sequence[float],
    ridge: float = 0.0,
    batches: Sequence[Tensor] | None = None,
) -> list[Tensor]:  # displacement (P,) at every step, the start included
    """torch's SGD on mean loss + (λ/2)‖δ‖² with the gradient of autograd."""
    displacement = torch.zeros(features.shape[1], dtype=features.dtype, requires_grad=True)
    optimizer = torch.optim.SGD([displacement], lr=1.0)
    path = [displacement.detach().clone()]
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        outputs = outputs0 + (features @ displacement).view_as(outputs0)
        chosen = slice(None) if batches is None else batches[step]
        (loss(outputs[chosen], labels[chosen]) + 0.5 * ridge * displacement.square().sum()).backward()
        optimizer.step()
        path.append(displacement.detach().clone())
    return path


def adamw_in_parameters(
    features: Tensor,  # (n, P)
    outputs0: Tensor,  # (N, C)
    loss: Callable[[Tensor, Tensor], Tensor],
    labels: Tensor,
    rates: Sequence[float],
    batches: Sequence[Tensor],
    start: Tensor,  # (P,)
    pulled: int,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    ridge: float = 0.0,
    mode: str = "decoupled",
    selective: bool = False,
    clip: float | None = None,
) -> list[Tensor]:  # displacement (P,) at every step, the start included
    """AdamW (Loshchilov and Hutter, algorithm 2) and the proximal term, formula by formula."""
    theta, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    mask = torch.arange(len(start)) < pulled
    path = [theta - start]
    for step, (rate, batch) in enumerate(zip(rates, batches, strict=True), start=1):
        leaf = theta.clone().requires_grad_()
        outputs = outputs0 + (features @ (leaf - start)).view_as(outputs0)
        (gradient,) = torch.autograd.grad(loss(outputs[batch], labels[batch]), leaf)
        if clip is not None:
            gradient = gradient * min(1.0, clip / (float(gradient.norm()) + 1e-6))
        acts = not selective or float(gradient[mask] @ (theta - start)[mask]) >= 0
        if acts and mode == "coupled":
            gradient = gradient + ridge * (theta - start) * mask
        theta = theta - rate * weight_decay * theta
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        unbiased = first / (1 - betas[0] ** step), second / (1 - betas[1] ** step)
        theta = theta - rate * unbiased[0] / (unbiased[1].sqrt() + eps)
        if acts and mode == "decoupled":
            theta = torch.where(mask, start + (theta - start) / (1 + rate * ridge), theta)
        path.append(theta - start)
    return path
