# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Where the backward pass may end: a search under a budget of time or memory, repeated for each lowest layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...kernels.module_kernels import ModuleKernels
from ...recommendation.budget import Budget
from ...recommendation.names import parse_name
from ..criteria import Criterion
from .result import SearchResult


RunsOf = Callable[[Sequence[str]], list[SearchResult]]


def over_cut_offs(kernels: ModuleKernels, budget: Budget, runs_of: RunsOf, criterion: Criterion) -> list[SearchResult]:
    """`runs_of` the candidates from each layer on; without a budget of time or memory, of all candidates.

    Layers of which no module fits even alone are not tried, nor those above the first from which on all candidates
    fit. With an additive criterion the modules of the best layer and of the one below it are then tried one by one as
    the lowest.

    Raises:
        TargetError: a candidate has no counts of a training step.
    """
    cost = budget.cost
    if cost is None or (budget.time is None and budget.memory is None):
        return runs_of(kernels.names)
    ordered = sorted(kernels.names, key=cost.place)
    starts = _starts(ordered)

    def from_place(start: int) -> list[SearchResult]:
        allowed = set(ordered[start:])
        return runs_of([name for name in kernels.names if name in allowed])

    found: dict[int, list[SearchResult]] = {}
    for start, end in zip(starts, [*starts[1:], len(ordered)], strict=True):
        if any(budget.allows({name: budget.rank}) for name in ordered[start:end]):
            found[start] = from_place(start)
        if budget.allows(dict.fromkeys(ordered[start:], budget.rank)):
            break
    if criterion.additive:
        best = max(found, key=lambda start: max(criterion.utility(run.path[-1]) for run in found[start]))
        number = starts.index(best)
        end = starts[number + 1] if number + 1 < len(starts) else len(ordered)
        for start in range(starts[max(0, number - 1)], end):
            if start not in found and budget.allows({ordered[start]: budget.rank}):
                found[start] = from_place(start)
    return [run for runs in found.values() for run in runs]


def _starts(ordered: Sequence[str]) -> list[int]:
    """Where in the forward pass another layer begins."""
    layers = [(name.stack, name.layer) for name in map(parse_name, ordered)]
    return [place for place in range(len(ordered)) if not place or layers[place] != layers[place - 1]]
