# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Search for the best set of modules within a budget, with the exact sum rule `K_{S∪m} = K_S + K_m`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from ...errors import CriterionError
from ...recommendation.budget import Budget, fill
from ..criteria import Criterion, View, rank_by_score
from .knapsack import best_set


STRATEGIES = ("greedy", "top")


@dataclass(frozen=True)
class SearchResult:
    """The set that a search chose, and the scores on the way.

    Args:
        order: The modules, best first: in the order in which greedy selection among them takes them.
        start: Score of the always-trained parameters alone (nothing chosen).
        path: Score of the set after each module of `order`.
        last_round: Score that the final set would have had with a rejected module in place of the last chosen one;
            only of modules that fitted.
        evaluations: Kernels that were scored.
    """

    order: tuple[str, ...]
    start: float
    path: tuple[float, ...]
    last_round: Mapping[str, float] = field(default_factory=dict)
    evaluations: int = 0


def check_strategy(strategy: str) -> None:
    """Raises `CriterionError` for a strategy that does not exist."""
    if strategy not in STRATEGIES:
        raise CriterionError(f"unknown strategy {strategy!r}; there are: {', '.join(STRATEGIES)}")


def search(
    view: View, criterion: Criterion, singles: Mapping[str, float], budget: Budget, strategy: str = "greedy"
) -> SearchResult:
    """The best set within the budget, which is always used up: no further candidate fits.

    Args:
        view: Kernels of the candidates, and the problem.
        singles: Score of every candidate alone.
        strategy: "greedy": forward selection, one module a round. For additive criteria, where gains add, it is the
            best set there is: the best modules, or the solution of the knapsack problem. With other criteria and a
            budget in parameters it runs by score and by score per parameter, and the better set is kept (neither
            alone is safe when modules differ in size). "top": the best modules on their own.

    Cost: with additive criteria no evaluation beyond `singles`; else one for each candidate and round.

    Raises:
        CriterionError: as `check_strategy`.
    """
    check_strategy(strategy)
    scorer = _Scorer(view, criterion, singles)
    sizes = view.kernels.num_parameters
    if strategy == "top":
        result = _in_order(scorer, fill(rank_by_score(singles, criterion), budget, sizes))
    elif criterion.additive:
        result = _best_of_additive(scorer, budget)
    else:
        runs = [_greedy(scorer, budget, per_parameter=False)]
        if budget.parameters is not None and len(set(sizes.values())) > 1:
            runs.append(_greedy(scorer, budget, per_parameter=True))
        result = max(runs, key=lambda run: criterion.utility(run.path[-1]))
    return replace(result, evaluations=scorer.evaluations)


class _Scorer:
    """Scores kernels of sets by one criterion, and counts."""

    def __init__(self, view: View, criterion: Criterion, singles: Mapping[str, float]) -> None:
        self.kernels, self.criterion, self.singles = view.kernels, criterion, singles
        self._problem = view.problem
        self.start = criterion(view.kernels.base, view.problem)
        self.evaluations = len(singles) + 1

    def score(self, gram: Tensor) -> float:
        self.evaluations += 1
        return self.criterion(gram, self._problem)


def _best_of_additive(scorer: _Scorer, budget: Budget) -> SearchResult:
    """Gains add: the best modules, or the solution of the knapsack problem."""
    sizes, ranked = scorer.kernels.num_parameters, rank_by_score(scorer.singles, scorer.criterion)
    order = ranked[: budget.modules]
    if budget.parameters is not None:
        utility = scorer.criterion.utility
        gains = {name: utility(scorer.singles[name]) - utility(scorer.start) for name in ranked}
        order = best_set(gains, sizes, budget.parameters)
    result = _in_order(scorer, order)
    used, last = sum(sizes[name] for name in order), order[-1]
    others = {
        name: result.path[-1] + scorer.singles[name] - scorer.singles[last]
        for name in scorer.kernels.names
        if name not in order and budget.fits(len(order), used - sizes[last] + sizes[name])
    }
    return replace(result, last_round=others)


def _in_order(scorer: _Scorer, order: Sequence[str]) -> SearchResult:
    """The score of each leading part of a set in the order given."""
    path: list[float] = []
    gram = scorer.kernels.base
    for name in order:
        if scorer.criterion.additive:
            path.append((path[-1] if path else scorer.start) + scorer.singles[name] - scorer.start)
        else:
            gram = gram + scorer.kernels[name]
            path.append(scorer.score(gram) if path else scorer.singles[name])
    return SearchResult(tuple(order), scorer.start, tuple(path))


def _greedy(scorer: _Scorer, budget: Budget, per_parameter: bool) -> SearchResult:
    """Repeatedly adds the module with the largest gain (or gain per parameter) until none fits."""
    kernels, utility = scorer.kernels, scorer.criterion.utility
    sizes = kernels.num_parameters
    gram, used, current = kernels.base, 0, scorer.start
    order: list[str] = []
    path: list[float] = []
    last_round: dict[str, float] = {}

    def worth(name: str) -> float:
        gain = utility(scores[name]) - utility(current)
        return gain / sizes[name] if per_parameter and gain > 0 else gain

    while True:
        fitting = [
            name for name in kernels.names if name not in order and budget.fits(len(order) + 1, used + sizes[name])
        ]
        if not fitting:
            return SearchResult(tuple(order), scorer.start, tuple(path), last_round)
        scores = (
            {name: scorer.score(gram + kernels[name]) for name in fitting}
            if order
            else {name: scorer.singles[name] for name in fitting}
        )
        pick = max(fitting, key=worth)
        gram, used, current = gram + kernels[pick], used + sizes[pick], scores[pick]
        order.append(pick)
        path.append(current)
        last_round = {name: score for name, score in scores.items() if name != pick}
