# Copyright 2026 The peft-linear authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Adam on the linearised model from the sign kernel alone: an approximation for when features are not kept.

Exact is `feature_training.train_on_features`. How far this one is from it has been measured:
docs/measurements/predicted_curves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import KernelError
from ._dynamics import LearningRate, Loss, TrainingCurve, check_run, given_rates
from .simulation import Descent


def simulate_adam(
    sign_gram: Tensor,  # (n, n)   (J sign(J)ᵀ + sign(J) Jᵀ)/2
    outputs0: Tensor,  # (N, C)   f_θ0(X)
    labels: Tensor,  # (N,) integer classes, or (N, C) float targets
    *,
    learning_rate: LearningRate,
    steps: int,
    betas: tuple[float, float] = (0.9, 0.999),
    loss: str | Loss = "cross_entropy",
    ridge: float = 0.0,
    held_out: tuple[Tensor, Tensor, Tensor] | None = None,  # cross sign_gram (m, n), outputs0 (M, C), labels
    batches: Sequence[Tensor] | None = None,
    base: Tensor | None = None,  # (n, n), with `held_out` (n + m, n)
    selective: bool = False,
    record_every: int = 1,
) -> TrainingCurve:
    """Approximates Adam's training of the linearised model by the sign kernel (`compute_ntk(..., kernel="sign")`).

    Adam moves coordinate p by `−η m̂_p/√v̂_p`, m and v being moments of the gradient `g_p = Σ_i e_i J_ip`, `e = ∂R/∂f`.
    If every row had the same size `a_p` in a coordinate, `J_ip = a_p sign(J_ip)`, then `g_p = a_p u_p` with
    `u_p = Σ_i e_i sign(J_ip)`, and a_p would cancel. Two approximations make a kernel method of it: that one, and that
    `u_p²` is about its mean over the coordinates, which is `eᵀSe` with `S = sign(J) sign(J)ᵀ/P`. S in turn is taken
    from the kernel by the arcsine law of Gaussian rows, `S_ij = (2/π) asin(K_ij/√(K_ii K_jj))`. Then, with
    `θ−θ0 = sign(J)ᵀ c`,

        m ← β1 m + (1−β1) e,    v ← β2 v + (1−β2) eᵀSe,    c ← (c − η m̂/√v̂)/(1 + ηλ),    f = f_θ0 + K c,

    hats being Adam's bias corrections. `betas=(0, 0)` is sign descent (Malladi et al., arXiv 2210.05643, to whom the
    sign kernel is due). The scale of the loss cancels, as it does in Adam. Steps tend to come out too short, because
    the pooled `eᵀSe` is larger than what Adam divides most coordinates by. O(n²) a recorded step.

    Args:
        ridge: λ, decoupled as in `simulate_training(proximal_mode="decoupled")`; weight decay there is none.
        learning_rate, loss, held_out, batches, base, selective, record_every: as in `simulate_training`.

    Returns:
        TrainingCurve whose `coefficients` c are those of sign(J) and whose `distance` is NaN: a sign kernel does not
        know it.

    Raises:
        KernelError: as `simulate_training`; betas that are not in [0, 1); a kernel whose diagonal is not positive (no
            sign kernel has that, but where all rows of an output are zero).
    """
    check_run(outputs0, steps, ridge, batches, record_every)
    if not all(0 <= beta < 1 for beta in betas):
        raise KernelError(f"betas must be in [0, 1), got {betas}")
    adam = _KernelAdam(sign_gram, outputs0, held_out, base, ridge, "decoupled", selective)
    adam.betas, adam.signs = betas, _sign_correlation(sign_gram)
    return adam.run(loss, labels, given_rates(learning_rate, steps), batches, record_every)


class _KernelAdam(Descent):
    betas: tuple[float, float]
    signs: Tensor  # (n, n) S
    first: Tensor | None = None  # (n,) m
    second = 0.0  # v
    count = 0

    def step(self, gradient: Tensor, examples: Tensor | None, learning_rate: float) -> None:
        pull = learning_rate * self.ridge if self._acts(gradient, examples) else 0.0
        beta1, beta2 = self.betas
        error = self._spread(gradient, examples)
        self.count += 1
        first = torch.zeros_like(error) if self.first is None else self.first
        self.first = beta1 * first + (1 - beta1) * error
        self.second = beta2 * self.second + (1 - beta2) * float((error @ (self.signs @ error)).clamp_min(0.0))
        size = math.sqrt(self.second / (1 - beta2**self.count))
        rate = learning_rate / (1 - beta1**self.count) / size if size > 0 else 0.0
        self.c = (self.c - rate * self.first) / (1 + pull)
        if self.c0 is not None:
            self.c0 = self.c0 - rate * self.first

    def distance(self) -> Tensor:
        return self.c.new_tensor(torch.nan)


def _sign_correlation(sign_gram: Tensor) -> Tensor:
    gram = sign_gram.detach().double()
    diagonal = gram.diagonal()
    if not bool((diagonal > 0).all()):
        raise KernelError(
            f"{int((diagonal <= 0).sum())} diagonal entries of the sign kernel are not positive, so it has no scale; "
            "leave the examples out whose outputs no parameter moves"
        )
    scale = diagonal.sqrt()
    return (gram / scale[:, None] / scale).clamp(-1, 1).asin() * (2 / math.pi)
