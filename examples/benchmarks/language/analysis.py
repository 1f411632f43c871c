# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""From runs to regrets. A cell is a model, a task and a budget; its losses are means over its seeds.

Tuned: the test loss of each arm at the rate of its lowest validation loss. One rate: the test loss at the middle
rate, the same for all arms. The regret of an arm in a cell is its loss minus that of the cell's best arm, both tuned
or both at one rate. Intervals resample the cells.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .plan import FIRST_ARMS, MIDDLE, Group, Run, best_rate, next_rate


RESAMPLES = 10_000
LEVEL = 0.95
Cell = tuple[str, str]  # model, task


@dataclass(frozen=True)
class ArmResult:
    """One arm in one cell, the mean over its seeds."""

    tuned: float  # test loss
    one_rate: float  # test loss at the model's MIDDLE rate; infinite where that run diverged
    rates: tuple[float, ...]  # best rate of each seed
    parameters: int
    seeds: tuple[int, ...]


def results(records: Mapping[Run, dict], budget: str) -> dict[Cell, dict[str, ArmResult]]:
    """{cell: {arm: result}} of the groups whose rates are all there; seeds that all first arms of the cell have."""
    groups: dict[Group, dict[float, dict]] = defaultdict(dict)
    for run, record in records.items():
        if run.budget == budget:
            groups[run.group][run.rate] = record
    cells: dict[Cell, dict[str, dict[int, dict]]] = defaultdict(lambda: defaultdict(dict))
    for group, by_rate in groups.items():
        if next_rate(group.model, {rate: record["validation_loss"] for rate, record in by_rate.items()}) is None:
            cells[group.model, group.task][group.arm][group.seed] = by_rate
    return {cell: merge_seeds(arms) for cell, arms in cells.items()}


def merge_seeds(arms: Mapping[str, Mapping[int, dict]]) -> dict[str, ArmResult]:
    """The mean over the seeds that every first arm has; where there is none, over the arm's own seeds."""
    shared = set.intersection(*(set(arms.get(arm, {})) for arm in FIRST_ARMS))
    merged = {}
    for arm, by_seed in arms.items():
        seeds = tuple(sorted(shared & set(by_seed) if shared else by_seed))
        if seeds:
            merged[arm] = summarise([by_seed[seed] for seed in seeds], seeds)
    return merged


def summarise(seeds_records: list[dict], seeds: tuple[int, ...]) -> ArmResult:
    best = [best_rate({rate: record["validation_loss"] for rate, record in rows.items()}) for rows in seeds_records]
    tuned = [loss(rows[rate]) for rows, rate in zip(seeds_records, best, strict=True)]
    single = [loss(rows[MIDDLE[rows[best[0]]["model"]]]) for rows in seeds_records]
    parameters = seeds_records[0][best[0]]["adapter_parameters"]
    return ArmResult(mean(tuned), mean(single), tuple(best), parameters, seeds)


def loss(record: dict) -> float:
    return math.inf if record["test_loss"] is None else record["test_loss"]


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def complete_cells(cells: Mapping[Cell, Mapping[str, ArmResult]]) -> dict[Cell, Mapping[str, ArmResult]]:
    """Cells in which every first arm is done: only these are compared."""
    return {cell: arms for cell, arms in cells.items() if all(arm in arms for arm in FIRST_ARMS)}


def regrets(cells: Mapping[Cell, Mapping[str, ArmResult]], which: str = "tuned") -> dict[str, dict[Cell, float]]:
    """{arm: {cell: loss minus the cell's lowest}}, `which` being "tuned" or "one_rate"."""
    found: dict[str, dict[Cell, float]] = defaultdict(dict)
    for cell, arms in cells.items():
        lowest = min(getattr(result, which) for result in arms.values())
        for arm, result in arms.items():
            found[arm][cell] = getattr(result, which) - lowest
    return dict(found)


def differences(
    cells: Mapping[Cell, Mapping[str, ArmResult]], arm: str, reference: str, which: str = "tuned"
) -> list[float]:
    """Loss of `arm` minus loss of `reference`, cell by cell, where both are finite."""
    pairs = [(getattr(arms[arm], which), getattr(arms[reference], which)) for arms in cells.values() if arm in arms]
    return [one - other for one, other in pairs if math.isfinite(one) and math.isfinite(other)]


def interval(values: list[float], seed: int = 0) -> tuple[float, float] | None:
    """The percentile bootstrap interval of the mean over cells; None below three cells."""
    if len(values) < 3:
        return None
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(np.asarray(values)[draws].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
