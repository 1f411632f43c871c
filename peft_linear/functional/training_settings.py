# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""How a simulated training is to be run: steps, learning rate, loss, batches and the proximal term, checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..errors import KernelError


Loss = Callable[[Tensor, Tensor], Tensor]
LearningRate = float | Sequence[float] | Callable[[int], float]
ProximalMode = Literal["coupled", "decoupled"]

SMOOTHNESS = {"cross_entropy": 0.5, "squared": 1.0}  # largest curvature of one example's loss in its outputs


@dataclass(frozen=True)
class TrainingSettings:
    """The keywords that `simulate_training`, `simulate_adam` and `train_on_features` share.

    Args:
        steps: number of optimizer steps.
        learning_rate: a number, a sequence with one number a step, or a function of the step number (from 0).
        loss: "cross_entropy", `½‖f−y‖²` ("squared"; integer labels become one-hot targets), or a function
            `(outputs (B, C), labels) -> scalar` whose gradient autograd takes; its *mean* over the examples is meant.
        ridge: λ of the proximal term `(λ/2)‖θ−θ0‖²`, in loss per squared parameter.
        batches: one index tensor a step, for mini-batches in a given order; the gradient is then the mean over the
            batch. Default: all examples in every step.
        proximal_mode: "coupled", the term's gradient `λ(θ−θ0)` is added before the step, or "decoupled", its proximal
            operator `θ ← θ0 + (θ−θ0)/(1+ηλ)` follows the step, as ProximalLoRA does. Default: that of the function.
        selective: pull only at steps at which `⟨∇R, θ−θ0⟩ ≥ 0` over the parameters that are pulled (arXiv 2602.08239,
            eq. 8), as ProximalLoRA does by default.
        record_every: number of steps between two entries of the curves; start and end are always recorded.

    Raises:
        KernelError: numbers out of range, an unknown loss or mode, too few batches for the steps.
    """

    steps: int
    learning_rate: LearningRate | None = None
    loss: str | Loss = "cross_entropy"
    ridge: float = 0.0
    batches: Sequence[Tensor] | None = None
    proximal_mode: ProximalMode | None = None
    selective: bool = False
    record_every: int = 1

    def __post_init__(self) -> None:
        if self.steps < 0 or not self.ridge >= 0:
            raise KernelError(f"steps and ridge must not be negative, got steps={self.steps} and ridge={self.ridge}")
        if self.batches is not None and len(self.batches) < self.steps:
            raise KernelError(f"{len(self.batches)} batches for {self.steps} steps; pass one index tensor a step")
        if self.record_every < 1:
            raise KernelError(f"record_every must be at least 1, got {self.record_every}")
        if self.proximal_mode not in (None, "coupled", "decoupled"):
            raise KernelError(f"proximal_mode must be 'coupled' or 'decoupled', got {self.proximal_mode!r}")
        if isinstance(self.loss, str) and self.loss not in SMOOTHNESS:
            raise KernelError(f"unknown loss {self.loss!r}; use one of {sorted(SMOOTHNESS)} or your own function")

    @property
    def rates(self) -> list[float]:
        """One learning rate a step.

        Raises:
            KernelError: there is none, or a sequence has too few.
        """
        if self.learning_rate is None:
            raise KernelError("this training needs a learning rate; pass learning_rate=")
        if callable(self.learning_rate):
            return [float(self.learning_rate(step)) for step in range(self.steps)]
        if isinstance(self.learning_rate, (int, float)):
            return [float(self.learning_rate)] * self.steps
        if len(self.learning_rate) < self.steps:
            raise KernelError(f"{len(self.learning_rate)} learning rates for {self.steps} steps; pass one a step")
        return [float(rate) for rate in self.learning_rate[: self.steps]]
