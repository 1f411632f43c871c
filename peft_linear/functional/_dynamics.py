# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What all simulated trainings share: the loss of the outputs, and the loop over the steps.

Conventions as in `regression`: n = N·C rows, example-major. How outputs follow from a state, and what a step does to
it, is a `Dynamics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import KernelError
from .labels import several_labels
from .training_settings import Loss, TrainingSettings


@dataclass(frozen=True, eq=False)
class TrainingCurve:
    """What a simulated training predicts; entry i of a curve is the state after `recorded[i]` steps, 0 the start."""

    train_loss: Tensor  # (points,) float64, mean over the N examples, without the proximal term
    train_accuracy: Tensor  # (points,)
    distance: Tensor  # (points,) ‖θ_t − θ0‖; NaN where it is not known
    outputs: Tensor  # (N, C) after the last step
    learning_rates: Tensor  # (steps,)
    recorded: Tensor  # (points,) int64; every step by default, so that points = steps + 1
    coefficients: Tensor | None = None  # (n,) c with θ−θ0 = Jᵀc after the last step, of parameters that are pulled
    base_coefficients: Tensor | None = None  # (n,) the same of those that are not, where they differ
    displacement: Tensor | None = None  # (P,) θ−θ0 after the last step, where the training ran on features
    held_out_loss: Tensor | None = None  # (points,), None where no held-out examples were given
    held_out_accuracy: Tensor | None = None
    held_out_outputs: Tensor | None = None  # (M, C)

    @property
    def steps(self) -> int:
        return int(self.recorded[-1])

    def __repr__(self) -> str:
        held_out = "" if self.held_out_loss is None else f", held-out loss {_ends(self.held_out_loss)}"
        return (
            f"TrainingCurve({self.steps} steps, loss {_ends(self.train_loss)}, "
            f"accuracy {_ends(self.train_accuracy)}{held_out}, distance {self.distance[-1]:.4g})"
        )


class Dynamics(Protocol):
    """The state of a linear model in training."""

    def outputs(self, examples: Tensor | None) -> Tensor:
        """f of some training examples, in that order, or of all: (B, C) float64."""

    def held_out_outputs(self) -> Tensor:
        """(M, C) float64; called only where there are held-out examples."""

    def distance(self) -> Tensor:
        """‖θ−θ0‖, a float64 scalar."""

    def step(self, gradient: Tensor, examples: Tensor | None, learning_rate: float) -> None:
        """One step; `gradient` (B, C) is ∂R/∂f of those examples."""


class Task:
    """Loss, its gradient and the accuracy of outputs (N, C) against labels."""

    def __init__(self, loss: str | Loss, labels: Tensor, shape: torch.Size) -> None:
        self.kind = loss
        self.labels = labels
        self.targets = self.classes = None
        if loss == "cross_entropy" and several_labels(labels):
            raise KernelError(
                f"labels of shape {tuple(labels.shape)} say of every output whether it applies, and cross-entropy "
                "takes one class an example; pass loss='squared', or a loss of your own"
            )
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

    def gradient(self, outputs: Tensor, examples: Tensor | None) -> Tensor:
        """Of the mean loss of those examples, whose outputs (B, C) are given: (B, C)."""
        chosen = slice(None) if examples is None else examples
        leaf = outputs.detach().requires_grad_()
        targets = None if self.targets is None else self.targets[chosen]
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self._mean_loss(leaf, self.labels[chosen], targets), leaf)
        return gradient

    def _mean_loss(self, outputs: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        if not isinstance(self.kind, str):
            return self.kind(outputs, labels)
        assert targets is not None
        if self.kind == "squared":
            return 0.5 * (outputs - targets).square().sum(dim=1).mean()
        return F.cross_entropy(outputs, targets)


def trace(
    dynamics: Dynamics,
    task: Task,
    held_out: Task | None,
    rates: Sequence[float],  # one a step
    settings: TrainingSettings,
    device: torch.device,
) -> dict[str, Any]:
    """Runs the steps; the fields of a `TrainingCurve` that do not depend on the kind of state.

    Raises:
        KernelError: the loss is no longer finite; the step is named.
    """
    batches = None if settings.batches is None else [batch.to(device) for batch in settings.batches]
    records: dict[str, list[Tensor]] = {key: [] for key in ("loss", "accuracy", "distance", "held", "held_accuracy")}
    recorded, held_out_outputs = [], None
    for step in range(len(rates) + 1):
        outputs = None
        if step % settings.record_every == 0 or step == len(rates):
            outputs = dynamics.outputs(None)
            recorded.append(step)
            records["loss"].append(task.loss(outputs))
            if not records["loss"][-1].isfinite():
                raise KernelError(
                    f"the simulated training diverged at step {step} (learning rate {rates[max(step - 1, 0)]:.3g}); "
                    "lower it, or pass learning_rate=None for one that cannot diverge"
                )
            records["accuracy"].append(task.accuracy(outputs))
            records["distance"].append(dynamics.distance())
            if held_out is not None:
                held_out_outputs = dynamics.held_out_outputs()
                records["held"].append(held_out.loss(held_out_outputs))
                records["held_accuracy"].append(held_out.accuracy(held_out_outputs))
        if step < len(rates):
            chosen = None if batches is None else batches[step]
            if outputs is None:
                now = dynamics.outputs(chosen)
            else:
                now = outputs if chosen is None else outputs[chosen]
            dynamics.step(task.gradient(now, chosen), chosen, rates[step])
    curves = {key: torch.stack(values) for key, values in records.items() if values}
    return {
        "train_loss": curves["loss"],
        "train_accuracy": curves["accuracy"],
        "distance": curves["distance"],
        "outputs": outputs,
        "learning_rates": torch.tensor(list(rates), dtype=torch.float64),
        "recorded": torch.tensor(recorded),
        "held_out_loss": curves.get("held"),
        "held_out_accuracy": curves.get("held_accuracy"),
        "held_out_outputs": held_out_outputs,
    }


def one_hot_targets(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Float64 targets (N, C): one-hot for integer labels (N,), the labels themselves where they are floats or (N, C).

    Raises:
        KernelError: the labels fit neither (N,) integers in [0, C) nor (N, C) floats.
    """
    count, outputs = shape
    labels = labels.double() if several_labels(labels) else labels
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


def check_outputs(outputs0: Tensor) -> None:
    """Raises KernelError for outputs at θ0 that are not (N, C)."""
    if outputs0.ndim != 2:
        raise KernelError(f"outputs0 must be (N, C), got shape {tuple(outputs0.shape)}")


def _ends(curve: Tensor) -> str:
    return f"{curve[0]:.4g} -> {curve[-1]:.4g}"
