# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Training of the linearised model on its features, the Jacobian's rows: exact for every torch optimizer.

Adam divides the gradient coordinate by coordinate, so its path does not follow from the Gram matrix `K = J Jᵀ`; with
the rows of J themselves the linear model is a matrix, and its training is run here without the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import KernelError
from ._dynamics import Task, TrainingCurve, check_outputs, trace
from .proximal import factor_proximal_step_, inner_product
from .training_settings import TrainingSettings


def train_on_features(
    features: Tensor,  # (n, P) float32 or float64   J, the rows ∂f/∂θ at θ0
    outputs0: Tensor,  # (N, C)   f_θ0(X)
    labels: Tensor,  # (N,) integer classes, or (N, C) float targets
    *,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    optimizer_arguments: Mapping[str, Any] | None = None,
    pulled: int | None = None,
    start: Tensor | None = None,  # (P,)   θ0
    max_grad_norm: float | None = None,
    held_out: tuple[Tensor, Tensor, Tensor] | None = None,  # features (m, P), outputs0 (M, C), labels
    **settings: Any,
) -> TrainingCurve:
    """Trains `f = f_θ0 + J(θ−θ0)` with a torch optimizer, by matrix products instead of forward and backward passes.

    What fine-tuning does in the linearised model, step by step: gradient `Jᵀ ∂R/∂f` of the mean loss R over the batch,
    clipping, the optimizer's own step, and the proximal term as a ProximalLoRA adapter applies it. Exact up to
    rounding for optimizers that treat every coordinate alike (SGD, Adam, AdamW, …), not for those that depend on a
    parameter's shape (Adafactor, Muon). In the features' dtype, outputs and losses in float64. O(b·P) a step for a
    batch of b rows, O((n + m)·P) for an entry of the curves.

    Args:
        optimizer, optimizer_arguments: called as `optimizer(parameters, lr=…, **optimizer_arguments)`. AdamW's
            `weight_decay` is torch's 0.01 unless it is given here (the HF Trainer's is 0).
        pulled: λ acts on the first so many of the P parameters (`JacobianFeatures` has the task head last, which a
            ProximalLoRA adapter does not pull). Default: on all.
        start: θ0, which weight decay depends on; default zeros, as LoRA's B.
        max_grad_norm: clips the gradient's norm over all parameters, as the HF Trainer does (at 1.0, its default).
        settings: those of `TrainingSettings`, a learning rate among them. `proximal_mode` is "decoupled" by default.

    Returns:
        TrainingCurve with `displacement` θ−θ0 (P,) and without `coefficients`.

    Raises:
        KernelError: shapes disagree, values that are not finite, or as `simulate_training`.
    """
    features = _checked(features, outputs0, "features")
    given = TrainingSettings(**settings)
    check_outputs(outputs0)
    device, width = features.device, features.shape[1]
    pulled = width if pulled is None else pulled
    if not 0 <= pulled <= width:
        raise KernelError(f"pulled={pulled} is not a number of parameters between 0 and {width}")
    if start is not None and start.shape != (width,):
        raise KernelError(f"start has shape {tuple(start.shape)}, expected ({width},): a number a column")
    task = Task(given.loss, labels.to(device), outputs0.shape)
    held_features = held_outputs = held_task = None
    if held_out is not None:
        held_features, held_outputs, held_labels = (tensor.to(device) for tensor in held_out)
        held_features, held_outputs = _checked(held_features, held_outputs, "held-out features"), held_outputs.double()
        if held_features.shape[1] != width:
            raise KernelError(f"held-out features have {held_features.shape[1]} columns, the others {width}")
        held_task = Task(given.loss, held_labels, held_outputs.shape)
    rates = given.rates
    start = features.new_zeros(width) if start is None else start.detach().to(features)
    parameters = [nn.Parameter(part.clone()) for part in (start[:pulled], start[pulled:])]
    first_rate = rates[0] if rates else 0.0
    stepper = _Stepper(
        parameters=parameters,
        start=start,
        optimizer=optimizer(parameters, lr=first_rate, **(optimizer_arguments or {})),
        settings=given,
        max_grad_norm=max_grad_norm,
    )
    dynamics = _FeatureModel(features, outputs0.detach().to(device).double(), held_features, held_outputs, stepper)
    fields = trace(dynamics, task, held_task, rates, given, device)
    return TrainingCurve(**fields, displacement=stepper.displacement().double())


