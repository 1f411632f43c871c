# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Search for the best set of modules within a budget, with the exact sum rule `K_{S∪m} = K_S + K_m`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ...errors import CriterionError
from ...kernels.module_kernels import ModuleKernels
from ...recommendation.budget import Budget, fill
from ..criteria import Criterion, View, rank_by_score
from .cut_offs import over_cut_offs
from .knapsack import best_set
from .result import SearchResult


STRATEGIES = ("greedy", "top")


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

    Under a budget of time or memory a module low in the model leaves no room for others, for the backward pass ends
    there: see `over_cut_offs`. The set is then not proven to be the best there is.

    Cost: with additive criteria no evaluation beyond `singles`; else one for each candidate and round, and, under a
    budget of time or memory, for each layer that is tried.

    Raises:
        CriterionError: as `check_strategy`.
    """
    check_strategy(strategy)
    scorer = _Scorer(view, criterion, singles)
    sizes = view.kernels.num_parameters
    by_size = budget.by_place or (budget.parameters is not None and len(set(sizes.values())) > 1)

    def runs_of(names: Sequence[str]) -> list[SearchResult]:
        if strategy == "top":
            allowed = set(names)
            order = fill([name for name in rank_by_score(singles, criterion) if name in allowed], budget, sizes)
            return [_in_order(scorer, order)] if order else []
        return [_greedy(scorer, budget, names, per_size) for per_size in ((False, True) if by_size else (False,))]

    if strategy == "greedy" and criterion.additive and budget.simple:
        runs = [_best_of_additive(scorer, budget)]
    else:
        runs = over_cut_offs(view.kernels, budget, runs_of, criterion)
    result = max(runs, key=lambda run: criterion.utility(run.path[-1]))
    if budget.by_place:
        kept = result.order[:-1]
        fitting = {n: s for n, s in result.last_round.items() if _allowed(budget, view.kernels, [*kept, n])}
        result = replace(result, last_round=fitting)
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

    def with_module(self, name: str, gram: Tensor, current: float) -> float:
        """The score of a set and one module more; of additive criteria by their gain alone."""
        if self.criterion.additive:
            return current + self.singles[name] - self.start
        return self.score(gram + self.kernels[name])


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


def _greedy(scorer: _Scorer, budget: Budget, candidates: Sequence[str], per_size: bool) -> SearchResult:
    """Repeatedly adds the module with the largest gain (or gain for what it uses of the budget) until none fits."""
    kernels, utility = scorer.kernels, scorer.criterion.utility
    sizes = _sizes(budget, kernels, candidates) if per_size else {}
    gram, current = kernels.base, scorer.start
    order: list[str] = []
    path: list[float] = []
    last_round: dict[str, float] = {}
    left = list(candidates)
    before = not (scorer.criterion.additive and budget.by_place)  # a score costs more than the budget's check

    def worth(name: str) -> float:
        gain = utility(scores[name]) - utility(current)
        return gain / sizes[name] if per_size and gain > 0 else gain

    while True:
        left = [name for name in left if not before or _allowed(budget, kernels, [*order, name])]
        scores = (
            {name: scorer.with_module(name, gram, current) for name in left}
            if order
            else {name: scorer.singles[name] for name in left}
        )
        ranked = sorted(left, key=worth, reverse=True)
        pick = next((name for name in ranked if before or _allowed(budget, kernels, [*order, name])), None)
        if pick is None:
            return SearchResult(tuple(order), scorer.start, tuple(path), last_round)
        tried = set(ranked[: ranked.index(pick) + 1])  # what does not fit now never will
        gram, current = gram + kernels[pick], scores[pick]
        order.append(pick)
        path.append(current)
        last_round = {name: score for name, score in scores.items() if name != pick}
        left = [name for name in left if name not in tried]


def _allowed(budget: Budget, kernels: ModuleKernels, names: Sequence[str]) -> bool:
    used = sum(kernels.num_parameters[name] for name in names)
    return budget.fits(len(names), used) and (not budget.by_place or budget.allows(dict.fromkeys(names, budget.rank)))


def _sizes(budget: Budget, kernels: ModuleKernels, candidates: Sequence[str]) -> Mapping[str, float]:
    """What each module uses of the budget: parameters, or the largest share of a limit beside the lowest candidate."""
    if not budget.by_place:
        return kernels.num_parameters
    cost = budget.cost
    lowest = candidates[0] if cost is None else min(candidates, key=cost.index.__getitem__)
    alone = budget.spent({lowest: budget.rank})
    nothing = dict.fromkeys(alone, 0.0)
    sizes = {}
    for name in candidates:
        both = budget.spent(dict.fromkeys([lowest, name], budget.rank))
        without = nothing if name == lowest else alone
        sizes[name] = max(1e-9, max(both[kind] - without[kind] for kind in both))
    return sizes
