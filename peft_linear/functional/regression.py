# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Kernel ridge regression: the closed form of linearised fine-tuning, and its leave-one-out errors.

Conventions: N examples with C outputs make n = N·C rows, the row of example i, output a is `i*C + a`; a Gram matrix is
`K = J Jᵀ` (n, n), a cross Gram matrix is `K(x, X) = J(x) Jᵀ` (m, n). Everything is computed in float64 on the Gram
matrix's device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import KernelError
from ._checks import check_cross_gram, checked_gram
from ._cholesky import inverse_factor
from .simulation import TrainingCurve, simulate_training


__all__ = [
    "TrainingCurve",
    "dual_distance",
    "leave_one_out_path",
    "leave_one_out_residuals",
    "predict_ridge",
    "select_ridge",
    "simulate_training",
    "solve_ridge",
]


def solve_ridge(
    gram: Tensor,  # (n, n)
    residual: Tensor,  # (n,) or (n, k)   y − f_θ0(X)
    ridge: float,  # same unit as the eigenvalues of gram (outputs² per parameter²); the paper's λ
) -> Tensor:  # like residual, float64
    """Dual coefficients `α = (K + λI)⁻¹ r` of the minimiser of `½‖f_θ0(X) + J(θ−θ0) − y‖² + (λ/2)‖θ−θ0‖²`.

    The minimiser itself is `θ−θ0 = Jᵀα`, its outputs are `f_θ0(X) + Kα = y − λα`. One Cholesky factorisation, O(n³).
    Source: kernel ridge regression in the linear regime, arXiv 2602.08239, section 4.

    Raises:
        KernelError: shapes disagree, a value is not finite, ridge < 0, or `K + λI` is not positive definite.
    """
    gram, residual = checked_gram(gram, residual)
    return _apply_inverse(_cholesky(gram, ridge), residual)


def leave_one_out_residuals(
    gram: Tensor,  # (n, n)
    residual: Tensor,  # (n,) or (n, k)
    ridge: float,
    block_size: int = 1,  # C, the rows of one example
) -> Tensor:  # like residual, float64
    """`y_i − f̄_{−i}(x_i)`: the error on each example of the ridge regression fitted without all its C rows.

    With `M = (K + λI)⁻¹` and `α = M r`, block i of the answer is `M_ii⁻¹ α_i` (C×C solves, batched): by the block
    inverse, `M_ii⁻¹ = K_ii + λI − K_i,−i (K_−i,−i + λI)⁻¹ K_−i,i` is the Schur complement of the other rows and
    `M_ii⁻¹ α_i = r_i − K_i,−i (K_−i,−i + λI)⁻¹ r_−i`. Nothing is fitted again: O(n³) once, for L⁻¹ of
    `K + λI = L Lᵀ`; `M_ii = Σ_k (L⁻¹)_kiᵀ (L⁻¹)_ki` is O(n²·C), the rest of M is never formed.

    Raises:
        KernelError: as `solve_ridge`, or `block_size` does not divide n.
    """
    gram, residual = checked_gram(gram, residual)
    _check_blocks(len(gram), block_size)
    inverse, failed = inverse_factor(_shifted(gram, ridge))
    if failed:
        raise _not_positive(gram, ridge, failed)
    columns = inverse.view(len(gram), -1, block_size).transpose(0, 1)
    return _divide_blocks(columns.mT @ columns, inverse.mT @ (inverse @ residual))


def leave_one_out_path(
    gram: Tensor,  # (n, n)
    residual: Tensor,  # (n,)
    ridges: Sequence[float],  # all > 0
    block_size: int = 1,
) -> Tensor:  # (len(ridges), n) float64
    """`leave_one_out_residuals` at many ridges from one eigendecomposition: O(n³) once and O(n²·C) for each ridge.

    Raises:
        KernelError: as `leave_one_out_residuals`, or a ridge that is not above 0.
    """
    gram, residual = checked_gram(gram, residual)
    _check_blocks(len(gram), block_size)
    low = min(ridges, default=0.0)
    if not low > 0:
        raise KernelError(f"the ridges of a path must be above 0, got {list(ridges)}; drop the others")
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0.0)
    rows = vectors.reshape(-1, block_size, len(gram))
    coordinates = vectors.mT @ residual
    path = []
    for ridge in ridges:
        weights = 1.0 / (values + ridge)
        blocks = (rows * weights) @ rows.mT
        path.append(_divide_blocks(blocks, vectors @ (weights * coordinates)))
    return torch.stack(path)


