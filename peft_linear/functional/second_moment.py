# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Second moments C = E[h hᵀ] of layer inputs as a diagonal plus a low rank, and the linear systems with them.

`C = diag(c) + UᵀU` with c (d,) >= 0 and U (k, d). The matrix C (d, d) is never formed: a product with r rows costs
O(r·k·d). Leading batch dimensions stand for modules of equal shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


_TEMPORARY = 2**24  # numbers in the largest temporary tensor of `shrink_rows`


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
        systems are solved in the dtype `wide`. Cost O(r·k²·d).

        Args:
            rows: X, (..., r, d).
            weights: w, (..., r), not negative.
            wide: float64 where the device has it.

        Returns:
            (..., r, d), in the dtype of X.
        """
        *_, count, d = rows.shape
        k = self.factors.shape[-2]
        others = max(1, rows.numel() // max(1, count * d))
        size = max(1, _TEMPORARY // max(1, others * k * d))
        parts = [
            self._shrink(rows[..., start : start + size, :], weights[..., start : start + size], wide)
            for start in range(0, count, size)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)

    def _shrink(self, rows: Tensor, weights: Tensor, wide: torch.dtype) -> Tensor:
        scaled = weights.to(rows).unsqueeze(-1) * self.diagonal.to(rows).unsqueeze(-2)  # (..., r, d)
        inverse = 1 / (1 + scaled)
        change = rows * (scaled * inverse)
        if not self.factors.shape[-2]:
            return change
        factors = self.factors.to(rows).unsqueeze(-3)  # (..., 1, k, d)
        weighted = factors * inverse.unsqueeze(-2)  # U D⁻¹, (..., r, k, d)
        inner = (weighted @ factors.mT).to(wide) * weights.to(wide)[..., None, None]
        inner = inner + torch.eye(inner.shape[-1], dtype=wide, device=inner.device)
        right = (weighted @ rows.unsqueeze(-1)).to(wide)  # U D⁻¹ x, (..., r, k, 1)
        solved = torch.linalg.solve_ex(inner, right)[0] * weights.to(wide)[..., None, None]
        return change + (weighted.mT @ solved.to(rows)).squeeze(-1)


def stacked(moments: list[SecondMoment]) -> SecondMoment:
    """Moments of equal d along a new first dimension; smaller U are filled up with zero rows."""
    largest = max(moment.factors.shape[-2] for moment in moments)
    filled = [
        torch.nn.functional.pad(moment.factors, (0, 0, 0, largest - moment.factors.shape[-2])) for moment in moments
    ]
    return SecondMoment(torch.stack([moment.diagonal for moment in moments]), torch.stack(filled))


class MomentSketch:
    """C = E[h hᵀ] of inputs that come in parts, as an exact diagonal and the best U (rank, d) there is for it.

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
        self._count = 0

    def add(self, inputs: Tensor) -> None:  # (n, d), float32 or float64
        """More inputs."""
        whole = self._directions.shape[0] == self._directions.shape[1]
        projected = inputs if whole else inputs @ self._directions.to(inputs)
        self._products += inputs.mT @ projected
        self._diagonal += inputs.square().sum(0)
        self._count += len(inputs)

    def moment(self) -> tuple[SecondMoment, float]:
        """C of all inputs so far, zero without any, and the share of tr C that U holds."""
        diagonal = self._diagonal / max(self._count, 1)
        factors = self._leading(self._products / max(self._count, 1))
        left = (diagonal - factors.square().sum(0)).clamp_min(0)
        total = float(diagonal.sum())
        share = float(factors.square().sum()) / total if total else 1.0
        return SecondMoment(left, factors), min(share, 1.0)

    def _leading(self, products: Tensor) -> Tensor:  # (d, width) → (at most rank, d)
        norm = float(torch.linalg.matrix_norm(products))
        if not norm:
            return products.new_zeros(0, len(products))
        accuracy = torch.finfo(products.dtype).eps
        shift = accuracy * norm
        shifted = products + shift * self._directions
        core = self._directions.mT @ shifted
        lower, _ = torch.linalg.cholesky_ex((core + core.mT) / 2)
        root = torch.linalg.solve_triangular(lower, shifted.mT, upper=False)  # C ≈ rootᵀ root − shift
        _, singular, right = torch.linalg.svd(root, full_matrices=False)
        values = (singular.square() - shift)[: self._rank]
        kept = values > len(products) * accuracy * norm
        return right[: self._rank][kept] * values[kept].sqrt().unsqueeze(1)
