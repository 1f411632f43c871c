# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Scores of the sets that differ from the present one by a module, but for those that a bound rules out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...kernels.module_kernels import ModuleKernels
from ..criteria import Criterion
from ..problem import Problem
from .gain_bounds import GainBound


# A kernel is subtracted only where this part of the trace is left: rounding then grows a hundredfold at most, which is
# what `Spectrum` takes for rounding.
LEFT_BY_SUBTRACTION = 1e-2
WORTH_A_BOUND = 4  # changes of a set; to bound fewer costs as much as to score them


@dataclass(frozen=True)
class Move:
    """A change of the set: a module that comes, one that leaves, or both."""

    into: str | None = None
    out: str | None = None


@dataclass(frozen=True)
class Round:
    """What a search saw of the changes that it could make.

    Args:
        pick: The best; None where there is none.
        scores: Of the sets after the changes that were scored.
        limits: Of the changes that were not: scores that they cannot be better than.
    """

    pick: Move | None
    scores: dict[Move, float] = field(default_factory=dict)
    limits: dict[Move, float] = field(default_factory=dict)


class Present:
    """A set and the sum of its kernels, `K_0 + Σ K_m`, kept by additions and subtractions of single blocks."""

    def __init__(self, kernels: ModuleKernels, names: Iterable[str] = ()) -> None:
        self.kernels, self.names = kernels, list(names)
        self.gram = kernels.subset(self.names)
        self._largest_trace = float(self.gram.trace())  # since the blocks were last summed: rounding is relative to it

    def copy(self) -> Present:
        """Another that changes for itself; no tensor is copied, for none is changed in place."""
        other = copy.copy(self)
        other.names = list(self.names)
        return other

    def after(self, move: Move) -> Tensor:
        """(n, n) float64, the kernel of the set after a change."""
        gram = self.gram if move.out is None else self._without(move.out)[0]
        return gram if move.into is None else gram + self.kernels[move.into]

    def make(self, move: Move) -> None:
        """Changes the set."""
        if move.out is not None:
            self.gram, summed = self._without(move.out)
            self.names.remove(move.out)
            self._largest_trace = float(self.gram.trace()) if summed else self._largest_trace
        if move.into is not None:
            self.gram = self.gram + self.kernels[move.into]
            self.names.append(move.into)
            self._largest_trace = max(self._largest_trace, float(self.gram.trace()))

    def _without(self, name: str) -> tuple[Tensor, bool]:
        """The kernel without one module, and whether it was summed anew."""
        gram = self.gram - self.kernels[name]
        if float(gram.trace()) >= LEFT_BY_SUBTRACTION * self._largest_trace:
            return gram, False
        return self.kernels.subset(other for other in self.names if other != name), True


class SubsetScorer:
    """Scores sets by one criterion, and counts."""

    def __init__(
        self, kernels: ModuleKernels, criterion: Criterion, problem: Problem, singles: dict[str, float]
    ) -> None:
        self.kernels, self.criterion, self.problem, self.singles = kernels, criterion, problem, singles
        self.start = criterion(kernels.base, problem)
        self.evaluations = len(singles) + 1
        self.skipped = 0
        self._slack: float | None = None

    def score(self, gram: Tensor) -> float:
        self.evaluations += 1
        return self.criterion(gram, self.problem)

    def utility(self, gram: Tensor) -> float:
        return self.criterion.utility(self.score(gram))

    def best(
        self,
        present: Present,
        moves: Sequence[Move],
        value: Callable[[Move, float], float],
        above: float = -math.inf,
    ) -> Round:
        """The best change of the present set, and the scores of the others, but for those that a bound rules out.

        Args:
            value: Of a change and the utility of the set after it, to be made as large as possible; it must not fall
                as the utility grows.
            above: No change whose value is not above this is picked.
        """
        utility, scores, limits = self.criterion.utility, {}, {}
        bound = self.bound(present.gram) if present.names and len(moves) >= WORTH_A_BOUND else None
        ceilings: dict[Move, float] = {}
        if bound is not None:
            modules = {name for move in moves for name in (move.into, move.out) if name is not None}
            measures = {name: bound.measure(self.kernels[name]) for name in modules}
            nothing = torch.zeros((), dtype=torch.float64)
            for move in moves:
                gained = nothing if move.into is None else measures[move.into]
                lost = nothing if move.out is None else measures[move.out]
                ceilings[move] = self.limit(bound, gained - lost)
        highest = above
        for move in sorted(moves, key=lambda move: -value(move, ceilings[move])) if ceilings else moves:
            if ceilings and value(move, ceilings[move]) < highest:
                limits[move] = utility(ceilings[move])  # a utility of a utility is the score again
                self.skipped += 1
                continue
            if not present.names and move.out is None and move.into is not None:
                scores[move] = self.singles[move.into]
            else:
                scores[move] = self.score(present.after(move))
            highest = max(highest, value(move, utility(scores[move])))
        values = {move: value(move, utility(scores[move])) for move in moves if move in scores}
        pick = max(values, key=values.__getitem__, default=None)
        if pick is not None and not values[pick] > above:
            pick = None
        return Round(pick, {move: scores[move] for move in values}, limits)

    def bound(self, gram: Tensor) -> GainBound | None:
        """Of changes of a set with this kernel, where the criterion has one."""
        return None if self.criterion.bound is None else self.criterion.bound(gram, self.problem)

    def limit(self, bound: GainBound, change: Tensor) -> float:
        """The bound's ceiling, raised by what rounding may do to it and to the score.

        Relative errors of solutions with K + λI are about n·eps·κ, and `κ ≤ 1 + tr(K)/λ`; ten times that, with the
        trace of all candidates. Where the ridge is too small for this to be small, nothing is skipped.
        """
        if self._slack is None:
            trace = float(self.kernels.base.trace()) + sum(float(self.kernels[name].trace()) for name in self.kernels)
            rounding = 10 * len(self.kernels.base) * torch.finfo(torch.float64).eps
            self._slack = rounding * (1 + trace / self.problem.ridge)
        ceiling = bound.ceiling(change)
        return ceiling + self._slack * max(1.0, abs(ceiling))
