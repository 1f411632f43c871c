# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Numbers and labels as the reports print them: improvements over no adapter, one notation for a column."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..recommendation.budget import BudgetLike
from ..recommendation.data import RecommendationData


_DECADES = 3.0  # wider than this, numbers are printed with exponents


def improvements(recommendation: RecommendationData) -> tuple[dict[str, float], str]:
    """Improvement of the score by each module (higher is better), and a label.

    Where the score without any adapter is not known, the scores themselves.
    """
    rec = recommendation
    higher = rec.settings.higher_is_better
    start = rec.settings.start_score
    if start is None:
        return {row.name: row.score for row in rec.scores}, f"{criterion_label(rec)} ({direction(rec)})"
    without = "the head alone" if rec.settings.always_trained else "no adapter"
    values = {row.name: row.score - start if higher else start - row.score for row in rec.scores}
    return values, f"improvement of the {criterion_label(rec)} over {without} ({start:.4g})"


def criterion_label(recommendation: RecommendationData) -> str:
    """The criterion in words."""
    return recommendation.settings.criterion_label or recommendation.criterion


def direction(recommendation: RecommendationData) -> str:
    """Whether higher or lower scores are better."""
    return "higher is better" if recommendation.settings.higher_is_better else "lower is better"


def budget_words(budget: BudgetLike) -> str:
    """The budget as a reader says it."""
    if isinstance(budget, (list, tuple)):
        return " and ".join(map(budget_words, budget))
    if isinstance(budget, str):
        kind, colon, amount = (part.strip() for part in budget.partition(":"))
        if not colon:
            return f"{budget} parameters"
        return f"{amount} layers" if kind == "layers" else f"{amount} of the {kind} of an all-linear step"
    if isinstance(budget, float):
        return f"{budget:.0%} of the candidates' adapter parameters"
    return f"{budget} module{'s' * (budget != 1)}"


def step_words(recommendation: RecommendationData) -> str:
    """Time and memory of a training step of the choice; "" where they are not known."""
    rec = recommendation
    if rec.step_time is None or rec.step_memory is None:
        return ""
    return (
        f"A training step takes about {rec.step_time:.0%} of the time and {rec.step_memory:.0%} of the memory of an "
        f"all-linear LoRA step at rank {rec.settings.rank}."
    )


def known(value: object) -> object:
    """The value, or "?" where there is none."""
    return "?" if value is None else value


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