class _Stepper:
    """θ in two pieces, those that λ pulls and the others, and the step of an optimizer with the proximal term."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        start: Tensor,
        optimizer: torch.optim.Optimizer,
        settings: TrainingSettings,
        max_grad_norm: float | None,
    ) -> None:
        self.parameters, self.start, self.optimizer = parameters, start, optimizer
        self.settings, self.max_grad_norm = settings, max_grad_norm

    def displacement(self) -> Tensor:
        return torch.cat([parameter.detach() for parameter in self.parameters]) - self.start

    @torch.no_grad()
    def step(self, gradient: Tensor, learning_rate: float) -> None:
        pulled, free = self.parameters
        anchor = self.start[: len(pulled)]
        pulled.grad, free.grad = gradient[: len(pulled)], gradient[len(pulled) :]
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        ridge, coupled = self.settings.ridge, self.settings.proximal_mode == "coupled"
        acts = ridge > 0
        if acts and self.settings.selective:
            acts = bool(inner_product([pulled.grad], [pulled], [anchor]) >= 0)
        if acts and coupled:
            pulled.grad = pulled.grad + ridge * (pulled - anchor)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        if acts and not coupled:
            factor_proximal_step_([pulled], [anchor], learning_rate * ridge)


class _FeatureModel:
    """`f = f_θ0 + J(θ−θ0)` of training and held-out examples."""

    def __init__(
        self,
        features: Tensor,
        start: Tensor,
        held_features: Tensor | None,
        held_start: Tensor | None,
        stepper: _Stepper,
    ) -> None:
        self.features, self.start = features, start
        self.held_features, self.held_start = held_features, held_start
        self.stepper = stepper

    def outputs(self, examples: Tensor | None) -> Tensor:
        start = self.start if examples is None else self.start[examples]
        return start + (self._rows(examples) @ self.stepper.displacement()).double().view_as(start)

    def held_out_outputs(self) -> Tensor:
        assert self.held_features is not None and self.held_start is not None
        return self.held_start + (self.held_features @ self.stepper.displacement()).double().view_as(self.held_start)

    def distance(self) -> Tensor:
        return self.stepper.displacement().double().norm()

    def step(self, gradient: Tensor, examples: Tensor | None, learning_rate: float) -> None:
        rows = self._rows(examples)
        self.stepper.step(gradient.reshape(-1).to(rows) @ rows, learning_rate)

    def _rows(self, examples: Tensor | None) -> Tensor:
        if examples is None:
            return self.features
        return self.features.view(len(self.start), -1, self.features.shape[1])[examples].flatten(0, 1)


def _checked(features: Tensor, outputs0: Tensor, what: str) -> Tensor:
    if features.ndim != 2 or len(features) != outputs0.numel():
        raise KernelError(
            f"{what} have shape {tuple(features.shape)}, but outputs of shape {tuple(outputs0.shape)} need "
            f"{outputs0.numel()} rows, one an output of an example"
        )
    if features.dtype not in (torch.float32, torch.float64):
        raise KernelError(f"{what} must be float32 or float64, got {features.dtype}; convert them")
    for name, tensor in ((what, features), (f"the outputs of {what}", outputs0)):
        if not bool(tensor.isfinite().all()):
            raise KernelError(f"{name}: {int((~tensor.isfinite()).sum())} entries are NaN or infinite")
    return features.detach().contiguous()
