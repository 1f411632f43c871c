# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Search for the best set of modules within a budget, with the exact sum rule `K_{S∪m} = K_S + K_m`."""

from __future__ import annotations

import math
from dataclasses import replace

from ...errors import BudgetError, CriterionError
from ...recommendation.budget import Budget, fill
from ..criteria import Criterion, rank_by_score
from .exhaustive import best_of_all
from .scoring import SubsetScorer
from .search_result import SearchResult
from .strategies import backward, best_of_additive, greedy, in_order, ordered, swap


STRATEGIES = ("greedy", "backward", "swap", "top", "exhaustive")
OTHER_NAMES = {"forward": "greedy"}
MAX_SUBSETS = 20_000  # of an exhaustive search
MAX_BOUNDED_SUBSETS = 200_000  # where branch and bound scores about one in ten or fewer


def check_strategy(strategy: str, candidates: int, budget: Budget, criterion: Criterion | None = None) -> str:
    """Refuses what `search` cannot do, before kernels are scored; the strategy's name in `STRATEGIES`.

    Args:
        criterion: What is searched by, where that is known. For additive criteria an exhaustive search enumerates
            nothing; for those that are monotone and have a bound it leaves most sets out.

    Raises:
        CriterionError: an unknown strategy.
        BudgetError: an exhaustive search of more than 20,000 sets, or 200,000 by such a bound.
    """
    strategy = OTHER_NAMES.get(strategy, strategy)
    if strategy not in STRATEGIES:
        raise CriterionError(f"unknown strategy {strategy!r}; there are: {', '.join(STRATEGIES)}")
    if strategy != "exhaustive" or (criterion is not None and criterion.additive):
        return strategy
    most = MAX_BOUNDED_SUBSETS if criterion is not None and criterion.branches else MAX_SUBSETS
    sets = math.comb(candidates, budget.modules) if budget.modules is not None else 2**candidates
    if sets > most:
        raise BudgetError(
            f"an exhaustive search over {candidates} candidates with a budget of {budget} is {sets:,} sets, more than "
            f'{most:,}; use strategy="swap", whose answer no exchange of one module improves, or "greedy", or fewer '
            "candidates"
        )
    return strategy


def search(scorer: SubsetScorer, budget: Budget, strategy: str) -> SearchResult:
    """The best set within the budget, which is always used up: no further candidate fits.

    Args:
        strategy: "greedy" (or "forward"): forward selection, one module a round. "backward": all candidates, less one
            module a round until the rest fits; then what still fits beside it. "swap": greedy, then the best exchange
            of a chosen module for another, until none improves the set. "top": the best modules on their own.
            "exhaustive": every set that fits and to which nothing can be added; with criteria that are monotone and
            have a bound, by branch and bound.

            Greedy and backward search with a budget in parameters run twice, by score and by score per parameter, and
            keep the better set (neither alone is safe when modules differ in size). For additive criteria all but
            "top" give the best set there is: the best modules, or the solution of the knapsack problem.

            Where the criterion has a bound (`gain_bounds`), sets that cannot be the best of a round are not scored;
            the answer is the same.

    Raises:
        CriterionError, BudgetError: as `check_strategy`.
    """
    strategy = check_strategy(strategy, len(scorer.kernels), budget, scorer.criterion)
    if strategy == "top":
        result = in_order(
            scorer, fill(rank_by_score(scorer.singles, scorer.criterion), budget, scorer.kernels.num_parameters)
        )
    elif scorer.criterion.additive:
        result = best_of_additive(scorer, budget)
    elif strategy == "exhaustive":
        goal = -math.inf
        if scorer.criterion.branches:
            goal = scorer.criterion.utility(swap(scorer, budget, greedy(scorer, budget)).path[-1])
        result = ordered(scorer, best_of_all(scorer, budget, goal))
    elif strategy == "backward":
        result = backward(scorer, budget)
    else:
        result = greedy(scorer, budget)
        result = swap(scorer, budget, result) if strategy == "swap" else result
    return replace(result, evaluations=scorer.evaluations, skipped=scorer.skipped)
