# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The proximal term of fine-tuning, on tensors alone: distances, gradients, proximal operators, the selective rule.

Notation. A LoRA module has the factors `A` of shape (r, d_in) and `B` of shape (d_out, r) and adds `s·B·A` to its
weight, s being the scaling (alpha/r). `θ` are the factors of all modules, `θ0` their anchor: the pretrained model.
The training objective is `R(θ) + (λ/2)·D(θ)` ("Linearization Explains Fine-Tuning in Large Language Models",
arXiv 2602.08239, section 3), with

- **factor space** (the paper's) `D = Σ ‖A−A0‖² + ‖B−B0‖²`;
- **delta space** `D = Σ ‖s·BA − s·B0A0‖_F²`, the distance of the weights, the same for every way of writing BA;
- **function space** `D = Σ g·tr(E C Eᵀ)`, E = s·BA − s·B0A0, C the second moment of the module's inputs and g the mean
  square of its outputs' cotangents, both on reference data: ½·D is the KL divergence from the pretrained model to
  second order, in the Kronecker-factored approximation. Delta space is C = I, g = 1. `moment` is C; g is part of λ.

An anchor of `None` stands for zeros, so that the `B0 = 0` of a fresh adapter is never stored. Functions on lists work
on the factors of many modules at once (`torch._foreach_*`); those on one `(A, B)` also take leading batch dimensions.
`step` is η·λ (learning rate times λ), a float or a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .second_moment import SecondMoment


Anchor = Tensor | None


def inner_product(gradients: Sequence[Tensor], parameters: Sequence[Tensor], anchors: Sequence[Anchor]) -> Tensor:
    """⟨∇R(θ), θ−θ0⟩ over all given tensors: the selective rule acts where it is >= 0 (arXiv 2602.08239, eq. 8).

    Returns a float64 scalar on the first tensor's device (float32 where the device has no float64). O(number of
    parameters), a fixed number of kernels per device and dtype.
    """
    if not parameters:
        return torch.zeros((), dtype=torch.float64)
    groups: dict[tuple, list[int]] = {}
    for index, parameter in enumerate(parameters):
        groups.setdefault((parameter.device, parameter.dtype), []).append(index)
    home = parameters[0].device
    total = torch.zeros((), dtype=wide_dtype(home), device=home)
    for members in groups.values():
        moved = differences([parameters[i] for i in members], [anchors[i] for i in members])
        wide = wide_dtype(moved[0].device)
        flat_gradient = torch.cat([gradients[i].reshape(-1) for i in members]).to(wide)
        flat_difference = torch.cat([difference.reshape(-1) for difference in moved]).to(wide)
        total += torch.dot(flat_gradient, flat_difference).to(home)
    return total


def squared_distance(parameters: Sequence[Tensor], anchors: Sequence[Anchor]) -> Tensor:
    """‖θ−θ0‖² in factor space, a float64 scalar (float32 where the device has no float64). O(number of parameters)."""
    if not parameters:
        return torch.zeros((), dtype=torch.float64)
    home = parameters[0].device
    total = torch.zeros((), dtype=wide_dtype(home), device=home)
    for parameter, anchor in zip(parameters, anchors, strict=True):
        wide = parameter.detach().to(wide_dtype(parameter.device))
        total += (wide if anchor is None else wide - anchor.to(wide)).square().sum().to(home)
    return total


def factor_gradient(parameters: Sequence[Tensor], anchors: Sequence[Anchor], strength: float | Tensor) -> list[Tensor]:
    """λ·(θ−θ0), the gradient of (λ/2)·‖θ−θ0‖², `strength` being λ. New tensors, shaped as the parameters."""
    return [difference * _on(strength, difference) for difference in differences(parameters, anchors)]


def factor_proximal_step_(
    parameters: Sequence[Tensor],
    anchors: Sequence[Anchor],
    step: float | Tensor,
    gate: Tensor | None = None,
) -> None:
    """In place `θ ← θ0 + (θ−θ0)/(1+ηλ)`: the exact proximal operator of η·(λ/2)·‖·−θ0‖², `step` being ηλ.

    Proof: the minimiser of ½‖x−θ‖² + (ηλ/2)‖x−θ0‖² has x−θ + ηλ(x−θ0) = 0. For step → ∞ the result is θ0. A `gate` of
    0 leaves every bit as it was, one of 1 does the step; being a tensor, it never makes the host wait for the device.
    """
    divisor = 1 + step
    pulled = torch._foreach_div(differences(parameters, anchors), divisor)
    moved = [i for i, anchor in enumerate(anchors) if anchor is not None]
    if moved:
        torch._foreach_add_([pulled[i] for i in moved], [anchor for anchor in anchors if anchor is not None])
    if gate is None:
        torch._foreach_copy_(list(parameters), pulled)
    else:
        torch._foreach_lerp_(list(parameters), pulled, [gate.to(parameter) for parameter in parameters])


def delta_squared_distance(
    a: Tensor,  # (..., r, d_in)
    b: Tensor,  # (..., d_out, r)
    a0: Anchor,  # (..., r0, d_in)
    b0: Anchor,  # (..., d_out, r0)
    scaling: float,
    moment: SecondMoment | None = None,
) -> Tensor:  # (...)
    """‖s·BA − s·B0A0‖_F² or tr(E C Eᵀ), from r×r Gram matrices in float64 where the device has it; E is not formed.

    With a zero anchor product (a0 or b0 is None): s²·tr(BᵀB·AAᵀ). Otherwise BA − B0A0 = (B−B0)A + B0(A−A0) = PQ with
    P = [B−B0, B0] and Q = [A; A−A0], and the distance is s²·tr(PᵀP·QQᵀ). Written with differences, it has no
    cancellation near the anchor. Cost O((d_in + d_out)·r²).
    """
    left, right = b, a
    wide = wide_dtype(a.device)
    if a0 is not None and b0 is not None:
        left = torch.cat([b.to(wide) - b0.to(wide), b0.to(wide)], dim=-1)
        right = torch.cat([a.to(wide), a.to(wide) - a0.to(wide)], dim=-2)
    product = (_columns_gram(left) * _rows_gram(right, moment).mT).sum(dim=(-2, -1))
    return product.clamp_min(0) * float(scaling) ** 2


def delta_gradient(
    a: Tensor,  # (..., r, d_in)
    b: Tensor,  # (..., d_out, r)
    a0: Anchor,
    b0: Anchor,
    strength: float | Tensor,  # λs², a scalar or (..., 1, 1)
    moment: SecondMoment | None = None,
) -> tuple[Tensor, Tensor]:  # shaped as a, b
    """Gradient of (λ/2)·tr(E C Eᵀ)·s² with respect to (A, B): (λs²·BᵀEC, λs²·ECAᵀ), E = BA − B0A0, C = I by default.

    E is never formed: with X = B−B0 and Y = A−A0, E·C·Aᵀ = X(ACAᵀ) + B0(YCAᵀ) and Bᵀ·E = (BᵀX)A + (BᵀB0)Y. Cost
    O((d_in + d_out)·r²), and O(d_in·r·k) with C.
    """
    a_work, b_work = _working(a), _working(b)
    scale = _on(strength, a_work)
    if a0 is None or b0 is None:
        gradient_a = _columns_gram(b).to(a_work) @ a_work
        gradient_b = b_work @ _rows_gram(a, moment).to(b_work)
    else:
        x, y = b_work - b0.to(b_work), a_work - a0.to(a_work)
        gradient_a = (b_work.mT @ x) @ a_work + (b_work.mT @ b0.to(b_work)) @ y
        gradient_b = x @ _rows_gram(a, moment).to(b_work) + b0.to(b_work) @ (_times(y, moment) @ a_work.mT)
    gradient_a = _times(gradient_a, moment)
    return (gradient_a * scale).to(a.dtype), (gradient_b * scale).to(b.dtype)


def delta_proximal_step(
    a: Tensor,  # (..., r, d_in)
    b: Tensor,  # (..., d_out, r)
    a0: Anchor,
    b0: Anchor,
    step_a: float | Tensor,  # η_A·λs², a scalar or (..., 1, 1)
    step_b: float | Tensor,  # η_B·λs², a scalar or (..., 1, 1)
    moment: SecondMoment | None = None,
) -> tuple[Tensor, Tensor]:  # the new a, b
    """One sweep of exact block-proximal steps of (λ/2)·‖s·BA − s·B0A0‖²: first in B, then in A with the new B.

    With `moment` of (λ/2)·tr(E C Eᵀ), E = s·BA − s·B0A0.

    The joint proximal operator has no closed form, because the penalty is not convex in (A, B); in either factor alone
    it is quadratic. With step μ, the minimiser over B of ½‖B−B̃‖² + (μ/2)‖BA − B0A0‖² has, for X = B−B0 and
    E = XA + B0(A−A0),  X·(I + μAAᵀ) = X̃ − μB0(A−A0)Aᵀ: one r×r solve. Likewise for A, with Y = A−A0 and
    E = BY + (B−B0)A0:  (I + μBᵀB)·Y = Ỹ − μBᵀ(B−B0)A0. Each block never increases its objective, whatever μ (an
    explicit gradient step diverges for μ‖A‖² > 2); for μ → ∞, B0A0 = 0 and A of full row rank, B → 0, the pretrained
    weight. To first order in μ the sweep is the gradient step. μ = 0 leaves every bit as it was: the change is
    computed, not the value, which also keeps it small where matrix products are rounded to TF32.
    Cost O((d_in + d_out)·r²).

    With C the system for B has ACAᵀ in place of AAᵀ, and the one for A is Y + μBᵀB·Y·C = Ỹ − μBᵀ(B−B0)A0·C: with
    BᵀB = QΛQᵀ the rows z_i of QᵀY are independent, z_i(I + μΛ_i·C). Cost O(d_in·r·k²) more, C being diag + rank k.
    """
    a_work, b_work = _working(a), _working(b)
    gram = _rows_gram(a, moment)
    if a0 is None or b0 is None:
        b_new = b_work - b_work @ _shrinkage(gram, step_b).to(b_work)
        a_new = a_work - _shrunk_rows(a_work, _columns_gram(b_new), step_a, moment)
        return a_new.to(a.dtype), b_new.to(b.dtype)
    a_start, b_start = a0.to(a_work), b0.to(b_work)
    cross = _times(a_work - a_start, moment) @ a_work.mT
    b_new = b_work - (b_work - b_start) @ _shrinkage(gram, step_b).to(b_work)
    b_new = b_new - b_start @ (cross @ _resolvent(gram, step_b).to(b_work) * _on(step_b, cross))
    gram, cross = _columns_gram(b_new), b_new.mT @ (b_new - b_start)
    if moment is None:
        a_new = a_work - _shrinkage(gram, step_a).to(a_work) @ (a_work - a_start)
        a_new = a_new - (_resolvent(gram, step_a).to(a_work) @ cross * _on(step_a, cross)) @ a_start
    else:
        a_new = a_work - _shrunk_rows(a_work - a_start, gram, step_a, moment, cross @ a_start)
    return a_new.to(a.dtype), b_new.to(b.dtype)


def _shrunk_rows(
    rows: Tensor, gram: Tensor, step: float | Tensor, moment: SecondMoment | None, anchored: Tensor | None = None
) -> Tensor:
    """Y − Z with Z + μG·Z·C = Y − μ·R·C, for a positive semidefinite r×r G and R = `anchored` (default 0)."""
    if moment is None:
        return _shrinkage(gram, step).to(rows) @ rows
    values, vectors = torch.linalg.eigh(torch.nan_to_num(gram))  # it raises for NaN, which B holds all the same
    step = _on(step, gram)
    step = step.squeeze(-1) if isinstance(step, Tensor) and step.ndim else step
    values = values.clamp_min(0)
    weights = values * step
    change = moment.shrink_rows(vectors.mT.to(rows) @ rows, weights, gram.dtype)
    if anchored is not None:
        # μ·x·C(I + wC)⁻¹, w = μΛ, in the form without cancellation: (x·C·μ) less its shrinkage, or x's over Λ
        turned = vectors.mT.to(rows) @ anchored
        scaled = moment.times(turned) * (torch.ones_like(values) * step).to(rows).unsqueeze(-1)
        weak = scaled - moment.shrink_rows(scaled, weights, gram.dtype)
        strong = moment.shrink_rows(turned, weights, gram.dtype) / values.to(rows).clamp_min(
            torch.finfo(rows.dtype).tiny
        ).unsqueeze(-1)
        change = change + torch.where((weights <= 1).unsqueeze(-1), weak, strong)
    return vectors.to(rows) @ change


def _times(rows: Tensor, moment: SecondMoment | None) -> Tensor:
    return rows if moment is None else moment.times(rows)


def _resolvent(gram: Tensor, step: float | Tensor) -> Tensor:
    """(I + μG)⁻¹ for a positive semidefinite r×r G."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    system = identity + gram * _on(step, gram)
    return torch.linalg.solve_ex(system, identity.expand_as(system))[0]


def _shrinkage(gram: Tensor, step: float | Tensor) -> Tensor:
    """I − (I + μG)⁻¹ = (I + μG)⁻¹μG, without the cancellation."""
    scaled = gram * _on(step, gram)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_ex(identity + scaled, scaled)[0]


def _rows_gram(matrix: Tensor, moment: SecondMoment | None = None) -> Tensor:
    if moment is not None:
        return moment.gram(_working(matrix), wide_dtype(matrix.device))
    wide = matrix.to(wide_dtype(matrix.device))
    return wide @ wide.mT


def _columns_gram(matrix: Tensor) -> Tensor:
    return _rows_gram(matrix.mT)


def differences(parameters: Sequence[Tensor], anchors: Sequence[Anchor]) -> list[Tensor]:
    """θ−θ0 per tensor, in the tensor's dtype; the parameter itself where the anchor is zero."""
    result = list(parameters)
    moved = [i for i, anchor in enumerate(anchors) if anchor is not None]
    if moved:
        held = [anchor for anchor in anchors if anchor is not None]
        for i, difference in zip(moved, torch._foreach_sub([parameters[i] for i in moved], held), strict=True):
            result[i] = difference
    return result


def _working(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype to accumulate in: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _on(value: float | Tensor, like: Tensor) -> float | Tensor:
    """The value in the dtype of `like`; numbers are limited to what it can hold, as infinity times zero is NaN."""
    limit = torch.finfo(like.dtype).max
    if isinstance(value, Tensor):
        return value.clamp(max=limit).to(device=like.device, dtype=like.dtype)
    return min(value, limit)
