# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What a criterion may look at besides the kernel: outputs, labels and the numbers derived from them.

Convention: N examples, C outputs, n = N·C rows, example-major. `residual` is `r0 = y − f_θ0(X)`, `error` is
`e = ∂R/∂f` at θ0 with R the *mean* training loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import OutputError
from ..functional.simulation import one_hot_targets
from ..functional.spectrum import Spectrum
from ..kernels.module_kernels import ModuleKernels


# What the outputs have: a target to regress to ("residual"), a loss whose gradient in them is known ("error"), and
# enough to simulate training with cross-entropy ("logits"). Every kind has a kernel, which needs nothing.
PROVIDES: dict[str, frozenset[str]] = {
    "logits": frozenset({"residual", "error", "logits"}),
    "log_likelihood": frozenset({"residual", "error"}),
    "loss": frozenset({"residual", "error"}),
    "margin": frozenset({"residual", "error"}),
    "label_logit": frozenset(),
    "random_projection": frozenset(),
}


@dataclass(frozen=True, eq=False)
class Problem:
    """The learning problem at θ0, and how its training is to be simulated.

    Args:
        outputs: (N, C) float64, f at θ0.
        labels: (N,) classes or (N, C) targets; None where there are none.
        output_kind: As `ModuleKernels.output_kind`.
        ridge: λ of the ridge regression (unit of the kernel's eigenvalues).
        learning_rate: Of the simulated gradient descent on the mean cross-entropy, the same for every subset.
        steps: Of that descent.
        folds: Of its cross-validation over examples.
        seed: Of the folds.
        rounding: `eps` and `entry_error` of the kernels' spectra; see `Spectrum.from_gram`.
    """

    outputs: Tensor
    labels: Tensor | None
    output_kind: str
    ridge: float
    learning_rate: float = 1.0
    steps: int = 100
    folds: int = 4
    seed: int = 0
    rounding: tuple[float | None, float] = (None, 0.0)

    @classmethod
    def of(cls, kernels: ModuleKernels, ridge: float, **settings: float | int) -> Problem:
        """The problem that `kernels` were computed on."""
        given: dict[str, Any] = {"rounding": kernels.rounding, **settings}
        return cls(kernels.outputs, kernels.labels, kernels.output_kind, ridge, **given)

    def spectrum(self, gram: Tensor) -> Spectrum:
        """Eigenvalues of a kernel of this problem; what its precision leaves below 0 counts as rounding. O(n³)."""
        eps, entry_error = self.rounding
        return Spectrum.from_gram(gram, eps=eps, entry_error=entry_error)

    @property
    def num_examples(self) -> int:
        return self.outputs.shape[0]

    @property
    def num_outputs(self) -> int:
        return self.outputs.shape[1]

    @property
    def provides(self) -> frozenset[str]:
        """What criteria can ask of these outputs; see `PROVIDES`. Logits without labels provide nothing."""
        if self.output_kind == "logits":
            if self.labels is None:
                return frozenset()
            if self.labels.is_floating_point():
                return frozenset({"residual", "error"})
        return PROVIDES.get(self.output_kind, frozenset())

    @cached_property
    def targets(self) -> Tensor:
        """(N, C) float64 that the regression aims at.

        One-hot labels (float labels as they are) for logits; 0, certainty, for log-likelihoods and losses; 1 for
        margins.

        Raises:
            OutputError: these outputs have no natural target, or labels are missing or no classes of the outputs.
        """
        if "residual" not in self.provides:
            raise OutputError(f"{self.what} have no target to regress to; compute kernels of labelled logits instead")
        if self.output_kind == "logits":
            return self._one_hot()
        return torch.full_like(self.outputs, 1.0 if self.output_kind == "margin" else 0.0)

    @cached_property
    def residual(self) -> Tensor:
        """(n,) float64, `r0 = y − f_θ0(X)`."""
        return (self.targets - self.outputs).reshape(-1)

    @cached_property
    def error(self) -> Tensor:
        """(n,) float64, `e = ∂R/∂f` of the mean loss R at θ0.

        Cross-entropy of logits: `(softmax(f) − onehot(y))/N`; with float labels, `½‖f − y‖²`: `(f − y)/N`. Negative
        log-likelihood: `−1/N`; a loss: `1/N`; the logistic loss of a margin m: `−σ(−m)/N`.

        Raises:
            OutputError: the loss cannot be read from these outputs.
        """
        if "error" not in self.provides:
            raise OutputError(f"{self.what} do not determine a loss; compute kernels of labelled logits instead")
        if self.output_kind == "logits" and "logits" in self.provides:
            error = self.outputs.softmax(dim=1) - self._one_hot()
        elif self.output_kind == "logits":
            error = self.outputs - self._one_hot()
        elif self.output_kind == "margin":
            error = -torch.sigmoid(-self.outputs)
        else:
            error = torch.full_like(self.outputs, 1.0 if self.output_kind == "loss" else -1.0)
        return error.reshape(-1) / self.num_examples

    @property
    def what(self) -> str:
        """These outputs, in words."""
        if self.output_kind == "logits":
            return "logits without labels" if self.labels is None else "logits with float labels"
        return f"outputs of kind {self.output_kind!r}"

    def _one_hot(self) -> Tensor:
        assert self.labels is not None
        try:
            return one_hot_targets(self.labels, self.outputs.shape)
        except ValueError as error:
            raise OutputError(f"the kernels' labels do not belong to their logits: {error}") from error
