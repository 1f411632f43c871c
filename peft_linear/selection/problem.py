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

from ..functional.outputs import Output, recorded_output
from ..functional.spectrum import Spectrum
from ..kernels.module_kernels import ModuleKernels


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
        key: (N,) float64, a number for each example that depends on the example and not on its position: folds and
            halves are drawn from the examples in its order. None: in the order of positions.
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
    key: Tensor | None = None

    @classmethod
    def of(cls, kernels: ModuleKernels, ridge: float, **settings: float | int) -> Problem:
        """The problem that `kernels` were computed on."""
        given: dict[str, Any] = {"rounding": kernels.rounding, "key": example_key(kernels), **settings}
        return cls(kernels.outputs, kernels.labels, kernels.output_kind, ridge, **given)

    @property
    def order(self) -> Tensor:
        """(N,) int64, the examples by `key`."""
        return torch.arange(self.num_examples) if self.key is None else self.key.argsort(stable=True)

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
    def output(self) -> Output:
        """The kind of these outputs."""
        return recorded_output(self.output_kind)

    @property
    def provides(self) -> frozenset[str]:
        """What criteria can ask of these outputs: "residual", "error", "logits". Without labels, logits have none."""
        return self.output.provides(self.labels)

    @property
    def what(self) -> str:
        """These outputs, in words."""
        return self.output.what(self.labels)

    @cached_property
    def targets(self) -> Tensor:
        """(N, C) float64 that the regression aims at, such as one-hot labels; see the kinds in `functional.outputs`.

        Raises:
            OutputError: these outputs have no natural target, or labels are missing or no classes of the outputs.
        """
        return self.output.targets(self.outputs, self.labels)

    @cached_property
    def residual(self) -> Tensor:
        """(n,) float64, `r0 = y − f_θ0(X)`."""
        return (self.targets - self.outputs).reshape(-1)

    @cached_property
    def error(self) -> Tensor:
        """(n,) float64, `e = ∂R/∂f` of the mean loss R at θ0, such as `(softmax(f) − onehot(y))/N` for logits.

        Raises:
            OutputError: the loss cannot be read from these outputs.
        """
        return self.output.error(self.outputs, self.labels).reshape(-1) / self.num_examples


def example_key(kernels: ModuleKernels) -> Tensor:  # (N,) float64
    """A number for each example, from its outputs, labels and kernel: fixed random multiples of them, added up.

    Each is in units of its largest value, so that rounding, as by other batches, changes the order of examples only
    where they are all but equal, and kernels preconditioned by an optimizer have the same. Lazy
    kernels are not read for it.
    """
    count = kernels.num_examples
    columns = [kernels.outputs.double().reshape(count, -1)]
    if kernels.labels is not None:
        columns.append(kernels.labels.double().reshape(count, -1))
    if not kernels.lazy:
        diagonals = [block.diagonal().double() for block in (kernels.base, *kernels.blocks.values())]
        relative = [diagonal / diagonal.abs().max().clamp_min(1e-300) for diagonal in diagonals]
        columns.append(torch.stack(relative).sum(dim=0).reshape(count, -1))
    scaled = torch.cat([column / column.abs().max().clamp_min(1e-300) for column in columns], dim=1)
    weights = torch.randn(scaled.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (scaled * weights).sum(dim=1)
