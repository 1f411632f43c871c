# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Slow, obviously right twins of the searches: every kernel summed afresh, every set scored, nothing skipped."""

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


def forward(kernels, criterion, problem, budget, per_parameter, names=()):
    sizes = kernels.num_parameters

    def utility(chosen):
        return criterion.utility(score_of(kernels, criterion, problem, chosen))

    names = list(names)
    while True:
        used = sum(sizes[n] for n in names)
        fitting = [n for n in kernels.names if n not in names and budget.fits(len(names) + 1, used + sizes[n])]
        if not fitting:
            return names
        gains = {n: utility([*names, n]) - utility(names) for n in fitting}
        if per_parameter:
            gains = {n: gain / sizes[n] if gain > 0 else gain for n, gain in gains.items()}
        names.append(max(fitting, key=gains.get))


def backward(kernels, criterion, problem, budget, per_parameter):
    sizes = kernels.num_parameters

    def utility(chosen):
        return criterion.utility(score_of(kernels, criterion, problem, chosen))

    names = list(kernels.names)
    while not budget.fits(len(names), sum(sizes[n] for n in names)):
        losses = {n: utility(names) - utility([o for o in names if o != n]) for n in names}
        if per_parameter:
            losses = {n: loss / sizes[n] if loss > 0 else loss for n, loss in losses.items()}
        names.remove(min(names, key=losses.get))
    return forward(kernels, criterion, problem, budget, per_parameter, names)


def better(kernels, criterion, problem, budget, run):
    found = [run(kernels, criterion, problem, budget, False)]
    if budget.parameters is not None:
        found.append(run(kernels, criterion, problem, budget, True))
    return max(found, key=lambda names: criterion.utility(score_of(kernels, criterion, problem, names)))


def swaps(kernels, criterion, problem, budget, names):
    sizes = kernels.num_parameters

    def utility(chosen):
        return criterion.utility(score_of(kernels, criterion, problem, chosen))

    while True:
        tried = {}
        for out in names:
            rest = [n for n in names if n != out]
            for into in kernels.names:
                used = sum(sizes[n] for n in [*rest, into])
                if into not in names and budget.fits(len(names), used):
                    tried[(*rest, into)] = utility([*rest, into])
        if not tried:
            return names
        found = forward(kernels, criterion, problem, budget, False, max(tried, key=tried.get))
        if max(tried.values()) <= utility(names) + 1e-10 or utility(found) <= utility(names) + 1e-10:
            return names
        names = found
