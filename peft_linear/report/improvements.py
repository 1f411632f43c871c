# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""How much better each candidate is than no adapter, and how to print numbers that are read beside each other."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..recommendation.recommendation import Recommendation

_DECADES = 3.0  # wider than this, numbers are printed with exponents


def improvements(recommendation: Recommendation) -> tuple[dict[str, float], str]:
    """{module: what its adapter improves the score by}, more is better, and what these numbers are.

    Where the score without any adapter is not known, the scores themselves, whose better end the words name.
    """
    rec = recommendation
    higher = bool(rec.settings.get("higher_is_better"))
    start = rec.settings.get("start_score")
    if start is None:
        return {row.name: row.score for row in rec.scores}, f"{criterion_label(rec)} ({direction(rec)})"
    without = "the head alone" if rec.settings.get("always_trained") else "no adapter"
    values = {row.name: row.score - start if higher else start - row.score for row in rec.scores}
    return values, f"improvement of the {criterion_label(rec)} over {without} ({start:.4g})"


def criterion_label(recommendation: Recommendation) -> str:
    """The criterion in words."""
    return str(recommendation.settings.get("criterion_label", recommendation.criterion))


def direction(recommendation: Recommendation) -> str:
    """Which end of the scores is the better one."""
    return "higher is better" if recommendation.settings.get("higher_is_better") else "lower is better"


def alike(values: Iterable[float]) -> dict[float, str]:
    """{value: text} in one notation for all: so many decimals, or exponents where they span decades."""
    values = list(values)
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    if not sizes:
        return {value: _scientific(value) for value in values}
    top, span = math.log10(max(sizes)), math.log10(max(sizes) / min(sizes))
    if span > _DECADES or not -2 <= top < 6:
        return {value: _scientific(value) for value in values}
    decimals = max(0, 2 - math.floor(top))
    return {value: f"{value:,.{decimals}f}".replace("-", "−") for value in values}


def _scientific(value: float) -> str:
    if not value or not math.isfinite(value):
        return f"{value:g}".replace("inf", "∞").replace("-", "−")
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")
