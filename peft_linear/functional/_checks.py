# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Checks that the functions on Gram matrices share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import KernelError


ASYMMETRY = 1e-6  # of an entry, relative to the largest


def checked_gram(gram: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64 on the Gram matrix's device, after checking that they belong together.

    Raises:
        KernelError: gram is not a symmetric (n, n) matrix, rows does not have n rows, or a value is not finite.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not len(gram):
        raise KernelError(f"gram must be a non-empty square matrix, got shape {tuple(gram.shape)}")
    if rows.ndim not in (1, 2) or len(rows) != len(gram):
        raise KernelError(f"a gram of {len(gram)} rows needs (n,) or (n, k) values, got shape {tuple(rows.shape)}")
    gram, rows = gram.detach().double(), rows.detach().to(gram.device).double()
    for name, tensor in (("gram", gram), ("the values beside it", rows)):
        if not tensor.sum().isfinite() and not tensor.isfinite().all():  # a sum is finite only if its terms are
            raise KernelError(f"{name}: {int((~tensor.isfinite()).sum())} entries are NaN or infinite")
    if not _looks_symmetric(gram):
        asymmetry = (gram - gram.mT).abs().max().item()
        if asymmetry > ASYMMETRY * gram.abs().max().item():
            raise KernelError(f"gram is not symmetric: K and its transpose differ by up to {asymmetry:.3g}")
    return gram, rows


def _looks_symmetric(gram: Tensor) -> bool:
    """Whether `K v` and `Kᵀ v` agree for a vector v of random signs: a tenth of the time of comparing K with Kᵀ.

    A single entry that differs shows in full; many could cancel in every row only by design.
    """
    signs = torch.randint(0, 2, (len(gram),), generator=torch.Generator().manual_seed(len(gram)))
    signs = (2 * signs - 1).to(gram)
    difference = (gram @ signs - gram.mT @ signs).abs().max()
    return bool(difference <= 0.1 * ASYMMETRY * gram.diagonal().abs().max())


def check_cross_gram(cross_gram: Tensor, columns: int, outputs0: Tensor) -> None:
    """Raises KernelError unless cross_gram is (M·C, columns) for outputs0 (M, C)."""
    if cross_gram.shape != (outputs0.numel(), columns):
        raise KernelError(
            f"cross_gram has shape {tuple(cross_gram.shape)}, but outputs of shape {tuple(outputs0.shape)} against "
            f"{columns} rows need ({outputs0.numel()}, {columns})"
        )


def largest_eigenvalue(gram: Tensor) -> float:
    """λ1 of a symmetric positive semidefinite float64 matrix; O(n³)."""
    return max(float(torch.linalg.eigvalsh(gram)[-1]), 0.0)
