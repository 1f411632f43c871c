# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What the selection benchmark's runs and scores say: rank correlations, regret, calibration, time."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from examples.benchmarks.selection.scores import Scores
from examples.benchmarks.selection.sets import FRACTIONS, SIZES, Configuration
from examples.benchmarks.selection.tasks import SelectionTask
from examples.benchmarks.selection.truth import Truth
from examples.common.correlation import Correlation, correlate


SINGLES, SETS = "single modules", "sets"
RESAMPLES = 2000
CHANCE = "random choice"


@dataclass(frozen=True, eq=False)  # hashed by identity: tables and figure ask for the same numbers
class Measured:
    """One task with its ground truth and its scores."""

    task: SelectionTask
    sets: tuple[Configuration, ...]  # those that are finished
    losses: Mapping[str, Mapping[int, Sequence[float]]]  # configuration -> budget of steps -> test loss of each seed
    scores: Scores  # criterion -> configuration -> utility
    seconds: Mapping[str, float]  # scorer -> time
    rank: int
    planned: int  # sets, finished or not

    def mean_loss(self, key: str, steps: int) -> float:
        return statistics.fmean(self.losses[key][steps])

    def group(self, name: str) -> list[Configuration]:
        return [c for c in self.sets if c.modules and not c.picked and c.single == (name == SINGLES)]


def measured(
    truth: Truth,
    sets: Iterable[Configuration],
    seeds: Sequence[int],
    scores: Scores,
    seconds: Mapping[str, float],
    rate: float | None = None,
) -> Measured:
    """What is finished for all `seeds`, at this learning rate, or the tuned ones."""
    sets = tuple(sets)
    losses = {c.key: found for c in sets if (found := truth.losses(c, seeds, rate=rate)) is not None}
    kept = tuple(c for c in sets if c.key in losses)
    return Measured(truth.task, kept, losses, scores, seconds, truth.protocol.rank, len(sets))


def by_rate(
    truth: Truth, sets: Iterable[Configuration], scores: Scores, criteria: Sequence[str], seed: int
) -> dict[float, tuple[int, dict[str, dict[int, float]]]]:
    """{learning rate: (single modules trained with it, {criterion: {budget: rank correlation with their losses}})}.

    Tuning trains most modules with several rates; those that fewer than half were trained with are left out.
    """
    singles = [c for c in sets if c.single]
    names = [name for name in criteria if name in scores and all(c.key in scores[name] for c in singles)]
    found = {}
    for rate in truth.protocol.learning_rates:
        runs = [(c, losses) for c in singles if (losses := truth.losses(c, [seed], rate=rate)) is not None]
        if 2 * len(runs) < len(singles) or len(runs) < 3:
            continue
        table: dict[str, dict[int, float]] = {name: {} for name in names}
        for steps in truth.protocol.steps:
            quality = [[-losses[steps][0] for _, losses in runs]]
            for name in names:
                table[name][steps] = correlate([[scores[name][c.key] for c, _ in runs]], quality).mean
        found[rate] = (len(runs), table)
    return found


@cache
def correlations(of: Measured, group: str, steps: int) -> dict[str, Correlation]:
    """{criterion: rank correlation of its utility with the mean loss, signed so that +1 is right}, best first."""
    members = of.group(group)
    if len(members) < 3:
        return {}
    quality = [[-of.mean_loss(c.key, steps) for c in members]]
    found = {
        criterion: correlate([[values[c.key] for c in members]], quality)
        for criterion, values in of.scores.items()
        if all(c.key in values for c in members)
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].mean))


def agreement_of_seeds(of: Measured, group: str, steps: int) -> float | None:
    """Mean rank correlation of the losses of two seeds; no criterion can be expected to do much better."""
    members = of.group(group)
    count = len(next(iter(of.losses.values()))[steps]) if of.losses else 0
    if count < 2 or len(members) < 3:
        return None
    table = [[of.losses[c.key][steps][seed] for c in members] for seed in range(count)]
    pairs = [(i, j) for i in range(count) for j in range(i)]
    return statistics.fmean(correlate([table[i]], [table[j]]).mean for i, j in pairs)


def amounts(task: SelectionTask) -> dict[str, int | float]:
    """{words: a number of modules, or a fraction of the parameters}: budgets as `recommend` takes them."""
    by_count = {f"{size} modules": size for size in SIZES if size < len(task.modules)}
    return by_count | {f"{part:.0%} of the parameters": part for part in FRACTIONS}


def budgets(task: SelectionTask, rank: int) -> dict[str, tuple[int | None, float | None]]:
    """{words: (most modules, most parameters)}."""
    everything = task.parameters(list(task.modules), rank)
    return {
        words: (amount, None) if isinstance(amount, int) else (None, amount * everything)
        for words, amount in amounts(task).items()
    }


def within(of: Measured, limit: tuple[int | None, float | None]) -> list[Configuration]:
    """The measured sets that fit into a budget, picks included."""
    modules, parameters = limit
    return [
        c
        for c in of.sets
        if c.modules
        and (modules is None or len(c.modules) <= modules)
        and (parameters is None or of.task.parameters(c.modules, of.rank) <= parameters)
    ]


