# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Selective Projection Decay (Tian et al., NeurIPS 2024, arXiv 2411.01713), a baseline for the proximal term.

Per tensor, with `θ_{t−1}` the tensor before the optimizer's step, `g` the gradient there and `θ̃` the tensor after it:
if `⟨g, θ_{t−1}−θ0⟩ > 0` (strictly, else the first step of all would be 0/0), then

    ρ = clip((‖θ̃−θ0‖ − ‖θ_{t−1}−θ0‖) / ‖θ̃−θ0‖, 0, 1),    θ_t = θ̃ − λρ·(θ̃−θ0),

and otherwise `θ_t = θ̃`. λ has no unit and is not multiplied by the learning rate. λ = 1 is the projection of θ̃ onto
the ball around θ0 that θ_{t−1} lies on; above 1 the step goes beyond that ball, and for λρ > 1 beyond θ0 itself.
An anchor of `None` stands for zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .proximal import Anchor, differences, wide_dtype


def projection_sums(
    parameters: Sequence[Tensor], anchors: Sequence[Anchor], gradients: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """‖θ−θ0‖² of each tensor, and ⟨g, θ−θ0⟩ where gradients are given (else an empty list).

    Scalars on each tensor's device, float64 (float32 where it has no float64), which the host never reads. Cost
    O(number of parameters); a fixed number of kernels per shape, dtype and device. Where processes hold parts of the
    tensors, sums over the parts are the sums of the tensors.
    """
    moved = differences(parameters, anchors)
    squares = [torch.empty(())] * len(moved)
    products = [torch.empty(())] * (0 if gradients is None else len(moved))
    for members in _of_equal_shape(moved):
        rows = torch.stack([moved[i].reshape(-1) for i in members])
        rows = rows.to(wide_dtype(rows.device))
        for i, square in zip(members, rows.square().sum(dim=1), strict=True):
            squares[i] = square
        if gradients is not None:
            slopes = torch.stack([gradients[i].reshape(-1) for i in members]).to(rows)
            for i, product in zip(members, (slopes * rows).sum(dim=1), strict=True):
                products[i] = product
    return squares, products


def projection_step_(
    parameters: Sequence[Tensor],
    anchors: Sequence[Anchor],
    fires: Sequence[Tensor],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    strengths: Sequence[float],
) -> None:
    """In place `θ ← θ̃ − λρ·(θ̃−θ0)` where a tensor fires; the others keep every bit.

    Args:
        parameters: θ̃, after the optimizer's step.
        anchors: θ0.
        fires: 1 per tensor with ⟨g, θ_{t−1}−θ0⟩ > 0, 0 for the others.
        before, after: ‖θ_{t−1}−θ0‖² and ‖θ̃−θ0‖², from `projection_sums`.
        strengths: λ per tensor.
    """
    moved = differences(parameters, anchors)
    for members in _of_equal_shape(moved):
        old, new, fired = (torch.stack([values[i] for i in members]) for values in (before, after, fires))
        old, new = old.sqrt(), new.sqrt()
        # no 0/0 where the step led to the anchor itself
        ratios = ((new - old) / new.clamp_min(torch.finfo(new.dtype).tiny)).clamp(0, 1)
        shrinkage = ratios * fired * new.new_tensor([strengths[i] for i in members])
        changes = torch._foreach_mul([moved[i] for i in members], list(shrinkage.to(moved[members[0]]).unbind()))
        torch._foreach_sub_([parameters[i] for i in members], changes)


def _of_equal_shape(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Positions of the tensors that can be stacked."""
    groups: dict[tuple, list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append(index)
    yield from groups.values()