def select_ridge(
    gram: Tensor,  # (n, n)
    residual: Tensor,  # (n,)
    block_size: int = 1,
    ridges: Sequence[float] | None = None,
) -> float:
    """The ridge with the least leave-one-example-out squared error.

    Default candidates: 25 values, log-spaced from 1e-6 to 1e2 times the mean eigenvalue `tr K / n`, so that the
    choice does not depend on the kernel's scale. Cost as `leave_one_out_path`.

    Raises:
        KernelError: as `leave_one_out_path`, or the kernel is zero and no candidates were given.
    """
    if ridges is None:
        mean = torch.as_tensor(gram).diagonal().double().mean().item()
        if not mean > 0:
            raise KernelError(f"the kernel's mean eigenvalue is {mean:.3g}; a ridge cannot be chosen from its scale")
        ridges = [mean * factor for factor in torch.logspace(-6, 2, 25, dtype=torch.float64).tolist()]
    errors = leave_one_out_path(gram, residual, ridges, block_size).square().sum(dim=1)
    return float(ridges[int(errors.argmin())])


def predict_ridge(
    cross_gram: Tensor,  # (m, n)   K(x, X)
    alpha: Tensor,  # (n,)
    outputs0: Tensor,  # (M, C), m = M·C   f_θ0(x)
) -> Tensor:  # (M, C) float64
    """Outputs `f_θ0(x) + K(x, X) α` of the linear model with dual coefficients α on examples it was not fitted to.

    Raises:
        KernelError: the shapes do not belong together.
    """
    check_cross_gram(cross_gram, alpha.numel(), outputs0)
    return outputs0.double() + (cross_gram.double() @ alpha.double().reshape(-1)).view_as(outputs0)


def dual_distance(
    gram: Tensor,  # (n, n)
    alpha: Tensor,  # (n,)
) -> float:  # same unit as the parameters
    """`‖θ−θ0‖ = ‖Jᵀα‖ = sqrt(αᵀKα)`, without the parameters."""
    alpha = alpha.double().reshape(-1)
    return float((alpha @ (gram.double() @ alpha)).clamp_min(0.0).sqrt())


def _shifted(gram: Tensor, ridge: float) -> Tensor:
    if not ridge >= 0:
        raise KernelError(f"ridge must be a number >= 0, got {ridge}")
    shifted = gram.clone()
    shifted.diagonal().add_(ridge)
    return shifted


def _not_positive(gram: Tensor, ridge: float, minor: int) -> KernelError:
    return KernelError(
        f"K + ridge*I (n={len(gram)}, ridge={ridge:.3g}, largest diagonal entry of K {gram.diagonal().max():.3g}) is "
        f"not positive definite (leading minor {minor}): the kernel has rank below n or is not positive "
        "semidefinite; raise the ridge"
    )


def _cholesky(gram: Tensor, ridge: float) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(_shifted(gram, ridge))
    if info.item():
        raise _not_positive(gram, ridge, int(info))
    return factor


def _apply_inverse(factor: Tensor, right: Tensor) -> Tensor:
    columns = right if right.ndim == 2 else right[:, None]
    return torch.cholesky_solve(columns, factor).reshape(right.shape)


def _check_blocks(n: int, block_size: int) -> None:
    if block_size < 1 or n % block_size:
        raise KernelError(f"block_size must be the C outputs of one example and divide the {n} rows, got {block_size}")


def _divide_blocks(blocks: Tensor, right: Tensor) -> Tensor:  # (n/size, size, size), (n,) or (n, k) -> like right
    return torch.linalg.solve(blocks, right.reshape(*blocks.shape[:2], -1)).reshape(right.shape)
