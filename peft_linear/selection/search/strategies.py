# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The ways to a set of modules within a budget: greedy, backward, by exchanges, and what is exact if gains add."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ...recommendation.budget import Budget
from ..criteria import rank_by_score
from .knapsack import best_set
from .scoring import Move, Present, SubsetScorer
from .search_result import Change, SearchResult


LEAST_GAIN = 1e-10  # of a swap, relative to the score: less is rounding
Run = Callable[[SubsetScorer, Budget, bool], SearchResult]


def greedy(scorer: SubsetScorer, budget: Budget) -> SearchResult:
    """Adds the best module to the set until none fits."""
    return _better(scorer, budget, _forward)


def backward(scorer: SubsetScorer, budget: Budget) -> SearchResult:
    """Takes the module that is missed least from all candidates until the rest fits; then adds what fits beside it."""
    return _better(scorer, budget, _backward)


def swap(scorer: SubsetScorer, budget: Budget, found: SearchResult) -> SearchResult:
    """Exchanges a chosen module for another while that improves the set; after each, what then fits is added."""
    sizes, utility = scorer.kernels.num_parameters, scorer.criterion.utility
    names, current = list(found.order), found.path[-1]
    changes: list[Change] = []
    while True:
        present = Present(scorer.kernels, names)
        used = sum(sizes[name] for name in names)
        moves = [
            Move(into=into, out=out)
            for out in names
            for into in scorer.kernels.names
            if into not in names and budget.fits(len(names), used - sizes[out] + sizes[into])
        ]
        enough = utility(current) + LEAST_GAIN * abs(current)
        seen = scorer.best(present, moves, lambda move, utility: utility, above=enough)
        if seen.pick is None:
            break
        present.make(seen.pick)
        after = seen.scores[seen.pick]
        added = _forward(scorer, budget, False, present)
        after = added.path[-1] if added.path else after
        if utility(after) <= enough:
            break
        changes.append(Change(seen.pick.out or "", seen.pick.into, len(changes) + 1, current, after))
        names, current = list(present.names), after
    if not changes:
        return found
    left = tuple(change for change in changes if change.out not in names)
    return ordered(scorer, [name for name in scorer.kernels.names if name in names], changes=left)


def in_order(scorer: SubsetScorer, order: Sequence[str]) -> SearchResult:
    """A set in the order given."""
    path: list[float] = []
    if scorer.criterion.additive:
        for name in order:
            path.append((path[-1] if path else scorer.start) + scorer.singles[name] - scorer.start)
        return SearchResult(tuple(order), scorer.start, tuple(path))
    present = Present(scorer.kernels)
    for name in order:
        path.append(scorer.best(present, [Move(into=name)], lambda move, utility: utility).scores[Move(into=name)])
        present.make(Move(into=name))
    return SearchResult(tuple(order), scorer.start, tuple(path))


def best_of_additive(scorer: SubsetScorer, budget: Budget) -> SearchResult:
    """The best modules, or the solution of the knapsack problem: gains add, so nothing else is to be searched."""
    sizes, ranked = scorer.kernels.num_parameters, rank_by_score(scorer.singles, scorer.criterion)
    order = ranked[: budget.modules]
    if budget.parameters is not None:
        utility = scorer.criterion.utility
        gains = {name: utility(scorer.singles[name]) - utility(scorer.start) for name in ranked}
        order = best_set(gains, sizes, budget.parameters)
    result = in_order(scorer, order)
    used, last = sum(sizes[name] for name in order), order[-1]
    others = {
        name: result.path[-1] + scorer.singles[name] - scorer.singles[last]
        for name in scorer.kernels.names
        if name not in order and budget.fits(len(order), used - sizes[last] + sizes[name])
    }
    return replace(result, last_round=others)


def ordered(scorer: SubsetScorer, names: Sequence[str], changes: tuple[Change, ...] = ()) -> SearchResult:
    """A set, in the order in which greedy selection takes it."""
    among = Budget(modules=len(names), parameters=None)
    result = _forward(scorer, among, False, among=names)
    return replace(result, last_round={}, last_limits={}, changes=changes)


def _better(scorer: SubsetScorer, budget: Budget, run: Run) -> SearchResult:
    """Of the runs by score and, where modules differ in what they cost, by score per parameter."""
    runs = [run(scorer, budget, False)]
    if budget.parameters is not None and len(set(scorer.kernels.num_parameters.values())) > 1:
        runs.append(run(scorer, budget, True))
    return max(runs, key=lambda found: scorer.criterion.utility(found.path[-1]))


def _forward(
    scorer: SubsetScorer,
    budget: Budget,
    priced: bool,
    present: Present | None = None,
    among: Sequence[str] | None = None,
) -> SearchResult:
    """Adds the best module to the present set (default: none), which it changes, until no candidate fits."""
    present = Present(scorer.kernels) if present is None else present
    sizes, utility = scorer.kernels.num_parameters, scorer.criterion.utility
    names = scorer.kernels.names if among is None else among
    order: list[str] = []
    path: list[float] = []
    result = SearchResult((), scorer.start, ())
    current = scorer.start if not present.names else None
    while True:
        used = sum(sizes[name] for name in present.names)
        moves = [
            Move(into=name)
            for name in names
            if name not in present.names and budget.fits(len(present.names) + 1, used + sizes[name])
        ]
        if not moves:
            return replace(result, order=tuple(order), path=tuple(path))
        if current is None:
            current = scorer.score(present.gram)
        seen = scorer.best(present, moves, _worth(utility(current), sizes, priced))
        assert seen.pick is not None and seen.pick.into is not None
        others = {move.into: score for move, score in seen.scores.items() if move is not seen.pick}
        limits = {move.into: score for move, score in seen.limits.items()}
        result = replace(result, last_round=others, last_limits=limits)  # type: ignore[arg-type]
        current = seen.scores[seen.pick]
        present.make(seen.pick)
        order.append(seen.pick.into)
        path.append(current)


def _worth(now: float, sizes: Mapping[str, int], priced: bool) -> Callable[[Move, float], float]:
    """What a change is worth: the gain in utility, or that per parameter gained, or lost per parameter freed."""

    def value(move: Move, utility: float) -> float:
        gain = utility - now
        if not priced or (gain > 0) != (move.out is None):
            return gain
        return gain / sizes[move.out or move.into or ""]

    return value


def _backward(scorer: SubsetScorer, budget: Budget, priced: bool) -> SearchResult:
    sizes, utility = scorer.kernels.num_parameters, scorer.criterion.utility
    present = Present(scorer.kernels, scorer.kernels.names)
    changes: list[Change] = []
    current = scorer.score(present.gram)
    while not budget.fits(len(present.names), sum(sizes[name] for name in present.names)):
        moves = [Move(out=name) for name in present.names]
        seen = scorer.best(present, moves, _worth(utility(current), sizes, priced))
        assert seen.pick is not None and seen.pick.out is not None
        changes.append(Change(seen.pick.out, None, len(changes) + 1, current, seen.scores[seen.pick]))
        current = seen.scores[seen.pick]
        present.make(seen.pick)
    _forward(scorer, budget, priced, present)  # what still fits beside it
    kept = tuple(change for change in changes if change.out not in present.names)
    return ordered(scorer, [name for name in scorer.kernels.names if name in present.names], changes=kept)
