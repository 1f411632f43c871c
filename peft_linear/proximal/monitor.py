# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Monitoring of ProximalLoRA adapters during training: distance from the anchor, what was removed, present λ."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import PeftLinearError
from ..functional.proximal import delta_squared_distance, squared_distance
from ..tuners.proximal_lora.config import SPACES, variants_without_product
from ..tuners.proximal_lora.state import find_adapters
from ..tuners.proximal_lora.tracked import TrackedAdapter
from .delta_space import anchor_matrices, matrices
from .shards import local_part, part_of, total, whole


def proximal_distance(model: nn.Module, adapter_name: str | None = None, space: str | None = None) -> float:
    """‖θ−θ0‖, how far the adapter is from the pretrained model.

    Args:
        model: the model, or anything around it (PeftModel, DDP, a compiled model).
        adapter_name: one adapter; default: all active ones together.
        space: `"factors"` (root of Σ ‖A−A0‖² + ‖B−B0‖²) or `"delta"` (root of Σ ‖s·BA − s·B0A0‖_F², the distance of
            the weights) or `"function"` (root of Σ g·tr(E C Eᵀ), on the adapter's reference: half of its square is
            about KL(pretrained ‖ tuned) there, in nats a token); default: the one that the adapter is configured with.

    Returns:
        The distance, accumulated in float64. O(number of adapter parameters · r) at most. Where factors are sharded
        (FSDP2), that of the whole factors; all ranks must then call it.

    Raises:
        PeftLinearError: no such adapter or space.
    """
    if space is not None and space not in SPACES:
        raise PeftLinearError(f"space must be one of {', '.join(map(repr, SPACES))}, got {space!r}")
    squares = [_squared(adapter, space) for adapter in find_adapters(model, adapter_name)]
    return math.sqrt(sum(squares))


def proximal_firing_rate(model: nn.Module, adapter_name: str | None = None) -> float:
    """Fraction of the optimizer steps so far with λ > 0 at which the term acted (1 without the selective rule).

    Of one adapter, or of all active ones together; NaN before the first step, and with λ = 0. A run that is resumed
    with its optimizer's state continues the count. With `proximal_mode="projection"`, which decides tensor by tensor,
    it is the fraction of the tensors, averaged over the steps.

    Raises:
        PeftLinearError: no such adapter.
    """
    counts = [adapter.statistics.total() for adapter in find_adapters(model, adapter_name)]
    active = sum(float(each.active) for each in counts)
    return sum(float(each.fired) for each in counts) / active if active else float("nan")


def proximal_strength(model: nn.Module, adapter_name: str | None = None) -> dict[str, float]:
    """λ of the last optimizer step (before the first step: of the first), of the named adapter or of all active ones.

    By adapter name: `proximal_lambda` times the factors of the schedule and of a budget of KL. The values of
    `proximal_lambda_pattern` are multiplied by the same factors.

    It is NaN where `proximal_lambda="auto"` and the run is not known yet.

    Raises:
        PeftLinearError: no such adapter.
    """
    return {
        adapter.name: adapter.strengths.common
        * adapter.strengths.gain
        * adapter.strengths.factor(max(adapter.statistics.position - 1, 0))
        for adapter in find_adapters(model, adapter_name)
    }


def proximal_exponent(model: nn.Module, adapter_name: str | None = None) -> float:
    """Σ λ_t·η_t over the optimizer steps at which a decoupled term acted, of one adapter or of all active ones.

    In factor space a displacement that no gradient opposes has been multiplied by exp(−this); in delta space one
    along a direction in which s²·AAᵀ is 1. The largest, where adapters, modules or parameter groups differ. 0 before
    the first step, with λ = 0, and for other modes, whose λ is not multiplied by the learning rate alone. A run that
    is resumed with its optimizer's state continues the sum.

    Raises:
        PeftLinearError: no such adapter.
    """
    return max(adapter.statistics.exponent for adapter in find_adapters(model, adapter_name))


def proximal_summary(model: nn.Module) -> dict[str, float]:
    """The quantities that `ProximalCallback` logs about the active adapters, by the names it logs them under.

    `proximal_exponent` is λ·Ση so far, `proximal_removed_share` the share 1 − exp(−λ·Ση) of an unopposed displacement
    that it removes: see `proximal_exponent`. `proximal_firing_rate` is there where the term may not act: with
    `proximal_selective=True` or `proximal_mode="projection"`.

    Raises:
        PeftLinearError: there is no active ProximalLoRA adapter.
    """
    adapters = find_adapters(model)
    summary = {"proximal_distance": proximal_distance(model, space="factors")}
    if not any(variants_without_product(adapter.config) for adapter in adapters):
        summary["proximal_distance_delta"] = proximal_distance(model, space="delta")
        if all(adapter.has_reference() for adapter in adapters):
            summary["proximal_distance_function"] = proximal_distance(model, space="function")
    strengths = {name: value for name, value in proximal_strength(model).items() if not math.isnan(value)}
    if len(set(strengths.values())) == 1:
        summary["proximal_lambda"] = next(iter(strengths.values()))
    else:
        summary.update({f"proximal_lambda_{name}": strength for name, strength in strengths.items()})
    exponent, rate = proximal_exponent(model), proximal_firing_rate(model)
    if exponent > 0:
        summary["proximal_exponent"] = exponent
        summary["proximal_removed_share"] = -math.expm1(-exponent)
    chosen = any(each.config.proximal_selective or each.config.proximal_mode == "projection" for each in adapters)
    if chosen and not math.isnan(rate):
        summary["proximal_firing_rate"] = rate
    return summary


def _squared(adapter: TrackedAdapter, space: str | None) -> float:
    space = space or adapter.config.proximal_space
    variants = variants_without_product(adapter.config)
    if space != "factors" and variants:
        raise PeftLinearError(
            f"adapter {adapter.name!r} has {', '.join(variants)}, with which the change of the weight is not s·B·A; "
            "use space='factors'"
        )
    with torch.no_grad():
        return _squared_in_factors(adapter) if space == "factors" else _squared_in_weights(adapter, space)


def _squared_in_factors(adapter: TrackedAdapter) -> float:
    pairs = [(p, start) for f in adapter.factors() for p, start in ((f.a, f.anchor.a), (f.b, f.anchor.b))]
    parts = [local_part(parameter) for parameter, _ in pairs]
    starts = [None if start is None else part_of(start, parameter) for parameter, start in pairs]

    def local_sum(members: list[int]) -> Tensor:
        return squared_distance([parts[i] for i in members], [starts[i] for i in members])

    return float(total([parameter for parameter, _ in pairs], local_sum))


def _squared_in_weights(adapter: TrackedAdapter, space: str) -> float:
    reference = adapter.reference() if space == "function" else None
    square = 0.0
    for f in adapter.factors():
        a, b = matrices(f.layer, whole(f.a), whole(f.b))
        a0, b0 = anchor_matrices(f) or (None, None)
        scaling = float(f.layer.scaling[adapter.name])
        moment = None if reference is None else reference.moment(f.name).to(a.device)
        scale = 1.0 if reference is None else reference.scales[f.name]
        square += scale * float(delta_squared_distance(a, b, a0, b0, scaling, moment).sum())
    return square
