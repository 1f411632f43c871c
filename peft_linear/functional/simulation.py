# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Gradient descent on the linearised model, run on the values of the function instead of the network.

Conventions as in `regression`: n = N·C rows, example-major; everything in float64 on the Gram matrix's device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError
from ._checks import check_cross_gram, checked_gram, largest_eigenvalue
from ._dynamics import Task, TrainingCurve, check_outputs, one_hot_targets, trace
from .training_settings import SMOOTHNESS, LearningRate, Loss, ProximalMode, TrainingSettings


__all__ = [
    "SMOOTHNESS",
    "LearningRate",
    "Loss",
    "ProximalMode",
    "TrainingCurve",
    "TrainingSettings",
    "one_hot_targets",
    "simulate_training",
]

HeldOut = tuple[Tensor, Tensor, Tensor]  # cross_gram (m, n), outputs0 (M, C), labels


def simulate_training(
    gram: Tensor,  # (n, n)
    outputs0: Tensor,  # (N, C)   f_θ0(X)
    labels: Tensor,  # (N,) integer classes, or (N, C) float targets
    *,
    held_out: HeldOut | None = None,
    base: Tensor | None = None,  # (n, n), with `held_out` (n + m, n)
    **settings: Any,
) -> TrainingCurve:
    """Gradient descent on `R(θ) + (λ/2)‖θ−θ0‖²` for the linearised model, run on n numbers instead of the network.

    R is the *mean* loss over the examples. The parameters stay in the span of the Jacobian's rows, `θ−θ0 = Jᵀc`, and a
    step of size η is

        c ← (1 − ηλ) c − η ∂R/∂f,      f = f_θ0 + K c,      f(x) = f_θ0(x) + K(x, X) c,      ‖θ−θ0‖² = cᵀKc,

    exactly the step in the parameters (without a ridge: `f ← f − (η/N) K (softmax(f) − onehot(y))`); decoupled it is
    `c ← (c − η ∂R/∂f)/(1 + ηλ)`, the same up to O(η²). Because R is a mean, squared loss converges to
    `solve_ridge(gram, residual, N * ridge)`. O(n² + n·m) a step that is recorded, O(b·n) one that is not, b being the
    rows of its batch.

    Args:
        held_out: examples that are not trained on; their loss and accuracy are recorded beside.
        base: the part of `gram`, and below it the part of the cross Gram matrix, that belongs to parameters which λ
            does not pull (`kernels.base`, the task head: a ProximalLoRA adapter pulls its factors only). They get
            coefficients of their own. Default: all are pulled.
        settings: those of `TrainingSettings`, such as `steps`, `learning_rate`, `loss` and `ridge`. Without a learning
            rate it is `1/(λ1·s/B + ridge)` with λ1 the largest eigenvalue, B the (smallest) batch size and s = 1/2 for
            cross-entropy, 1 for squared loss: the inverse of the objective's largest curvature, which never diverges.
            `proximal_mode` is "coupled" by default.

    Raises:
        KernelError: shapes disagree, labels or settings are out of range, a learning rate is missing for a loss of
            your own, or the training diverges (the step is named).
    """
    given = TrainingSettings(**settings)
    check_outputs(outputs0)
    descent = Descent(gram, outputs0, held_out, base, given)
    if given.learning_rate is not None:
        return descent.run(labels, given.rates)
    smallest = min(map(len, given.batches)) if given.batches else len(outputs0)
    return descent.run(labels, [_safe_rate(gram.detach().double(), given.loss, given.ridge, smallest)] * given.steps)


