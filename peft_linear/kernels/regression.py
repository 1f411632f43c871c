# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`fit_kernel_regression`: linearised fine-tuning with squared loss, solved instead of trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from ..errors import KernelError, OutputError
from ..functional.labels import several_labels
from ..functional.outputs import recorded_output
from ..functional.regression import (
    dual_distance,
    leave_one_out_residuals,
    predict_ridge,
    select_ridge,
    solve_ridge,
)
from ..functional.simulation import one_hot_targets
from .module_kernels import ModuleKernels


@dataclass(frozen=True, eq=False)
class KernelRegression:
    """The minimiser of `½‖f̄(X) − Y‖² + (λ/2)‖θ−θ0‖²` over the linearised model, in its dual form.

    `θ−θ0 = Jᵀα`, `f̄(x) = f_θ0(x) + K(x, X)α`, training residual `Y − f̄(X) = λα`. All tensors are float64 on the CPU;
    α as a vector of n = N·C rows is `alpha.reshape(-1)`, example-major like the kernel.
    """

    names: tuple[str, ...]  # the modules that are trained
    ridge: float  # λ, same unit as the kernel's eigenvalues (outputs² per parameter²)
    alpha: Tensor  # (N, C) dual coefficients
    targets: Tensor  # (N, C) Y
    outputs0: Tensor  # (N, C) f_θ0(X)
    leave_one_out: Tensor  # (N, C) prediction for each example by the regression on all others
    distance: float  # ‖θ−θ0‖ = sqrt(αᵀKα)
    distances: Mapping[
        str, float
    ]  # the same, of each module's parameters alone; squares add up, with "base" for the head
    labels: Tensor | None = None  # (N,) int64, where the targets are one-hot

    def __post_init__(self) -> None:
        object.__setattr__(self, "distances", MappingProxyType(dict(self.distances)))

    @property
    def residual(self) -> Tensor:
        """Training residual `Y − f̄(X) = λα`, (N, C)."""
        return self.ridge * self.alpha

    @property
    def predictions(self) -> Tensor:
        """Outputs `f̄(X)` on the training examples, (N, C)."""
        return self.targets - self.residual

    @property
    def loss(self) -> float:
        """Mean over the examples of `½‖f̄(x_i) − y_i‖²`."""
        return _half_mean_square(self.residual)

    @property
    def leave_one_out_loss(self) -> float:
        """The same of the leave-one-example-out predictions: an estimate of the loss on new examples."""
        return _half_mean_square(self.targets - self.leave_one_out)

    @property
    def accuracy(self) -> float | None:
        """Share of training examples whose largest output is their label's; None without integer labels."""
        return self._accuracy(self.predictions)

    @property
    def leave_one_out_accuracy(self) -> float | None:
        """The same of the leave-one-example-out predictions."""
        return self._accuracy(self.leave_one_out)

    def predict(
        self,
        cross_gram: Tensor,  # (M·C, N·C)   K(x, X)
        outputs0: Tensor,  # (M, C)   f_θ0(x)
    ) -> Tensor:  # (M, C) float64
        """Outputs on M new examples.

        Raises:
            KernelError: the shapes do not belong together.
        """
        return predict_ridge(cross_gram, self.alpha, outputs0)

    def __repr__(self) -> str:
        scores = f"loss {self.loss:.4g} (leave-one-out {self.leave_one_out_loss:.4g})"
        if self.accuracy is not None:
            scores += f", accuracy {self.accuracy:.3f} (leave-one-out {self.leave_one_out_accuracy:.3f})"
        return (
            f"KernelRegression({len(self.names)} modules, {len(self.alpha)} examples, ridge={self.ridge:.4g}, "
            f"{scores}, distance {self.distance:.4g})"
        )

    def _accuracy(self, outputs: Tensor) -> float | None:
        if self.labels is None:
            return None
        return float((outputs.argmax(dim=1) == self.labels).double().mean())


def fit_kernel_regression(
    kernels: ModuleKernels,
    labels: Tensor | None = None,  # (N,) integers, or (N, C) float targets
    ridge: float | None = None,
    names: Iterable[str] | None = None,
) -> KernelRegression:
    """Fine-tunes the linearised model by solving: kernel ridge regression with the NTK of the chosen modules.

    The answer is the point that training the linearised model on the *sum* over examples of `½‖f̄(x_i) − y_i‖²` plus
    `(ridge/2)‖θ−θ0‖²` converges to; with a *mean* over the N examples, that of a proximal term `ridge/N`.
    Source: *Linearization Explains Fine-Tuning in Large Language Models* (arXiv 2602.08239), sections 3 and 4. O(n³).

    Args:
        kernels: blocks at θ0.
        labels: class numbers (targets are then one-hot) or the targets themselves; default: the kernels' own labels.
        ridge: λ; None takes the one of least leave-one-example-out error (`functional.regression.select_ridge`).
        names: the modules to train; default all.

    Raises:
        OutputError: there are no labels, or they do not fit the outputs.
        KernelError: the kernel is not positive definite at this ridge.
        TargetError: a name has no kernel.
    """
    chosen = kernels.names if names is None else tuple([names] if isinstance(names, str) else names)
    labels = kernels.labels if labels is None else torch.as_tensor(labels)
    if labels is not None and several_labels(labels):
        labels = labels.double()
    if labels is None:
        raise OutputError("the kernels hold no labels; pass labels= (class numbers or targets of the outputs' shape)")
    if not labels.is_floating_point() and "logits" not in recorded_output(kernels.output_kind).provides(labels):
        raise OutputError(
            f"class numbers are targets of logits only, and these kernels are of {kernels.output_kind!r}; "
            f"pass float targets of shape {tuple(kernels.outputs.shape)}"
        )
    try:
        targets = one_hot_targets(labels, kernels.outputs.shape)
    except KernelError as error:
        raise OutputError(str(error)) from error
    gram, block = kernels.subset(chosen), kernels.num_outputs
    residual = (targets - kernels.outputs).reshape(-1)
    if ridge is None:
        ridge = select_ridge(gram, residual, block)
    alpha = solve_ridge(gram, residual, ridge)
    left_out = leave_one_out_residuals(gram, residual, ridge, block).view_as(targets)
    parts = {name: kernels[name] for name in chosen} | ({"base": kernels.base} if kernels.base.any() else {})
    return KernelRegression(
        names=chosen,
        ridge=float(ridge),
        alpha=alpha.view_as(targets),
        targets=targets,
        outputs0=kernels.outputs,
        leave_one_out=targets - left_out,
        distance=dual_distance(gram, alpha),
        distances={name: dual_distance(block, alpha) for name, block in parts.items()},
        labels=None if labels.is_floating_point() else labels,
    )


def _half_mean_square(residual: Tensor) -> float:
    return float(0.5 * residual.square().sum(dim=1).mean())
