# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Upper bounds on what a change of the set can give, from one factorisation of the kernel of the present set.

With them a search skips candidates that cannot be the best of a round. Notation: K the kernel of the present set,
λ > 0 the ridge, and D = Σ±S_j the change of K, such that K + D is a kernel too (positive semidefinite). A bound reads
from each S_j numbers that are linear in it, so those of a change are sums, and costs O(n²) a module after O(n³) once;
scoring costs O(n³) each time. Every proof is in its function's docstring. There is none for the leave-one-out error,
the predicted loss, the alignment or the effective rank, which a module may raise or lower: searches by those score
everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...functional.regression import solve_ridge
from ..problem import Problem


@dataclass(frozen=True)
class GainBound:
    """utility(K + D) ≤ ceiling(Σ ±measure(S_j)) for every D = Σ ±S_j, in exact arithmetic.

    Args:
        measure: S (n, n) -> (p,) float64, linear.
        ceiling: Of the sum of measures. For the criteria that are `monotone`, p = 1, measures are ≥ 0 and the ceiling
            does not fall as its argument grows, so it also bounds the best of many sums.
    """

    measure: Callable[[Tensor], Tensor]
    ceiling: Callable[[Tensor], float]


BoundFunction = Callable[[Tensor, Problem], GainBound]


def risk_reduction_bound(gram: Tensor, problem: Problem) -> GainBound:
    """`1 − λ Q_{K+D}/‖r0‖² ≤ 1 − (λ/‖r0‖²)·Q²/(Q + αᵀDα)`, with `α = (K + λI)⁻¹r0` and `Q = Q_K = r0ᵀα`.

    Proof: `Q_{K+D} = max_u 2uᵀr0 − uᵀ(K + D + λI)u`. At `u = tα` this is `2tQ − t²(Q + αᵀDα)`, for `αᵀ(K + λI)α = Q`,
    and its largest value over t is `Q²/(Q + αᵀDα)`; the denominator is `αᵀ(K + D + λI)α > 0`. (It is never worse than
    `Q/(1 + ρ)`, ρ the norm of `(K + λI)^{-1/2} D (K + λI)^{-1/2}`.) One Cholesky factorisation.
    """
    residual = problem.residual
    alpha = solve_ridge(gram, residual, problem.ridge)
    risk, total = float(residual @ alpha), float(residual.square().sum())

    def ceiling(change: Tensor) -> float:
        denominator = risk + float(change)
        if total == 0:
            return 0.0
        return 1.0 - problem.ridge * risk**2 / (total * denominator) if denominator > 0 else math.inf

    return GainBound(lambda block: (alpha @ block @ alpha).reshape(1), ceiling)


def effective_dimension_bound(gram: Tensor, problem: Problem) -> GainBound:
    """`d(K + D) ≤ d(K) + λ·tr((K + λI)⁻² D)` for `d(K) = Σ λi/(λi + λ) = tr f(K)`, f(x) = x/(x + λ).

    Proof: f is concave on x ≥ 0, so `tr f` is concave on positive semidefinite matrices (Peierls and Klein) and lies
    below its tangent at K, whose slope is `f'(K) = λ(K + λI)⁻²`. One inversion.
    """
    inverse = solve_ridge(gram, torch.eye(len(gram), dtype=torch.float64), problem.ridge)
    now = len(gram) - problem.ridge * float(inverse.trace())
    slope = problem.ridge * (inverse @ inverse)
    return GainBound(lambda block: (slope * block).sum().reshape(1), lambda change: now + float(change))


def condition_number_bound(gram: Tensor, problem: Problem) -> GainBound:
    """`(λ1 + λ)/(λn + λ)` of K + D is at least `(v1ᵀ(K + D)v1 + λ)/(vnᵀ(K + D)vn + λ)`, v1 and vn eigenvectors of K.

    Proof: `vᵀAv` of a unit vector lies between the smallest and the largest eigenvalue of A (Rayleigh), here of
    A = K + D. It is at least as tight as Weyl's `λ1(K + D) ≥ λ1(K) + λn(D)` and `λn(K + D) ≤ λn(K) + λ1(D)`. One
    eigendecomposition.
    """
    vectors = torch.linalg.eigh(gram).eigenvectors[:, [-1, 0]]

    def measure(block: Tensor) -> Tensor:
        return (vectors * (block @ vectors)).sum(dim=0)

    now = measure(gram)

    def ceiling(change: Tensor) -> float:
        high, low = (now + change + problem.ridge).tolist()
        return -high / low if low > 0 else math.inf

    return GainBound(measure, ceiling)