class Descent:
    """c, and c0 of the parameters that are not pulled, in `f = f_θ0 + (K − K0) c + K0 c0`.

    Raises:
        KernelError: shapes disagree.
    """

    def __init__(
        self,
        gram: Tensor,  # (n, n)
        outputs0: Tensor,  # (N, C)
        held_out: HeldOut | None,
        base: Tensor | None,  # (n + m, n)
        settings: TrainingSettings,
    ) -> None:
        self.gram, start = checked_gram(gram, outputs0.reshape(-1))
        self.start = start.view(outputs0.shape)
        self.settings = settings
        self.ridge, self.mode = settings.ridge, settings.proximal_mode or "coupled"
        self.c = torch.zeros_like(start)
        self.cross: Tensor | None = None
        self.held_start: Tensor | None = None
        self.held_labels: Tensor | None = None
        if held_out is not None:
            cross, held_start, self.held_labels = (tensor.detach().to(self.gram.device) for tensor in held_out)
            check_cross_gram(cross, len(start), held_start)
            self.cross, self.held_start = cross.double(), held_start.double()
        self.base: Tensor | None = None
        self.base_cross: Tensor | None = None
        self.c0: Tensor | None = None
        if base is not None:
            self._separate(base)

    def _separate(self, base: Tensor) -> None:
        n, m = len(self.gram), 0 if self.cross is None else len(self.cross)
        if base.shape != (n + m, n):
            raise KernelError(
                f"base has shape {tuple(base.shape)}, expected {(n + m, n)}: the rows of the training examples"
                + (" and, below, of the held-out ones" if m else "")
            )
        base = base.detach().to(self.gram.device).double()
        self.base, self.gram = base[:n], self.gram - base[:n]
        self.c0 = torch.zeros_like(self.c)
        if self.cross is not None:
            self.base_cross, self.cross = base[n:], self.cross - base[n:]

    def run(self, labels: Tensor, rates: list[float]) -> TrainingCurve:
        """The whole training, with one learning rate a step."""
        device, loss = self.gram.device, self.settings.loss
        task, held_task = Task(loss, labels.to(device), self.start.shape), None
        if self.held_start is not None and self.held_labels is not None:
            held_task = Task(loss, self.held_labels, self.held_start.shape)
        fields = trace(self, task, held_task, rates, self.settings, device)
        return TrainingCurve(**fields, coefficients=self.c, base_coefficients=self.c0)

    def outputs(self, examples: Tensor | None) -> Tensor:
        start, rows = self.start, self._rows(self.gram, examples)
        start = start if examples is None else start[examples]
        movement = rows @ self.c
        if self.base is not None and self.c0 is not None:
            movement = movement + self._rows(self.base, examples) @ self.c0
        return start + movement.view_as(start)

    def held_out_outputs(self) -> Tensor:
        assert self.cross is not None and self.held_start is not None
        movement = self.cross @ self.c
        if self.base_cross is not None and self.c0 is not None:
            movement = movement + self.base_cross @ self.c0
        return self.held_start + movement.view_as(self.held_start)

    def distance(self) -> Tensor:
        square = self.c @ (self.gram @ self.c)
        if self.base is not None and self.c0 is not None:
            square = square + self.c0 @ (self.base @ self.c0)
        return square.clamp_min(0.0).sqrt()

    def step(self, gradient: Tensor, examples: Tensor | None, learning_rate: float) -> None:
        pull = learning_rate * self.ridge if self._acts(gradient, examples) else 0.0
        change = learning_rate * self._spread(gradient, examples)
        self.c = (1 - pull) * self.c - change if self.mode == "coupled" else (self.c - change) / (1 + pull)
        if self.c0 is not None:
            self.c0 = self.c0 - change

    def _acts(self, gradient: Tensor, examples: Tensor | None) -> bool:
        """Whether the proximal term acts at this step: always, or if `⟨∇R, θ−θ0⟩ ≥ 0`."""
        if not (self.settings.selective and self.ridge):
            return self.ridge > 0
        return float(gradient.reshape(-1) @ (self._rows(self.gram, examples) @ self.c)) >= 0

    def _rows(self, matrix: Tensor, examples: Tensor | None) -> Tensor:
        if examples is None:
            return matrix
        return matrix.view(len(self.start), -1, matrix.shape[1])[examples].flatten(0, 1)

    def _spread(self, gradient: Tensor, examples: Tensor | None) -> Tensor:
        """(n,), zero outside of the batch."""
        if examples is None:
            return gradient.reshape(-1)
        return torch.zeros_like(self.start).index_add_(0, examples, gradient).reshape(-1)


def _safe_rate(gram: Tensor, loss: str | Loss, ridge: float, batch_size: int) -> float:
    if not isinstance(loss, str):
        raise KernelError("learning_rate=None needs a loss of known curvature; pass a learning rate with your own")
    curvature = largest_eigenvalue(gram) * SMOOTHNESS[loss] / batch_size + ridge
    return 1.0 / curvature if curvature > 0 else 1.0