@cache
def regrets(of: Measured, steps: int) -> dict[str, dict[str, float]]:
    """{criterion: {budget: loss of the best-scored measured set that fits, less the least loss of those that fit}}.

    "random choice" is the mean over the sets that use the budget up to within a tenth.
    """
    found: dict[str, dict[str, float]] = {}
    for words, limit in budgets(of.task, of.rank).items():
        pool = [c for c in within(of, limit) if not c.picked]
        if not pool:
            continue
        best = min(of.mean_loss(c.key, steps) for c in pool)
        for criterion, values in of.scores.items():
            if all(c.key in values for c in pool):
                pick = max(pool, key=lambda c: values[c.key])
                found.setdefault(criterion, {})[words] = of.mean_loss(pick.key, steps) - best
        full = [c for c in pool if is_full(of, c, limit)]
        if full:
            found.setdefault(CHANCE, {})[words] = statistics.fmean(of.mean_loss(c.key, steps) for c in full) - best
    return found


def is_full(of: Measured, configuration: Configuration, limit: tuple[int | None, float | None]) -> bool:
    modules, parameters = limit
    if modules is not None:
        return len(configuration.modules) == modules
    return of.task.parameters(configuration.modules, of.rank) >= 0.9 * (parameters or 0.0)


@dataclass(frozen=True)
class Mean:
    """A mean over tasks with its 95 % bootstrap interval, tasks sampled with replacement."""

    mean: float
    low: float
    high: float
    tasks: int

    def __str__(self) -> str:
        if self.tasks < 3:
            return f"{self.mean:+.3f}"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def mean_over_tasks(by_task: Sequence[Sequence[float]], seed: int = 0) -> Mean:
    """Mean of the tasks' means."""
    means = np.array([np.mean(values) for values in by_task])
    draws = np.random.default_rng(seed).integers(0, len(means), (RESAMPLES, len(means)))
    low, high = np.quantile(means[draws].mean(axis=1), [0.025, 0.975])
    return Mean(float(means.mean()), float(low), float(high), len(means))


def with_sets(all_measured: Sequence[Measured]) -> list[Measured]:
    """Those of which more than single modules is trained, enough to rank; all, where that is so for none."""
    return [of for of in all_measured if len(of.group(SETS)) >= 3] or list(all_measured)


def summary(all_measured: Sequence[Measured], steps: Sequence[int]) -> dict[str, dict[str, Any]]:
    """{criterion: its mean rank correlations and regret}, over the tasks in which it can be computed, if in all.

    Tasks of which single modules alone are trained are left out, unless that is so for all.
    """
    all_measured = with_sets(all_measured)
    correlation = {
        group: [[correlations(of, group, budget) for budget in steps] for of in all_measured]
        for group in (SINGLES, SETS)
    }
    regret = [[regrets(of, budget) for budget in steps] for of in all_measured]
    shared = [name for name in all_measured[0].scores if all(name in of.scores for of in all_measured)]
    found: dict[str, dict[str, Any]] = {}
    for criterion in (*shared, CHANCE):  # in an order that does not change, which ties keep
        row: dict[str, Any] = {}
        for group, by_task in correlation.items():
            if all(criterion in table for tables in by_task for table in tables):
                row[group] = mean_over_tasks([[table[criterion].mean for table in tables] for tables in by_task])
        if all(criterion in table for tables in regret for table in tables):
            row["regrets"] = [[value for table in tables for value in table[criterion].values()] for tables in regret]
            row["regret"] = mean_over_tasks(row["regrets"])
        if row:
            found[criterion] = row
    return dict(sorted(found.items(), key=lambda item: item[1]["regret"].mean if "regret" in item[1] else np.inf))


def paired(found: Mapping[str, Mapping[str, Any]], first: str, second: str) -> Mean:
    """Regret of `first` less that of `second`, in the same tasks, budgets and steps."""
    pairs = zip(found[first]["regrets"], found[second]["regrets"], strict=True)
    return mean_over_tasks([[a - b for a, b in zip(x, y, strict=True)] for x, y in pairs])


def calibration(of: Measured) -> dict[str, dict[str, float]]:
    """{predicted loss: how far it is from the measured one of its budget, over single modules and sets}."""
    found = {}
    for criterion, values in of.scores.items():
        if not criterion.startswith("simulated AdamW"):
            continue
        steps = int(criterion.split(",")[1].split()[0])
        if steps not in next(iter(of.losses.values())):
            continue  # simulated for another protocol
        pairs = [(-values[c.key], of.mean_loss(c.key, steps)) for c in of.sets if c.key in values]
        errors = [predicted - real for predicted, real in pairs]
        found[criterion] = {
            "mean error": statistics.fmean(errors),
            "mean absolute error": statistics.fmean(map(abs, errors)),
            "spread of the measured": statistics.pstdev(real for _, real in pairs),
        }
    return found
