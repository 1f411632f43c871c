# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Spectrum of a kernel, and what adding another kernel can do to it.

Convention: K is (n, n), symmetric positive semidefinite, eigenvalues λ1 ≥ … ≥ λn ≥ 0 in float64; `ridge` has the unit
of the eigenvalues (outputs² per parameter²) and is the paper's λ (arXiv 2602.08239).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import KernelError


# Rounding in the entries of a Gram matrix grows with the number of summed products, which its size n does not tell.
_TOLERANCE_IN_NOISE_FLOORS = 100.0


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum:
    """Eigenvalues of a kernel and the quantities the theory reads from them.

    An eigenvalue at or below `noise_floor = n·eps·λ1` cannot be told from rounding. Such eigenvalues stay visible in
    `eigenvalues` and count as zero in every number derived from them.

    Args:
        eigenvalues: (n,) tensor in any order; stored as float64 on the CPU, descending, rounding below zero clipped.
        eps: Machine epsilon of the precision that the kernel was *computed* in (not stored in); float64's by default.
        name: What the kernel belongs to; only used in messages.

    Raises:
        KernelError: no eigenvalue, one that is not finite, or one that is negative beyond rounding.
    """

    eigenvalues: Tensor  # (n,) float64, descending, ≥ 0
    eps: float = torch.finfo(torch.float64).eps
    name: str = "the kernel"

    def __post_init__(self) -> None:
        values = torch.as_tensor(self.eigenvalues).detach().to("cpu", torch.float64)
        if values.ndim != 1 or not len(values):
            raise KernelError(f"{self.name} needs a non-empty vector of eigenvalues, got shape {tuple(values.shape)}")
        if not bool(torch.isfinite(values).all()):
            raise KernelError(f"{self.name} has eigenvalues that are not finite; check the model's outputs for NaN")
        values = values.sort(descending=True).values
        scale = float(values.abs().max())
        low, tolerance = float(values[-1]), _TOLERANCE_IN_NOISE_FLOORS * len(values) * self.eps * scale
        if low < -tolerance:
            raise KernelError(
                f"{self.name} has eigenvalue {low:.2e} below -{tolerance:.2e}: not positive semidefinite; "
                "accumulate in float64 or pass more examples"
            )
        object.__setattr__(self, "eigenvalues", values.clamp_min(0.0))

    @classmethod
    def from_gram(
        cls, gram: Tensor, *, eps: float | None = None, entry_error: float = 0.0, name: str = "the kernel"
    ) -> Spectrum:
        """Spectrum of a Gram matrix. Cost O(n³), always in float64.

        Args:
            gram: (n, n) real tensor, symmetric up to rounding.
            eps: See the class; by default that of `gram.dtype`.
            entry_error: Standard deviation of an entry's rounding error, relative to sqrt(K_ii·K_jj). A symmetric
                matrix of such errors has a spectral norm of about 2·sqrt(n)·entry_error·max K_ii (Wigner's
                semicircle), which the noise floor then is at least.
            name: What the kernel belongs to, for messages.

        Raises:
            KernelError: `gram` is not square, not finite, not symmetric, or not positive semidefinite.
        """
        if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not gram.shape[0]:
            raise KernelError(f"{name} must be a non-empty square matrix, got shape {tuple(gram.shape)}")
        eps = torch.finfo(gram.dtype).eps if eps is None else eps
        gram = gram.detach().to("cpu", torch.float64)
        if not bool(torch.isfinite(gram).all()):
            raise KernelError(f"{name} has entries that are not finite; check the model's outputs for NaN or inf")
        asymmetry, scale = float((gram - gram.T).abs().max()), float(gram.abs().max())
        tolerance = _TOLERANCE_IN_NOISE_FLOORS * len(gram) * eps * scale
        if asymmetry > tolerance:
            raise KernelError(
                f"{name} is not symmetric: entries differ from their transpose by up to {asymmetry:.2e} "
                f"(tolerance {tolerance:.2e}); symmetrise it, e.g. (K + K.T) / 2"
            )
        eigenvalues = torch.linalg.eigvalsh((gram + gram.T) / 2)
        largest = float(eigenvalues[-1])
        if entry_error > 0 and largest > 0:
            eps = max(eps, 2 * entry_error * float(gram.diagonal().max()) / (len(gram) ** 0.5 * largest))
        return cls(eigenvalues, eps=eps, name=name)

    def __len__(self) -> int:
        return len(self.eigenvalues)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spectrum):
            return NotImplemented
        return self.eps == other.eps and torch.equal(self.eigenvalues, other.eigenvalues)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        largest = float(self.eigenvalues[0])
        rank = self.numerical_rank
        smallest = float(self.eigenvalues[rank - 1]) if rank else 0.0
        return (
            f"Spectrum(n={len(self)}, numerical_rank={rank}, largest={largest:.4g}, "
            f"smallest above noise={smallest:.4g}, noise_floor={self.noise_floor:.2g}, trace={self.trace:.4g}, "
            f"effective_rank={self.effective_rank:.2f})"
        )

    @property
    def noise_floor(self) -> float:
        """`n·eps·λ1`: eigenvalues at or below it are rounding."""
        return len(self) * self.eps * float(self.eigenvalues[0])

    @property
    def numerical_rank(self) -> int:
        """Number of eigenvalues above `noise_floor`."""
        return int((self.eigenvalues > self.noise_floor).sum())

    @property
    def trace(self) -> float:
        """`Σ λi`."""
        return float(self.eigenvalues.sum())

    @property
    def effective_rank(self) -> float:
        """Participation ratio `(Σ λi)² / Σ λi²`, between 1 and n; 0 for the zero kernel."""
        values = self._above_noise()
        return float(values.sum() ** 2 / values.square().sum()) if self.eigenvalues[0] > 0 else 0.0

    def effective_dimension(self, ridge: float) -> float:
        """`Σ λi/(λi + ridge)`: how many directions ridge regression fits; the numerical rank in the limit ridge → 0.

        Raises:
            KernelError: `ridge` is negative or not finite.
        """
        _check_ridge(ridge)
        values = self._above_noise()
        values = values[values > 0]
        return float((values / (values + ridge)).sum())

    def condition_number(self, ridge: float = 0.0) -> float:
        """`(λ1 + ridge)/(λn + ridge)`, the paper's predictor of fine-tuning (arXiv 2602.08239, section 4).

        With `ridge=0` and λn at or below the noise floor the answer is `inf`: the kernel is singular as far as these
        numbers can tell, and `numerical_rank` says how singular. With a ridge, such a λn counts as 0.

        Raises:
            KernelError: `ridge` is negative or not finite.
        """
        _check_ridge(ridge)
        values = self._above_noise()
        return _ratio(float(values[0]) + ridge, float(values[-1]) + ridge)

    def bounds_after_adding(self, other: Spectrum) -> tuple[Tensor, Tensor]:
        """Weyl's inequality for K + S, from the spectra alone: `λi(K) + λn(S) ≤ λi(K+S) ≤ λi(K) + λ1(S)`.

        Args:
            other: Spectrum of S, of the same n.

        Returns:
            (lower, upper), each (n,) float64, descending. Tight: both are attained by S = c·I.

        Raises:
            KernelError: the two kernels differ in size.
        """
        self._check_same_size(other)
        return self.eigenvalues + other.eigenvalues[-1], self.eigenvalues + other.eigenvalues[0]

    def condition_number_after_adding(self, other: Spectrum, ridge: float = 0.0) -> tuple[float, float]:
        """An interval that holds the condition number of K + S, without forming K + S.

        All of Weyl's inequalities for the two extreme eigenvalues: `max_j c_j ≤ λ1(K+S) ≤ λ1(K) + λ1(S)` and
        `λn(K) + λn(S) ≤ λn(K+S) ≤ min_j c_j`, with `c_j = λj(K) + λ_{n+1−j}(S)`.

        Returns:
            (lower, upper); upper is `inf` where `ridge=0` and neither kernel is known to be of full rank.

        Raises:
            KernelError: the two kernels differ in size, or `ridge` is negative or not finite.
        """
        self._check_same_size(other)
        _check_ridge(ridge)
        k, s = self._above_noise(), other._above_noise()
        crossed = k + s.flip(0)
        low = _ratio(float(crossed.max()) + ridge, float(crossed.min()) + ridge)
        high = _ratio(float(k[0] + s[0]) + ridge, float(k[-1] + s[-1]) + ridge)
        return low, high

    def _above_noise(self) -> Tensor:
        return torch.where(self.eigenvalues > self.noise_floor, self.eigenvalues, 0.0)

    def _check_same_size(self, other: Spectrum) -> None:
        if len(self) != len(other):
            raise KernelError(
                f"kernels of size {len(self)} and {len(other)} cannot be added; compute both on the same examples "
                "and outputs"
            )


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.inf


def _check_ridge(ridge: float) -> None:
    if not (math.isfinite(ridge) and ridge >= 0):
        raise KernelError(f"ridge must be a finite number ≥ 0 (unit: eigenvalues of the kernel), got {ridge}")
