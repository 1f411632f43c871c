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
"""Search for the best set of modules within a budget, with the exact sum rule `K_{S∪m} = K_S + K_m`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import BudgetError, CriterionError
from ..kernels.module_kernels import ModuleKernels
from .budget import Budget, fill
from .criteria import Criterion
from .problem import Problem


STRATEGIES = ("greedy", "top", "exhaustive")
MAX_SUBSETS = 20_000  # of an exhaustive search


@dataclass(frozen=True)
class SearchResult:
    """The set that a search chose, and what it saw on the way.

    Args:
        order: The modules, best first.
        start: Score of the always-trained parameters alone (nothing chosen).
        path: Score of the set after each module of `order`.
        last_round: Score that the final set would have had with a rejected module in place of the last chosen one;
            only of modules that fitted.
        evaluations: Kernels that were scored.
    """

    order: tuple[str, ...]
    start: float
    path: tuple[float, ...]
    last_round: dict[str, float] = field(default_factory=dict)
    evaluations: int = 0


class SubsetScorer:
    """Scores of sets; for additive criteria from one evaluation a module, otherwise from the summed kernel."""

    def __init__(
        self, kernels: ModuleKernels, criterion: Criterion, problem: Problem, singles: dict[str, float]
    ) -> None:
        self.kernels, self.criterion, self.problem, self.singles = kernels, criterion, problem, singles
        self.start = criterion(kernels.base, problem)
        self.evaluations = len(singles) + 1

    def with_each(self, chosen: Sequence[str], candidates: Sequence[str]) -> dict[str, float]:
        """Score of `chosen` plus each of `candidates`."""
        if not chosen:
            return {name: self.singles[name] for name in candidates}
        if self.criterion.additive:
            base = self.start + sum(self.singles[name] - self.start for name in chosen)
            return {name: base + self.singles[name] - self.start for name in candidates}
        self.evaluations += len(candidates)
        gram = self.kernels.subset(chosen)
        return {name: self._score(gram + self.kernels[name]) for name in candidates}

    def _score(self, gram: Tensor) -> float:
        return self.criterion(gram, self.problem)

    def path(self, order: Sequence[str]) -> tuple[float, ...]:
        """Score of each leading part of `order`."""
        return tuple(self.with_each(order[:i], order[i : i + 1])[name] for i, name in enumerate(order))


def check_strategy(strategy: str, candidates: int, budget: Budget) -> None:
    """Refuses what `search` cannot do, before kernels are scored.

    Raises:
        CriterionError: an unknown strategy.
        BudgetError: an exhaustive search of more than 20,000 sets.
    """
    if strategy not in STRATEGIES:
        raise CriterionError(f"unknown strategy {strategy!r}; there are: {', '.join(STRATEGIES)}")
    sets = math.comb(candidates, budget.modules) if budget.modules is not None else 2**candidates
    if strategy == "exhaustive" and sets > MAX_SUBSETS:
        raise BudgetError(
            f"an exhaustive search over {candidates} candidates with a budget of {budget} is {sets:,} sets, more than "
            f'{MAX_SUBSETS:,}; use strategy="greedy", or fewer candidates'
        )


def search(scorer: SubsetScorer, budget: Budget, strategy: str) -> SearchResult:
    """The best set within the budget, which is always used up: no further candidate fits.

    Args:
        strategy: "greedy": forward selection, one module a round. With a budget in parameters it runs twice, by score
            and by gain per parameter, and keeps the better set (neither alone is safe when modules differ in size).
            "top": the best modules on their own. "exhaustive": every set that fits and to which nothing can be added.

    Raises:
        CriterionError, BudgetError: as `check_strategy`.
    """
    check_strategy(strategy, len(scorer.kernels), budget)
    if strategy == "top":
        ranked = rank_by_score(scorer.singles, scorer.criterion)
        order = fill(ranked, budget, scorer.kernels.num_parameters)
        return SearchResult(order, scorer.start, scorer.path(order), evaluations=scorer.evaluations)
    if strategy == "exhaustive":
        best = _exhaustive(scorer, budget)
        found = _greedy(scorer, Budget(modules=len(best), parameters=None), per_parameter=False, among=best)
        return SearchResult(found.order, found.start, found.path, evaluations=scorer.evaluations)
    runs = [_greedy(scorer, budget, per_parameter=False)]
    if budget.parameters is not None and len(set(scorer.kernels.num_parameters.values())) > 1:
        runs.append(_greedy(scorer, budget, per_parameter=True))
    best_run = max(runs, key=lambda run: scorer.criterion.utility(run.path[-1]))
    return SearchResult(best_run.order, best_run.start, best_run.path, best_run.last_round, scorer.evaluations)


def rank_by_score(scores: dict[str, float], criterion: Criterion) -> tuple[str, ...]:
    """Names, best first; equal scores stay in model order."""
    return tuple(sorted(scores, key=lambda name: -criterion.utility(scores[name])))


def _greedy(
    scorer: SubsetScorer, budget: Budget, *, per_parameter: bool, among: Sequence[str] | None = None
) -> SearchResult:
    sizes, utility = scorer.kernels.num_parameters, scorer.criterion.utility
    names = scorer.kernels.names if among is None else among
    order: list[str] = []
    path: list[float] = []
    last_round: dict[str, float] = {}
    used, current = 0, scorer.start
    while True:
        fitting = [n for n in names if n not in order and budget.fits(len(order) + 1, used + sizes[n])]
        if not fitting:
            return SearchResult(tuple(order), scorer.start, tuple(path), last_round, scorer.evaluations)
        scores = scorer.with_each(order, fitting)
        gains = {name: utility(score) - utility(current) for name, score in scores.items()}
        if per_parameter and max(gains.values()) > 0:
            gains = {name: gain / sizes[name] for name, gain in gains.items()}
        pick = max(fitting, key=gains.__getitem__)
        current = scores.pop(pick)
        order.append(pick)
        path.append(current)
        used += sizes[pick]
        last_round = scores


def _exhaustive(scorer: SubsetScorer, budget: Budget) -> tuple[str, ...]:
    best: tuple[str, ...] = ()
    best_utility = -math.inf
    for subset in _full_subsets(scorer.kernels, budget):
        score = scorer.with_each(subset[:-1], subset[-1:])[subset[-1]]
        if scorer.criterion.utility(score) > best_utility:
            best, best_utility = subset, scorer.criterion.utility(score)
    return best


def _full_subsets(kernels: ModuleKernels, budget: Budget) -> Iterator[tuple[str, ...]]:
    names, sizes = kernels.names, kernels.num_parameters
    if budget.modules is not None:
        yield from itertools.combinations(names, budget.modules)
        return
    for count in range(1, len(names) + 1):
        for subset in itertools.combinations(names, count):
            used = sum(sizes[name] for name in subset)
            rest = min((sizes[name] for name in names if name not in subset), default=math.inf)
            if budget.fits(count, used) and not budget.fits(count + 1, used + rest):  # type: ignore[arg-type]
                yield subset
