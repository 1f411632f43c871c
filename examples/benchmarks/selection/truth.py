# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The ground truth of the selection benchmark: the loss that fine-tuning a set of modules reaches.

A configuration is a set of modules. Its learning rate is tuned on the validation split with the first seed: from the
middle of a grid uphill, for each budget of steps; the other seeds are trained at what was found. All budgets of steps
are evaluated in one run, since the learning rate stays constant after its warm-up.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from examples.benchmarks.selection.sets import Configuration
from examples.benchmarks.selection.tasks import SelectionTask, Sizes
from examples.benchmarks.selection.training import Protocol, train
from examples.common.records import Records


ONE_RATE = 3e-3  # for all sets: tuned for all-linear and the short budget on the family “validation”


class Truth:
    """Finished runs of one task, and what follows from them."""

    def __init__(self, task: SelectionTask, protocol: Protocol, records: Records) -> None:
        self.task, self.protocol, self.records = task, protocol, records

    @classmethod
    def at(cls, path: Path, task: SelectionTask, protocol: Protocol, sizes: Sizes) -> Truth:
        """The runs that are recorded in a file."""
        setting = {"protocol": protocol.setting(), "sizes": asdict(sizes)}
        return cls(task, protocol, Records(path, setting, ("task", "configuration", "learning_rate", "seed")))

    def run(self, configuration: Configuration, rate: float, seed: int) -> dict[str, Any]:
        key = (self.task.key, configuration.key, rate, seed)
        if key not in self.records:
            start = time.perf_counter()
            budgets = train(self.task, configuration.modules, rate, seed, self.protocol, configuration.ranks)
            self.records.add(
                {
                    "task": self.task.key,
                    "configuration": configuration.key,
                    "learning_rate": rate,
                    "seed": seed,
                    "modules": configuration.modules,
                    "ranks": configuration.ranks,
                    "budgets": budgets,
                    "seconds": round(time.perf_counter() - start, 2),
                }
            )
        return self.records[key]

    def tune(self, configuration: Configuration, seed: int) -> dict[int, float]:
        """{budget: the learning rate with the least validation loss}, from the middle of the grid uphill."""
        grid = self.protocol.learning_rates

        def loss(index: int, budget: int) -> float:
            if not 0 <= index < len(grid):
                return float("inf")
            return self.run(configuration, grid[index], seed)["budgets"][str(budget)]["validation_loss"]

        found = {}
        for budget in self.protocol.steps:
            best = len(grid) // 2
            for direction in (1, -1):
                while loss(best + direction, budget) < loss(best, budget):
                    best += direction
            found[budget] = grid[best]
        return found

    def measure(self, configuration: Configuration, seeds: Sequence[int]) -> None:
        """Trains what is missing; the first seed tunes the learning rates."""
        rates = set(self.tune(configuration, seeds[0]).values())
        for seed in seeds[1:]:
            for rate in sorted(rates):
                self.run(configuration, rate, seed)

    def finished(self, configuration: Configuration, seeds: Sequence[int], rate: float | None = None) -> bool:
        """Whether nothing is missing, found out without training."""
        return self.losses(configuration, seeds, rate=rate) is not None

    def losses(
        self,
        configuration: Configuration,
        seeds: Sequence[int],
        measure: str = "test_loss",
        rate: float | None = None,
    ) -> dict[int, list[float]] | None:
        """{budget: the number of each seed}, at this learning rate, or the tuned ones; None where runs are missing."""
        reader = _Reading(self.task, self.protocol, self.records)
        try:
            rates = dict.fromkeys(self.protocol.steps, rate) if rate else reader.tune(configuration, seeds[0])
            return {
                budget: [reader.run(configuration, rates[budget], s)["budgets"][str(budget)][measure] for s in seeds]
                for budget in self.protocol.steps
            }
        except KeyError:
            return None


class _Reading(Truth):
    """Reads and never trains."""

    def run(self, configuration: Configuration, rate: float, seed: int) -> dict[str, Any]:
        return self.records[(self.task.key, configuration.key, rate, seed)]


def measure(truth: Truth, configurations: Iterable[Configuration], seeds: Sequence[int]) -> None:
    """All configurations, seed by seed, so that an interrupted measurement has whole seeds."""
    configurations = list(configurations)
    for last in range(1, len(seeds) + 1):
        missing = [c for c in configurations if not truth.finished(c, seeds[:last])]
        for configuration in tqdm(missing, desc=f"{truth.task.key}, seed {seeds[last - 1]}"):
            truth.measure(configuration, seeds[:last])


def measure_at_one_rate(truth: Truth, configurations: Iterable[Configuration], seeds: Sequence[int]) -> None:
    """What `measure` has not trained with `ONE_RATE` already."""
    configurations = list(configurations)
    for seed in seeds:
        missing = [c for c in configurations if not truth.finished(c, [seed], ONE_RATE)]
        for configuration in tqdm(missing, desc=f"{truth.task.key}, seed {seed}, one rate"):
            truth.run(configuration, ONE_RATE, seed)
