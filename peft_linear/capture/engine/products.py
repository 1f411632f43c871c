# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""From the Jacobians of a parameter matrix to its kernel: the mean over draws of A, at one rank or several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...functional.gram import DEFAULT_MAX_BYTES, BatchJacobian, cheapest, weight_gram
from ..adapter_spaces import ParameterMatrix


class MatrixKernel(NamedTuple):
    gram: Tensor  # (n, n) float64, on the CPU
    spread: float | None  # relative deviation between draws of A, where there are several
    method: str  # "rows", "explicit" or "ghost"; joined by "+" where slices of the features took different ones


def matrix_kernel(
    jacobians: Sequence[BatchJacobian],
    matrix: ParameterMatrix,
    max_bytes: int = DEFAULT_MAX_BYTES,
    signed: bool = False,
    precision: torch.dtype | None = None,
) -> MatrixKernel:
    """The kernel of a parameter matrix from its Jacobians, which may be lazy; the mean over draws, one at a time.

    The spread is the standard deviation of the draws about their mean in Frobenius norm, over the mean's norm.
    """
    width = matrix.features // matrix.draws
    return next(nested_kernels(jacobians, matrix, [width], max_bytes, signed, precision))[1]


def nested_kernels(
    jacobians: Sequence[BatchJacobian],
    matrix: ParameterMatrix,
    ranks: Sequence[int],  # ascending; the last is the number of features of a draw
    max_bytes: int = DEFAULT_MAX_BYTES,
    signed: bool = False,
    precision: torch.dtype | None = None,
) -> Iterator[tuple[int, MatrixKernel]]:
    """`matrix_kernel` of adapters of several ranks from the Jacobians of the largest R, in the order of `ranks`.

    A of rank r is the first r rows of A of rank R, and its scaling R/r times as large: its kernel is (R/r)² times that
    of the first r features of each draw (R/r times for the sign kernel, which takes the scaling once). Gram matrices
    add over features, so each rank adds to the one below it, and all take no more products than R alone.
    """
    means = {rank: _Mean() for rank in ranks}
    width = ranks[-1]
    for draw in range(matrix.draws):
        for rank, gram, method in _growing(jacobians, matrix, draw, ranks, max_bytes, signed, precision):
            means[rank].add(gram, may_overwrite=rank == width)
            del gram
            if draw + 1 == matrix.draws:
                yield rank, means.pop(rank).kernel((width / rank) ** (1 if signed else 2), method)


def kernels_at_work(draws: int, ranks: int) -> int:
    """How many (n, n) matrices `nested_kernels` holds at a time, beside what was taken from it already."""
    return 2 if draws == 1 or ranks == 1 else ranks + 2


def _growing(
    jacobians: Sequence[BatchJacobian],
    matrix: ParameterMatrix,
    draw: int,
    ranks: Sequence[int],
    max_bytes: int,
    signed: bool,
    precision: torch.dtype | None,
) -> Iterator[tuple[int, Tensor, str]]:
    """The Gram matrices (n, n) of the first features of a draw, as many as each rank says, and the method.

    They are one tensor that grows; the caller may keep and change its last state.
    """
    are_rows = [isinstance(jacobian, Tensor) for jacobian in jacobians]
    methods: dict[str, None] = {}
    gram: Tensor | None = None
    start = draw * ranks[-1]
    for below, rank in zip([0, *ranks], ranks, strict=False):
        taken = (
            jacobians if rank - below == matrix.features else _Features(jacobians, slice(start + below, start + rank))
        )
        method = "rows" if all(are_rows) else "explicit"
        if not any(are_rows) and not signed:
            method = cheapest(taken)
        methods[method] = None
        more = weight_gram(taken, "ghost" if method == "ghost" else "explicit", max_bytes, signed, precision).cpu()
        gram = more if gram is None else gram.add_(more)
        del more
        yield rank, gram, "+".join(methods)


class _Mean:
    """Mean and spread of kernels, updated one by one (Welford)."""

    def __init__(self) -> None:
        self._count = 0
        self._squares = 0.0
        self._mean = torch.empty(0)

    def add(self, gram: Tensor, may_overwrite: bool) -> None:
        self._count += 1
        if self._count == 1:
            self._mean = gram if may_overwrite else gram.clone()
            return
        deviation = gram.sub_(self._mean) if may_overwrite else gram - self._mean
        self._squares += float(deviation.norm()) ** 2 * (self._count - 1) / self._count
        self._mean += deviation.div_(self._count)

    def kernel(self, factor: float, method: str) -> MatrixKernel:
        """The mean, times `factor`, which the spread does not depend on; call it last: it reuses the memory."""
        norm = float(self._mean.norm())
        spread = None
        if self._count > 1:
            spread = (self._squares / (self._count - 1)) ** 0.5 / norm if norm > 0 else 0.0
        return MatrixKernel(self._mean.mul_(factor), spread, method)


class _Features(Sequence[BatchJacobian]):
    """The same Jacobians with a slice of their features (of one draw of A)."""

    def __init__(self, jacobians: Sequence[BatchJacobian], features: slice) -> None:
        self._jacobians, self._features = jacobians, features
        self.in_files = getattr(jacobians, "in_files", False)

    def __len__(self) -> int:
        return len(self._jacobians)

    def __getitem__(self, index: Any) -> Any:
        jacobian = self._jacobians[index]
        if isinstance(jacobian, Tensor):
            return jacobian[:, self._features]
        return jacobian[0][..., self._features], jacobian[1]
