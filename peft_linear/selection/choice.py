# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The choice: which candidates are taken within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..recommendation.budget import Budget
from .criteria import Criterion, View
from .exclusion import excluded_candidates
from .search.search import SearchResult, search


@dataclass(frozen=True)
class Choice:
    """The modules of `result.order`, best first, and what they were chosen from."""

    result: SearchResult
    budget: Budget
    strategy: str
    excluded: tuple[str, ...]  # scored, but not chosen because of `exclude`

    @property
    def modules(self) -> tuple[str, ...]:
        return self.result.order


def choose(
    view: View,
    scores: Mapping[str, float],
    criterion: Criterion,
    budget: Budget,
    strategy: str,
    exclude: str | Sequence[str],
) -> Choice:
    """The best set of the candidates that are not excluded.

    Args:
        view: What the criterion is evaluated on.
        scores: Of every candidate alone.
    """
    excluded = excluded_candidates(view.kernels.num_parameters, budget, exclude)
    free = {name: score for name, score in scores.items() if name not in excluded}
    if excluded:
        view = View(view.kernels.select_modules(free), view.problem)
    result = search(view, criterion, free, budget, strategy)
    return Choice(replace(result, evaluations=result.evaluations + len(excluded)), budget, strategy, excluded)
