# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Second moments C = E[h hᵀ] of layer inputs as a diagonal plus a low rank, and the linear systems with them.

`C = diag(c) + UᵀU` with c (d,) >= 0 and U (k, d). The matrix C (d, d) is never formed: a product with r rows costs
O(r·k·d). Leading batch dimensions stand for modules of equal shapes.

Where c has few values, as `MomentSketch` makes it, so does a system with C: `U·(I + w·diag(c))⁻¹·Uᵀ` is a sum of one
k×k matrix a value, whatever w is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


LEVELS = 16  # values of the diagonal of a sketch, beside 0
_RANGE = 1e-4  # of them: the smallest values count as this share of the largest
_TEMPORARY = 2**24  # numbers in the largest temporary tensor of `shrink_rows` with a diagonal of many values


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """C = diag(c) + UᵀU, positive semidefinite.

    Args:
        diagonal: c, (..., d), not negative.
        factors: U, (..., k, d); k may be 0.
    """

    diagonal: Tensor
    factors: Tensor

    def to(self, *where: torch.device | torch.dtype) -> SecondMoment:
        """On a device, in a dtype."""
        diagonal, factors = self.diagonal, self.factors
        for each in where:
            diagonal, factors = diagonal.to(each), factors.to(each)
        return SecondMoment(diagonal, factors)

    def times(self, rows: Tensor) -> Tensor:  # (..., r, d) → (..., r, d)
        """X·C, in the dtype of X."""
        diagonal, factors = self.diagonal.to(rows), self.factors.to(rows)
        return rows * diagonal.unsqueeze(-2) + (rows @ factors.mT) @ factors

    def gram(self, rows: Tensor, wide: torch.dtype) -> Tensor:  # (..., r, d) → (..., r, r)
        """X·C·Xᵀ, summed in the dtype `wide`; symmetric and positive semidefinite also after rounding."""
        scaled = rows.to(wide) * self.diagonal.to(wide).sqrt().unsqueeze(-2)
        projected = (rows @ self.factors.to(rows).mT).to(wide)
        return scaled @ scaled.mT + projected @ projected.mT

    def trace(self) -> Tensor:  # (...)
        """tr C, float64."""
        return self.diagonal.double().sum(-1) + self.factors.double().square().sum((-2, -1))

    def shrink_rows(self, rows: Tensor, weights: Tensor, wide: torch.dtype) -> Tensor:
        """`x_i·(I − (I + w_i·C)⁻¹)` of every row x_i: the change, not the value, so that w_i = 0 gives exact zeros.

        By Woodbury's identity with D = I + w·diag(c): `(I + wC)⁻¹ = D⁻¹ − w·D⁻¹Uᵀ(I + w·U D⁻¹ Uᵀ)⁻¹U D⁻¹`; the k×k
        systems are solved in the dtype `wide`. Cost O(r·k·d + r·k³) for a diagonal of at most LEVELS values beside 0,
        O(r·k²·d) else.

        Args:
            rows: X, (..., r, d).
            weights: w, (..., r), not negative.
            wide: float64 where the device has it.

        Returns:
            (..., r, d), in the dtype of X.
        """
        weights = weights.clamp(max=torch.finfo(rows.dtype).max ** 0.5)  # λ → ∞ without infinity times zero
        scaled = weights.to(rows).unsqueeze(-1) * self.diagonal.to(rows).unsqueeze(-2)  # (..., r, d)
        inverse = 1 / (1 + scaled)
        change = rows * (scaled * inverse)
        if not self.factors.shape[-2]:
            return change
        factors = self.factors.to(rows)
        inner = self._inner(rows.dtype, weights).to(wide) * weights.to(wide)[..., None, None]
        inner = inner + torch.eye(inner.shape[-1], dtype=wide, device=inner.device)
        right = ((rows * inverse) @ factors.mT).to(wide).unsqueeze(-1)  # U D⁻¹ x, (..., r, k, 1)
        solved = torch.linalg.solve_ex(inner, right)[0].squeeze(-1) * weights.to(wide).unsqueeze(-1)
        return change + (solved.to(rows) @ factors) * inverse

    def _inner(self, dtype: torch.dtype, weights: Tensor) -> Tensor:
        """U (I + w·diag(c))⁻¹ Uᵀ for every w, (..., r, k, k)."""
        levels = self._levels
        if levels is not None:
            inverse = 1 / (1 + weights.to(dtype).unsqueeze(-1) * levels.values.to(dtype).unsqueeze(-2))  # (..., r, q)
            return (inverse @ levels.grams.to(dtype).flatten(-2)).unflatten(-1, self.factors.shape[-2:-1] * 2)
        factors = self.factors.to(dtype).unsqueeze(-3)
        *others, k, d = self.factors.shape
        size = max(1, _TEMPORARY // max(1, math.prod(others) * k * d))
        parts = []
        for part in weights.to(dtype).split(size, dim=-1):
            inverse = 1 / (1 + part.unsqueeze(-1) * self.diagonal.to(dtype).unsqueeze(-2))
            parts.append((factors * inverse.unsqueeze(-2)) @ factors.mT)
        return torch.cat(parts, dim=-3)

    @cached_property
    def _levels(self) -> _Levels | None:
        """The values of the diagonal, if they are few; computed once."""
        flat = self.diagonal.reshape(-1, self.diagonal.shape[-1])
        found = [row.unique(return_inverse=True) for row in flat]
        count = max(len(values) for values, _ in found)
        if count > LEVELS + 1:
            return None
        k = self.factors.shape[-2]
        values, grams = flat.new_zeros(len(flat), count), flat.new_zeros(len(flat), count, k, k)
        for number, ((level, index), factors) in enumerate(
            zip(found, self.factors.reshape(len(flat), k, -1), strict=True)
        ):
            values[number, : len(level)] = level
            for each in range(len(level)):
                members = factors[:, index == each]
                grams[number, each] = members @ members.mT
        batch = self.diagonal.shape[:-1]
        return _Levels(values.reshape(*batch, count), grams.reshape(*batch, count, k, k))


class _Levels(NamedTuple):
    """q values of a diagonal (..., q), and U_q·U_qᵀ (..., q, k, k) of the columns that have each."""

    values: Tensor
    grams: Tensor


def stacked(moments: list[SecondMoment]) -> SecondMoment:
    """Moments of equal d along a new first dimension; smaller U are filled up with zero rows."""
    largest = max(moment.factors.shape[-2] for moment in moments)
    filled = [
        torch.nn.functional.pad(moment.factors, (0, 0, 0, largest - moment.factors.shape[-2])) for moment in moments
    ]
    return SecondMoment(torch.stack([moment.diagonal for moment in moments]), torch.stack(filled))


def symmetric_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending) and eigenvectors of the symmetric part; on the CPU for devices that cannot."""
    where = torch.device("cpu") if matrix.device.type == "mps" else matrix.device
    values, vectors = torch.linalg.eigh(((matrix + matrix.mT) / 2).to(where))
    return values.to(matrix.device), vectors.to(matrix.device)


class MomentSketch:
    """C = E[h hᵀ] of inputs that come in parts: the best U (rank, d) there is for it, and what is left on a diagonal.

    The diagonal has LEVELS values: those of equal size, to a factor of about two, are replaced by their mean, so that
    tr C is exact.

    The matrix C itself where it has at most 4·rank columns; else its products with 4·rank random directions, from
    which the leading part follows (Nyström; Tropp, Yurtsever, Udell and Cevher, "Fixed-rank approximation of a
    positive-semidefinite matrix from streaming data", NeurIPS 2017, algorithm 3). Memory O(rank·d), time O(rank·d) an
    input.
    """

    def __init__(self, d: int, rank: int, device: torch.device, generator: torch.Generator) -> None:
        wide = torch.float32 if device.type == "mps" else torch.float64
        width = min(d, 4 * rank)
        random = torch.randn(d, width, generator=generator, dtype=torch.float64)
        directions = torch.eye(d, dtype=torch.float64) if width == d else torch.linalg.qr(random)[0]
        self._rank, self._directions = rank, directions.to(device, wide)
        self._products = torch.zeros(d, width, device=device, dtype=wide)
        self._diagonal = torch.zeros(d, device=device, dtype=wide)
        self._count, self._accuracy = 0, 0.0

    def add(self, inputs: Tensor) -> None:  # (n, d), float32 or float64
        """More inputs."""
        # eigenvalues below this share of the largest are rounding errors of the products
        self._accuracy = max(self._accuracy, 100 * torch.finfo(inputs.dtype).eps)
        whole = self._directions.shape[0] == self._directions.shape[1]
        projected = inputs if whole else inputs @ self._directions.to(inputs)
        self._products += inputs.mT @ projected
        self._diagonal += inputs.square().sum(0)
        self._count += len(inputs)

    def moment(self) -> tuple[SecondMoment, float]:
        """C of all inputs so far, zero without any, and the share of tr C that U holds."""
        diagonal = self._diagonal / max(self._count, 1)
        factors = self._leading(self._products / max(self._count, 1))
        left = _grouped((diagonal - factors.square().sum(0)).clamp_min(0))
        total = float(diagonal.sum())
        share = float(factors.square().sum()) / total if total else 1.0
        return SecondMoment(left, factors.contiguous()), min(share, 1.0)

    def _leading(self, products: Tensor) -> Tensor:  # (d, width) → (at most rank, d)
        whole = products.shape[0] == products.shape[1]
        core = products if whole else self._directions.mT @ products
        values, vectors = symmetric_eigh(core)
        kept = values > self._accuracy * values[-1].clamp_min(0)
        values, vectors = values[kept], vectors[:, kept]
        if not whole:  # C ≈ rootᵀ·root
            root = (vectors / values.sqrt()).mT @ products.mT
            _, singular, right = torch.linalg.svd(root, full_matrices=False)
            return right[: self._rank] * singular[: self._rank].unsqueeze(1)
        return (vectors * values.sqrt()).mT.flip(0)[: self._rank]


def _grouped(values: Tensor) -> Tensor:
    """Non-negative numbers, those in the same of LEVELS classes on a logarithmic scale replaced by their mean."""
    grouped, positive = torch.zeros_like(values), values > 0
    if not bool(positive.any()):
        return grouped
    sizes = (values[positive] / values.max()).clamp_min(_RANGE).log() / math.log(_RANGE)  # 0 largest, 1 smallest
    index = (sizes * LEVELS).long().clamp_max(LEVELS - 1)
    sums = values.new_zeros(LEVELS).index_add_(0, index, values[positive])
    means = sums / torch.bincount(index, minlength=LEVELS).clamp_min(1)
    grouped[positive] = means[index]
    return grouped
