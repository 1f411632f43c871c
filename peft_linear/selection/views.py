# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The kernels of one recommendation in three forms: as computed, preconditioned by the optimizer, for scoring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import KernelError
from ..functional.regression import select_ridge
from ..functional.simulation import SMOOTHNESS
from ..kernels.module_kernels import ModuleKernels
from .criteria import View
from .heads import over_heads
from .preconditioning import adam_preconditioned
from .problem import Problem
from .training import Training


# The default ridge is searched within these multiples of the mean eigenvalue tr(K)/n, and is the plain mean where
# the outputs have nothing to regress to.
RIDGE_RANGE = (1e-3, 10.0)
RIDGE_STEPS = 17


@dataclass(frozen=True, eq=False)
class Views:
    """What each part of a recommendation is computed from.

    Args:
        plain: Kernels as they were computed: spectra, condition numbers, ridge regression, ranks.
        optimizer: Preconditioned by the planned optimizer: simulated training. The same as `plain` for SGD.
        scoring: What the criterion is evaluated on: `optimizer`, or the combination over several heads.
        training: The planned training, with its optimizer and learning rate decided.
        heads: The kernels that `scoring` combines; () where there is one head.
    """

    plain: View
    optimizer: View
    scoring: View
    training: Training
    heads: tuple[ModuleKernels, ...] = ()

    @classmethod
    def of(
        cls,
        kernels: ModuleKernels,
        heads: Sequence[ModuleKernels],
        training: Training,  # resolved
        ridge: float | None,
        seed: int,
    ) -> Views:
        """One eigendecomposition for the default learning rate, and `default_ridge` where there is no ridge.

        Raises:
            KernelError: a kernel is zero or not finite.
        """
        plain = View(kernels, Problem.of(kernels, default_ridge(kernels) if ridge is None else ridge, seed=seed))
        trained = _preconditioned(kernels, training)
        rate = training.learning_rate or largest_stable_rate(trained)
        problem = replace(plain.problem, learning_rate=rate, steps=training.steps)
        if trained is not kernels:
            relative = 1.0 if ridge is None else ridge / default_ridge(kernels)
            problem = replace(problem, ridge=default_ridge(trained) * relative)
        optimizer = View(trained, problem)
        scoring = optimizer
        if heads:
            combined = over_heads([_preconditioned(each, training) for each in heads])
            scoring = View(combined, replace(problem, outputs=combined.outputs, output_kind=combined.output_kind))
        return cls(plain, optimizer, scoring, replace(training, learning_rate=rate), tuple(heads))


def check_ridge(ridge: float | None) -> float | None:
    """Raises `KernelError` unless the ridge is above 0, or None for the default."""
    if ridge is not None and not (math.isfinite(ridge) and ridge > 0):
        raise KernelError(f"ridge must be a finite number > 0 (unit: eigenvalues of the kernel), got {ridge}")
    return None if ridge is None else float(ridge)


def default_ridge(kernels: ModuleKernels) -> float:
    """One λ for every subset: the ridge with the least leave-one-out error of the kernel K of all candidates.

    17 values, log-spaced from 1e-3 to 10 times the mean eigenvalue `tr(K)/n`; that mean itself where there is no
    residual (logits without labels, random projections). O(n³).

    Raises:
        KernelError: the kernel is zero.
    """
    gram = kernels.subset()
    mean = float(gram.trace()) / len(gram)
    if not mean > 0:
        raise KernelError(
            f"the kernel of all {len(kernels)} candidates has trace {mean * len(gram):.3g}: the outputs do not depend "
            "on them, so there is nothing to choose; check that the candidates take a gradient"
        )
    problem = Problem.of(kernels, ridge=mean)
    if "residual" not in problem.provides or kernels.num_examples < 2:
        return mean
    low, high = (math.log10(factor) for factor in RIDGE_RANGE)
    ridges = [mean * factor for factor in torch.logspace(low, high, RIDGE_STEPS, dtype=torch.float64).tolist()]
    return select_ridge(gram, problem.residual, kernels.num_outputs, ridges)


def largest_stable_rate(kernels: ModuleKernels) -> float:
    """`2N/λ1(K)` of all candidates: gradient descent on the mean cross-entropy does not diverge; 1 for K = 0."""
    largest = float(kernels.spectrum().eigenvalues[0])
    curvature = SMOOTHNESS["cross_entropy"] * largest / kernels.num_examples
    return 1.0 / curvature if curvature > 0 else 1.0


def _preconditioned(kernels: ModuleKernels, training: Training) -> ModuleKernels:
    return adam_preconditioned(kernels, training.batch_size) if training.optimizer == "adamw" else kernels
