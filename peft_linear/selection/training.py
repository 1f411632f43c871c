# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The planned training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..errors import CriterionError, OutputError, PeftLinearError
from .criteria import DEFAULT_NAME
from .problem import Problem


OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True)
class Training:
    """The planned training, as far as scores and predictions depend on it.

    Args:
        optimizer: "adamw" (Adam too) divides the kernel of every module by the size of its gradient, as Adam does its
            steps (`adam_preconditioned`); "sgd" takes kernels as they are, as the formulas of `CRITERIA` do. Default:
            "adamw" for "default-by-evidence", where the outputs determine a loss, and "sgd" for a criterion by name.
            Scores and the simulated training follow it; spectra, condition numbers, distances and ranks do not.
        batch_size: Examples of an optimizer step; used with optimizer="adamw" only.
        learning_rate: Of simulated training on the mean cross-entropy. Default: the largest that cannot diverge with
            all candidates, `2N/λ1(K)`; the same for every subset.
        steps: Of simulated training.

    Raises:
        CriterionError: there is no such optimizer.
        PeftLinearError: a number is out of range.
    """

    optimizer: str | None = None
    batch_size: int = 8
    learning_rate: float | None = None
    steps: int = 100

    def __post_init__(self) -> None:
        if self.optimizer is not None and self.optimizer not in OPTIMIZERS:
            raise CriterionError(f"unknown optimizer {self.optimizer!r}; there are: {', '.join(OPTIMIZERS)}")
        if self.batch_size < 1:
            raise PeftLinearError(f"batch_size of the training must be at least 1, got {self.batch_size}")
        rate = self.learning_rate
        if self.steps < 1 or (rate is not None and not 0 < rate < math.inf):
            raise PeftLinearError(
                f"simulated training needs steps ≥ 1 and a finite learning rate > 0, got steps={self.steps}, "
                f"learning_rate={rate}"
            )

    def resolved(self, criterion: str, problem: Problem) -> Training:
        """The same with its optimizer decided.

        Args:
            criterion: As it was passed, "default-by-evidence" or a name of `CRITERIA`.

        Raises:
            OutputError: the outputs do not determine the loss whose gradient Adam divides by.
        """
        if self.optimizer is None:
            adam = criterion == DEFAULT_NAME and "error" in problem.provides
            return replace(self, optimizer="adamw" if adam else "sgd")
        if self.optimizer == "adamw" and "error" not in problem.provides:
            raise OutputError(
                f"optimizer='adamw' cannot be used with {problem.what}, which determine no loss; compute kernels of "
                "labelled logits, or pass Training(optimizer='sgd')"
            )
        return self
