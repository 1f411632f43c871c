# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The best of all sets within a budget: every set, or branch and bound where the criterion has a bound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ...recommendation.budget import Budget
from .scoring import WORTH_A_BOUND, Move, Present, SubsetScorer


def best_of_all(scorer: SubsetScorer, budget: Budget, goal: float) -> tuple[str, ...]:
    """The best set that fits and to which nothing can be added, in model order; of equal ones the first.

    Depth first over the modules in model order. Where the criterion is monotone and has a bound, a branch is left as
    soon as the bound of its set says that whatever could still be added does not bring it to the goal, a utility that
    some set is known to have, or to the best set seen since: the measures of the modules are non-negative and add, so
    those of any choice that fits sum to at most what the largest do, by their size, with the last one taken in part.

    Args:
        goal: -inf where none is known.
    """
    tree = _Tree(scorer, budget, goal)
    tree.visit(Present(scorer.kernels), 0, int(budget.modules or budget.parameters or 0))
    return tree.best


class _Tree:
    def __init__(self, scorer: SubsetScorer, budget: Budget, goal: float) -> None:
        self.scorer, self.goal = scorer, goal
        self.names = scorer.kernels.names
        parameters = scorer.kernels.num_parameters
        self.sizes = [1 if budget.modules is not None else parameters[name] for name in self.names]
        self.best: tuple[str, ...] = ()
        self.best_utility = -math.inf

    def visit(self, present: Present, first: int, room: int) -> None:
        """All sets of the present one and modules from `first` on; nothing is left of the budget but `room`."""
        if not any(self.sizes[i] <= room and name not in present.names for i, name in enumerate(self.names)):
            self.keep(present)
            return
        later = [i for i in range(first, len(self.names)) if self.sizes[i] <= room]
        hopeless = self.hopeless(present, later, room)
        for i in later:
            if i in hopeless:
                self.scorer.skipped += 1
                continue
            child = present.copy()
            child.make(Move(into=self.names[i]))
            self.visit(child, i + 1, room - self.sizes[i])

    def hopeless(self, present: Present, later: Sequence[int], room: int) -> set[int]:
        """Those of the modules `later` with which, and others after them, no set reaches the goal."""
        bound = (
            self.scorer.bound(present.gram) if self.scorer.criterion.branches and len(later) >= WORTH_A_BOUND else None
        )
        if bound is None:
            return set()
        measures = {i: float(bound.measure(self.scorer.kernels[self.names[i]]).clamp_min(0.0)) for i in later}
        found = set()
        for place, i in enumerate(later):
            most = measures[i] + self.most(measures, later[place + 1 :], room - self.sizes[i])
            if self.scorer.limit(bound, torch.tensor(most, dtype=torch.float64)) < self.goal:
                found.add(i)
        return found

    def most(self, measures: Mapping[int, float], indices: Sequence[int], room: int) -> float:
        """The largest sum of measures that fits, with the last module taken in part."""
        total = 0.0
        for i in sorted(indices, key=lambda i: -measures[i] / self.sizes[i]):
            part = min(1.0, room / self.sizes[i])
            total, room = total + part * measures[i], room - self.sizes[i]
            if room <= 0:
                break
        return total

    def keep(self, present: Present) -> None:
        utility = self.scorer.utility(present.gram)
        if utility > self.best_utility:
            self.best, self.best_utility = tuple(present.names), utility
            self.goal = max(self.goal, utility)
