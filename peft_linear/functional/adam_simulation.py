# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Adam on the linearised model from the sign kernel alone: an approximation for when features are not kept.

Exact is `feature_training.train_on_features`; `examples/benchmarks/predicted_curves` measures how far this one is
from it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError
from ._dynamics import TrainingCurve, check_outputs
from .simulation import Descent, HeldOut
from .training_settings import TrainingSettings


def simulate_adam(
    sign_gram: Tensor,  # (n, n)   (J sign(J)ᵀ + sign(J) Jᵀ)/2
    outputs0: Tensor,  # (N, C)   f_θ0(X)
    labels: Tensor,  # (N,) integer classes, or (N, C) float targets
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    held_out: HeldOut | None = None,  # with the cross sign_gram
    base: Tensor | None = None,  # (n, n), with `held_out` (n + m, n)
    **settings: Any,
) -> TrainingCurve:
    """Approximates Adam's training of the linearised model by the sign kernel (`compute_sign_kernel`).

    Adam moves coordinate p by `−η m̂_p/√v̂_p`, m and v being moments of the gradient `g_p = Σ_i e_i J_ip`, `e = ∂R/∂f`.
    If every row had the same size `a_p` in a coordinate, `J_ip = a_p sign(J_ip)`, then `g_p = a_p u_p` with
    `u_p = Σ_i e_i sign(J_ip)`, and a_p would cancel. Two approximations make a kernel method of it: that one, and that
    `u_p²` is about its mean over the coordinates, which is `eᵀSe` with `S = sign(J) sign(J)ᵀ/P`. S in turn is taken
    from the kernel by the arcsine law of Gaussian rows, `S_ij = (2/π) asin(K_ij/√(K_ii K_jj))`. Then, with
    `θ−θ0 = sign(J)ᵀ c`,

        m ← β1 m + (1−β1) e,    v ← β2 v + (1−β2) eᵀSe,    c ← (c − η m̂/√v̂)/(1 + ηλ),    f = f_θ0 + K c,

    hats being Adam's bias corrections. Rows that share no coordinate must not share a mean: `base` has a v of its own,
    and so has every block into which a kernel falls (that of a linear task head falls into one an output). So pass
    `base` where there is one. `betas=(0, 0)` is sign descent (Malladi et al., arXiv 2210.05643, to whom the sign
    kernel is due). The scale of the loss cancels, as it does in Adam. O(n²) a step.

    Args:
        held_out, base: as in `simulate_training`.
        settings: those of `TrainingSettings`, a learning rate among them. The proximal term is decoupled; there is no
            weight decay.

    Returns:
        TrainingCurve whose `coefficients` c are those of sign(J) and whose `distance` is NaN: a sign kernel does not
        determine it.

    Raises:
        KernelError: as `simulate_training`, betas that are not in [0, 1), no learning rate, or another proximal mode.
    """
    given = TrainingSettings(**settings)
    if given.proximal_mode == "coupled":
        raise KernelError("Adam's proximal term is decoupled here; leave proximal_mode out, or use train_on_features")
    check_outputs(outputs0)
    if not all(0 <= beta < 1 for beta in betas):
        raise KernelError(f"betas must be in [0, 1), got {betas}")
    adam = _KernelAdam(sign_gram, outputs0, held_out, base, replace(given, proximal_mode="decoupled"))
    adam.adapter = _Scale(adam.gram, betas)
    adam.head = None if adam.base is None else _Scale(adam.base, betas)
    return adam.run(labels, given.rates)


class _KernelAdam(Descent):
    adapter: _Scale
    head: _Scale | None

    def step(self, gradient: Tensor, examples: Tensor | None, learning_rate: float) -> None:
        pull = learning_rate * self.ridge if self._acts(gradient, examples) else 0.0
        error = self._spread(gradient, examples)
        self.c = (self.c - learning_rate * self.adapter.direction(error)) / (1 + pull)
        if self.c0 is not None and self.head is not None:
            self.c0 = self.c0 - learning_rate * self.head.direction(error)

    def distance(self) -> Tensor:
        return self.c.new_tensor(torch.nan)


class _Scale:
    """Adam's moments: the first in the rows, the second pooled over the coordinates of each block of rows."""

    def __init__(self, gram: Tensor, betas: tuple[float, float]) -> None:
        self.signs, self.block, self.betas = _sign_correlation(gram), _blocks(gram), betas
        self.first = torch.zeros(len(gram), dtype=torch.float64, device=gram.device)
        self.second = torch.zeros_like(self.first)  # by number of the block
        self.count = 0

    def direction(self, error: Tensor) -> Tensor:  # (n,)
        """`m̂/√v̂` after one more gradient."""
        beta1, beta2 = self.betas
        self.count += 1
        squares = torch.zeros_like(error).index_add_(0, self.block, error * (self.signs @ error)).clamp_min(0.0)
        self.first = beta1 * self.first + (1 - beta1) * error
        self.second = beta2 * self.second + (1 - beta2) * squares
        size = (self.second / (1 - beta2**self.count)).sqrt()[self.block]
        return torch.where(size > 0, self.first / size, 0.0) / (1 - beta1**self.count)


def _sign_correlation(gram: Tensor) -> Tensor:
    """S (n, n) by the arcsine law; rows without any coordinate have none."""
    scale = gram.diagonal().clamp_min(0.0).sqrt()
    correlation = torch.where(scale > 0, gram / scale / scale[:, None], 0.0).nan_to_num(0.0, 0.0, 0.0)
    return correlation.clamp(-1, 1).asin() * (2 / math.pi)


def _blocks(gram: Tensor) -> Tensor:
    """(n,) the block of each row, named by its first row: rows of one block are linked by entries that are not 0."""
    scale = gram.diagonal().clamp_min(0.0).sqrt()
    linked = gram.abs() > 1e-12 * scale * scale[:, None]
    block = torch.arange(len(gram), device=gram.device)
    while True:
        lowest = torch.where(linked, block, len(gram)).amin(dim=1).minimum(block)
        if bool((lowest == block).all()):
            return block
        block = lowest
