# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Bounds on how far fine-tuning moves, how far the linear model is off, and what one more module does to the risk.

Each function checks the hypotheses that it can see and its docstring names those it cannot. Bounds on eigenvalues and
condition numbers (Weyl) are methods of `Spectrum`: `bounds_after_adding` and `condition_number_after_adding`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import KernelError, PeftLinearError
from ._checks import checked_gram, largest_eigenvalue


def distance_bound(
    initial_risk: float,  # R(θ0)
    final_risk: float,  # R(θ), or any lower bound of it
    ridge: float,  # λ > 0, in risk per squared parameter
    *,
    convex_minimum: bool = False,
) -> float:
    """`‖θ−θ0‖ ≤ sqrt(2 (R(θ0) − R(θ)) / λ)` wherever `R(θ) + (λ/2)‖θ−θ0‖² ≤ R(θ0)`.

    Hypothesis, the caller's: the penalised objective at θ is not above its value at θ0. It holds at a global minimum,
    and after any optimizer that has not raised the objective; R need not be convex. Then `(λ/2)‖θ−θ0‖² ≤ R(θ0) − R(θ)`
    is the hypothesis itself, rearranged. `final_risk=0` is a bound known before training when R ≥ 0.

    With `convex_minimum=True` (R convex, as for the linearised model, and θ the exact minimum) the objective is
    λ-strongly convex, so `R(θ0) − R(θ) − (λ/2)‖θ−θ0‖² ≥ (λ/2)‖θ−θ0‖²` and the bound is `sqrt((R(θ0) − R(θ)) / λ)`.

    Attained by R linear in one dimension (with `convex_minimum`), by any R at a point of equal objective (without).
    Of the kind of Theorem 2 in arXiv 2602.08239.

    Raises:
        PeftLinearError: λ is not above 0, a risk is not finite, or R(θ) > R(θ0), which contradicts the hypothesis.
    """
    _check_finite(initial_risk=initial_risk, final_risk=final_risk, ridge=ridge)
    if ridge <= 0:
        raise PeftLinearError(
            f"ridge must be above 0, got {ridge}: without the proximal term nothing bounds the distance"
        )
    if final_risk > initial_risk:
        raise PeftLinearError(
            f"final_risk {final_risk:.6g} is above initial_risk {initial_risk:.6g}: the penalised objective has "
            "risen, so the bound does not hold; lower the learning rate, or take both risks on the same data"
        )
    return math.sqrt((1 if convex_minimum else 2) * (initial_risk - final_risk) / ridge)


def taylor_remainder_bound(jacobian_lipschitz: float, distance: float) -> float:
    """`‖f_θ(x) − f̄_θ(x)‖ ≤ (L_J/2) ‖θ−θ0‖²`, in units of the outputs.

    Hypothesis, the caller's: `‖J(θ'; x) − J(θ0; x)‖₂ ≤ L_J ‖θ'−θ0‖` on the segment from θ0 to θ. It follows from
    `f_θ − f̄_θ = ∫₀¹ (J(θ0 + t(θ−θ0)) − J(θ0)) (θ−θ0) dt`. Attained by a quadratic f in one dimension.

    Raises:
        PeftLinearError: an argument is negative or not finite.
    """
    _check_finite(jacobian_lipschitz=jacobian_lipschitz, distance=distance)
    if jacobian_lipschitz < 0 or distance < 0:
        raise PeftLinearError(f"L_J and distance must not be negative, got {jacobian_lipschitz} and {distance}")
    return 0.5 * jacobian_lipschitz * distance**2


@dataclass(frozen=True, eq=False)
class LipschitzEstimate:
    """Sampled quotients against the radius. All are *lower* estimates of the Lipschitz constant on the ball."""

    radii: Tensor  # (R,) float64
    average: Tensor  # (R,) mean over the samples at that radius
    maximum: Tensor  # (R,) largest of the samples at that radius

    @property
    def lower_estimate(self) -> Tensor:
        """(R,) largest quotient at that radius or a smaller one: the best lower estimate on each ball."""
        inside = self.radii[None, :] <= self.radii[:, None]
        return torch.where(inside, self.maximum[None, :], -torch.inf).amax(dim=1)

    def __repr__(self) -> str:
        rows = zip(self.radii.tolist(), self.average.tolist(), self.maximum.tolist(), strict=True)
        return "LipschitzEstimate(" + ", ".join(f"r={r:.3g}: {a:.3g} (max {m:.3g})" for r, a, m in rows) + ")"


def sample_lipschitz(
    function: Callable[[Tensor], Tensor],  # (P,) -> any shape
    center: Tensor,  # (P,)   θ0
    radii: Sequence[float],  # all > 0, in units of the parameters
    samples: int = 8,
    seed: int = 0,
) -> LipschitzEstimate:
    """`‖F(θ0 + r·u) − F(θ0)‖ / r` for directions `u = v/‖v‖`, v ~ N(0, I): the paper's Algorithm 1.

    The Lipschitz constant of F on a ball is the largest such quotient over *all* pairs of points in it; samples can
    only be below it. The same directions serve every radius. Cost: 1 + len(radii)·samples evaluations of F.

    Source: arXiv 2602.08239, Algorithm 1 (average over models and maximum, against the radius).

    Raises:
        PeftLinearError: no radii, one that is not above 0, or samples < 1.
    """
    start = function(center)
    return _sample(lambda point, r: (function(point) - start).norm() / r, center, radii, samples, seed)


