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

"""Gradient descent on the linearised model, run on the values of the function instead of the network.

Conventions as in `regression`: n = N·C rows, example-major; everything in float64 on the Gram matrix's device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import KernelError
from ._checks import check_cross_gram, checked_gram, largest_eigenvalue


Loss = Callable[[Tensor, Tensor], Tensor]
LearningRate = float | Sequence[float] | Callable[[int], float]

SMOOTHNESS = {"cross_entropy": 0.5, "squared": 1.0}  # largest curvature of one example's loss in its outputs


@dataclass(frozen=True, eq=False)
class TrainingCurve:
    """What `simulate_training` predicts. Index 0 of a curve is the start, index t the state after t steps."""

    train_loss: Tensor  # (steps+1,) float64, mean over the N examples, without the proximal term
    train_accuracy: Tensor  # (steps+1,)
    distance: Tensor  # (steps+1,) ‖θ_t − θ0‖
    outputs: Tensor  # (N, C) after the last step
    coefficients: Tensor  # (n,) c with θ−θ0 = Jᵀc after the last step
    learning_rates: Tensor  # (steps,)
    held_out_loss: Tensor | None = None  # (steps+1,), None where no held-out examples were given
    held_out_accuracy: Tensor | None = None
    held_out_outputs: Tensor | None = None  # (M, C)

    @property
    def steps(self) -> int:
        return len(self.train_loss) - 1

    def __repr__(self) -> str:
        held_out = "" if self.held_out_loss is None else f", held-out loss {_ends(self.held_out_loss)}"
        return (
            f"TrainingCurve({self.steps} steps, loss {_ends(self.train_loss)}, "
            f"accuracy {_ends(self.train_accuracy)}{held_out}, distance {self.distance[-1]:.4g})"
        )


def simulate_training(
    gram: Tensor,  # (n, n)
    outputs0: Tensor,  # (N, C)   f_θ0(X)
    labels: Tensor,  # (N,) integer classes, or (N, C) float targets
    *,
    learning_rate: LearningRate | None = None,
    steps: int,
    loss: str | Loss = "cross_entropy",
    ridge: float = 0.0,
    held_out: tuple[Tensor, Tensor, Tensor] | None = None,  # cross_gram (m, n), outputs0 (M, C), labels
    batches: Sequence[Tensor] | None = None,
) -> TrainingCurve:
    """Gradient descent on `R(θ) + (λ/2)‖θ−θ0‖²` for the linearised model, run on n numbers instead of the network.

    R is the *mean* over the examples of `loss`: cross-entropy, `½‖f−y‖²` ("squared"; integer labels become one-hot
    targets), or a function `(outputs (B, C), labels) -> scalar` whose gradient autograd takes. The parameters stay in
    the span of the Jacobian's rows, `θ−θ0 = Jᵀc`, and a step of size η is

        c ← (1 − ηλ) c − η ∂R/∂f,      f = f_θ0 + K c,      f(x) = f_θ0(x) + K(x, X) c,      ‖θ−θ0‖² = cᵀKc,

    exactly the step in the parameters (without a ridge: `f ← f − (η/N) K (softmax(f) − onehot(y))`). Because R is a
    mean, squared loss converges to `solve_ridge(gram, residual, N * ridge)`. O(n² + n·m) a step.

    Args:
        learning_rate: a number, a sequence with one number a step, or a function of the step number (from 0). None
            takes `1/(λ1·s/B + ridge)` with λ1 the largest eigenvalue, B the (smallest) batch size and s = 1/2 for
            cross-entropy, 1 for squared loss: the inverse of the objective's largest curvature, which never diverges.
        ridge: λ, in loss per squared parameter.
        batches: one index tensor a step, for mini-batches in a given order; the gradient is then the mean over the
            batch. Default: all examples in every step.

    Raises:
        KernelError: shapes disagree, labels out of range, a learning rate is missing for a loss of your own, too few
            learning rates or batches for the steps, or the training diverges (the step is named).
    """
    gram, start = checked_gram(gram, outputs0.reshape(-1))
    if outputs0.ndim != 2:
        raise KernelError(f"outputs0 must be (N, C), got shape {tuple(outputs0.shape)}")
    if steps < 0 or not ridge >= 0:
        raise KernelError(f"steps and ridge must not be negative, got steps={steps} and ridge={ridge}")
    if batches is not None and len(batches) < steps:
        raise KernelError(f"{len(batches)} batches for {steps} steps; pass one index tensor a step")
    shape = outputs0.shape
    task = _Task(loss, labels.to(gram.device), shape)
    if held_out is not None:
        cross, held_start, held_labels = (tensor.to(gram.device) for tensor in held_out)
        held_task = _Task(loss, held_labels, held_start.shape)
        check_cross_gram(cross, len(start), held_start)
        cross, held_start = cross.double(), held_start.double()
    rates = _rates(learning_rate, steps, gram, loss, ridge, shape[0], batches)

    coefficients = torch.zeros_like(start)
    records: dict[str, list[Tensor]] = {key: [] for key in ("loss", "accuracy", "distance", "held", "held_accuracy")}
    for step in range(steps + 1):
        movement = gram @ coefficients
        outputs = (start + movement).view(shape)
        records["loss"].append(task.loss(outputs))
        if not records["loss"][-1].isfinite():
            raise KernelError(
                f"the simulated training diverged at step {step} (learning rate {rates[max(step - 1, 0)]:.3g}); "
                "lower it, or pass learning_rate=None for one that cannot diverge"
            )
        records["accuracy"].append(task.accuracy(outputs))
        records["distance"].append((coefficients @ movement).clamp_min(0.0).sqrt())
        if held_out is not None:
            held_outputs = held_start + (cross @ coefficients).view_as(held_start)
            records["held"].append(held_task.loss(held_outputs))
            records["held_accuracy"].append(held_task.accuracy(held_outputs))
        if step < steps:
            gradient = task.gradient(outputs, None if batches is None else batches[step].to(gram.device))
            coefficients = (1 - rates[step] * ridge) * coefficients - rates[step] * gradient.reshape(-1)
    curves = {key: torch.stack(values) for key, values in records.items() if values}
    return TrainingCurve(
        train_loss=curves["loss"],
        train_accuracy=curves["accuracy"],
        distance=curves["distance"],
        outputs=outputs,
        coefficients=coefficients,
        learning_rates=torch.tensor(rates, dtype=torch.float64),
        held_out_loss=curves.get("held"),
        held_out_accuracy=curves.get("held_accuracy"),
        held_out_outputs=held_outputs if held_out is not None else None,
    )


class _Task:
    """Loss, its gradient and the accuracy of outputs (N, C) against labels."""

    def __init__(self, loss: str | Loss, labels: Tensor, shape: torch.Size) -> None:
        if isinstance(loss, str) and loss not in SMOOTHNESS:
            raise KernelError(f"unknown loss {loss!r}; use one of {sorted(SMOOTHNESS)} or your own function")
        self.kind = loss
        self.labels = labels
        self.targets = self.classes = None
        if isinstance(loss, str):
            self.targets = one_hot_targets(labels, shape)
            self.classes = self.targets.argmax(dim=1) if shape[1] > 1 else None
        elif labels.shape == shape[:1] and not labels.is_floating_point():
            self.classes = labels

    def loss(self, outputs: Tensor) -> Tensor:
        return self._mean_loss(outputs, self.labels, self.targets).detach().double()

    def accuracy(self, outputs: Tensor) -> Tensor:
        if self.classes is None:
            return outputs.new_tensor(torch.nan)
        return (outputs.argmax(dim=1) == self.classes).double().mean()

    def gradient(self, outputs: Tensor, batch: Tensor | None) -> Tensor:  # (N, C), zero outside of the batch
        chosen = slice(None) if batch is None else batch
        leaf = outputs[chosen].detach().requires_grad_()
        targets = None if self.targets is None else self.targets[chosen]
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self._mean_loss(leaf, self.labels[chosen], targets), leaf)
        if batch is None:
            return gradient
        return torch.zeros_like(outputs).index_add_(0, batch, gradient)

    def _mean_loss(self, outputs: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        if not isinstance(self.kind, str):
            return self.kind(outputs, labels)
        assert targets is not None
        if self.kind == "squared":
            return 0.5 * (outputs - targets).square().sum(dim=1).mean()
        return F.cross_entropy(outputs, targets)


def one_hot_targets(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Float64 targets (N, C): one-hot for integer labels (N,), the labels themselves where they are floats.

    Raises:
        KernelError: the labels fit neither (N,) integers in [0, C) nor (N, C) floats.
    """
    count, outputs = shape
    if labels.is_floating_point():
        if labels.numel() != count * outputs or (outputs > 1 and labels.ndim != 2):
            raise KernelError(f"float labels must be targets of shape {tuple(shape)}, got {tuple(labels.shape)}")
        return labels.double().reshape(count, outputs)
    if tuple(labels.shape) != (count,):
        raise KernelError(f"integer labels must have shape ({count},), got {tuple(labels.shape)}")
    if outputs == 1 or int(labels.min()) < 0 or int(labels.max()) >= outputs:
        raise KernelError(
            f"integer labels in [{int(labels.min())}, {int(labels.max())}] are no classes of {outputs} outputs; pass "
            "labels in [0, C), or float targets of the outputs' shape"
        )
    return F.one_hot(labels.long(), outputs).double()


def _rates(
    learning_rate: LearningRate | None,
    steps: int,
    gram: Tensor,
    loss: str | Loss,
    ridge: float,
    examples: int,
    batches: Sequence[Tensor] | None,
) -> list[float]:
    if learning_rate is None:
        if not isinstance(loss, str):
            raise KernelError("learning_rate=None needs a loss of known curvature; pass a learning rate with your own")
        smallest = examples if not batches else min(len(batch) for batch in batches)
        curvature = largest_eigenvalue(gram) * SMOOTHNESS[loss] / smallest + ridge
        return [1.0 / curvature if curvature > 0 else 1.0] * steps
    if callable(learning_rate):
        return [float(learning_rate(step)) for step in range(steps)]
    if isinstance(learning_rate, (int, float)):
        return [float(learning_rate)] * steps
    if len(learning_rate) < steps:
        raise KernelError(f"{len(learning_rate)} learning rates for {steps} steps; pass one a step")
    return [float(rate) for rate in learning_rate[:steps]]


def _ends(curve: Tensor) -> str:
    return f"{curve[0]:.4g} -> {curve[-1]:.4g}"
