# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Slow, obviously right twins of the searches: every kernel summed afresh, every set scored."""

from __future__ import annotations

import itertools


def score_of(kernels, criterion, problem, names):
    return criterion(kernels.subset(names), problem)


def full_sets(kernels, budget):
    """Every set that fits and cannot be added to."""
    sizes = kernels.num_parameters
    for count in range(1, len(kernels) + 1):
        for names in itertools.combinations(kernels.names, count):
            used = sum(sizes[n] for n in names)
            rest = [n for n in kernels.names if n not in names]
            if budget.fits(count, used) and not any(budget.fits(count + 1, used + sizes[n]) for n in rest):
                yield names


def best_set(kernels, criterion, problem, budget):
    return max(
        full_sets(kernels, budget), key=lambda names: criterion.utility(score_of(kernels, criterion, problem, names))
    )


def forward(kernels, criterion, problem, budget, per_parameter):
    sizes = kernels.num_parameters

    def utility(chosen):
        return criterion.utility(score_of(kernels, criterion, problem, chosen))

    names = []
    while True:
        used = sum(sizes[n] for n in names)
        fitting = [n for n in kernels.names if n not in names and budget.fits(len(names) + 1, used + sizes[n])]
        if not fitting:
            return names
        gains = {n: utility([*names, n]) - utility(names) for n in fitting}
        if per_parameter:
            gains = {n: gain / sizes[n] if gain > 0 else gain for n, gain in gains.items()}
        names.append(max(fitting, key=gains.get))


def greedy(kernels, criterion, problem, budget):
    found = [forward(kernels, criterion, problem, budget, False)]
    if budget.parameters is not None:
        found.append(forward(kernels, criterion, problem, budget, True))
    return max(found, key=lambda names: criterion.utility(score_of(kernels, criterion, problem, names)))