def sample_jacobian_lipschitz(
    function: Callable[[Tensor], Tensor],  # (P,) -> any shape
    linear: Callable[[Tensor], Tensor],  # the same, first order around center
    center: Tensor,  # (P,)   θ0
    radii: Sequence[float],
    samples: int = 8,
    seed: int = 0,
) -> LipschitzEstimate:
    """`2 ‖F(θ) − F̄(θ)‖ / r²` at `θ = θ0 + r·u`: a lower estimate of the L_J of `taylor_remainder_bound`.

    If the Jacobian has Lipschitz constant L_J on the ball, no such quotient exceeds it (that is the remainder bound),
    and no Jacobian is needed to compute it. Exact for a quadratic F in one dimension. Cost: len(radii)·samples
    evaluations of both functions.

    Raises:
        PeftLinearError: no radii, one that is not above 0, or samples < 1.
    """
    return _sample(lambda point, r: 2 * (function(point) - linear(point)).norm() / r**2, center, radii, samples, seed)


@dataclass(frozen=True)
class RiskBounds:
    """`lower ≤ Q_{K+S} ≤ upper = Q_K`, where `Q_K = r₀ᵀ(K+λI)⁻¹r₀`."""

    lower: float  # Q_K / (1 + ρ)
    upper: float  # Q_K
    rho: float  # ‖(K+λI)^{-1/2} S (K+λI)^{-1/2}‖₂


def risk_bounds_after_adding(
    gram: Tensor,  # (n, n)   K
    added: Tensor,  # (n, n)   S
    residual: Tensor,  # (n,)   r₀ = y − f_θ0(X)
    ridge: float,  # λ, same unit as the eigenvalues
) -> RiskBounds:
    """`Q_K/(1+ρ) ≤ Q_{K+S} ≤ Q_K`: what training one more module can do to the regularised risk, for every ρ ≥ 0.

    `(λ/2)·Q_K` is the minimum of `½‖f̄(X) − y‖² + (λ/2)‖θ−θ0‖²`. Proof: `0 ⪯ S ⪯ ρ(K+λI)` by the definition of ρ, so
    `K+λI ⪯ K+S+λI ⪯ (1+ρ)(K+λI)`, and inversion reverses ⪯. The lower end is attained in one dimension and whenever
    S is proportional to K+λI, the upper end by S with `S(K+λI)⁻¹r₀ = 0`. O(n³).

    It covers the same question as Theorem 7 of arXiv 2602.08239 without needing that S is small.

    Raises:
        KernelError: shapes disagree, K+λI is not positive definite, or S is not positive semidefinite.
    """
    gram, residual = checked_gram(gram, residual)
    added, _ = checked_gram(added, residual)
    if not (math.isfinite(ridge) and ridge >= 0):
        raise KernelError(f"ridge must be a finite number >= 0, got {ridge}")
    if residual.ndim != 1:
        raise KernelError(f"residual must have shape ({len(gram)},), got {tuple(residual.shape)}")
    factor, info = torch.linalg.cholesky_ex(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    if info.item():
        raise KernelError(f"K + ridge*I is not positive definite at ridge={ridge:.3g}; raise the ridge")
    half = torch.linalg.solve_triangular(factor, added, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    smallest = float(torch.linalg.eigvalsh(added)[0])
    if smallest < -1e-8 * max(float(added.diagonal().abs().max()), 1e-300):
        raise KernelError(f"the added kernel has eigenvalue {smallest:.3g}: it is not positive semidefinite")
    rho = largest_eigenvalue((whitened + whitened.mT) / 2)
    before = float(torch.linalg.solve_triangular(factor, residual[:, None], upper=False).square().sum())
    return RiskBounds(lower=before / (1 + rho), upper=before, rho=rho)


def _sample(
    quotient: Callable[[Tensor, float], Tensor], center: Tensor, radii: Sequence[float], samples: int, seed: int
) -> LipschitzEstimate:
    radii = [float(radius) for radius in radii]
    if not radii or not min(radii) > 0 or samples < 1:
        raise PeftLinearError(f"radii must be above 0 and samples at least 1, got radii={radii} and samples={samples}")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(samples, center.numel(), generator=generator, dtype=torch.float64)
    directions = (directions / directions.norm(dim=1, keepdim=True)).to(center)
    quotients = torch.tensor(
        [[float(quotient(center + radius * u, radius)) for u in directions] for radius in radii], dtype=torch.float64
    )
    return LipschitzEstimate(torch.tensor(radii, dtype=torch.float64), quotients.mean(1), quotients.amax(1))


def _check_finite(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise PeftLinearError(f"{name} must be a finite number, got {value}")
