# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What every selector's choice reaches on a task, and how selectors compare over tasks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from examples.benchmarks.selection.analysis import Mean, mean_over_tasks
from examples.benchmarks.selection.picks import EXCLUDING, RANDOM, RANDOM_DRAWS, RECOMMENDED, WITHOUT_EXCLUSIONS
from examples.benchmarks.selection.tasks import SelectionTask


SCORED = ("fisher", "page", "gora", "eva")
DRAWS = tuple(f"{RANDOM} {draw}" for draw in range(RANDOM_DRAWS))
SELECTORS = (RECOMMENDED, WITHOUT_EXCLUSIONS, *SCORED, EXCLUDING.format("fisher"), "qv", "mlp_only", *DRAWS)
COMPARED = (*SELECTORS[: -len(DRAWS)], RANDOM)  # the mean of the draws
WITHOUT_EXCLUDED = "all linear, without the pooler"

Losses = dict[str, dict[str, float]]  # selector -> budget -> test loss, the mean over seeds


@dataclass(frozen=True)
class Finished:
    """One task, and the test losses of the selectors' choices."""

    task: SelectionTask
    losses: Losses
    references: dict[str, float]  # set -> test loss of sets that need no choice

    @property
    def kind(self) -> str:
        return self.task.key.partition("_")[0]

    def excess(self, selector: str, other: str) -> float:
        """Loss of one selector's modules above that of another's, the mean over budgets."""
        return statistics.fmean(
            self.losses[selector][words] - self.losses[other][words] for words in self.losses[other]
        )

    def regret(self, selector: str) -> float:
        """Loss above the least of all selectors, the mean over budgets."""
        of = self.losses
        return statistics.fmean(of[selector][w] - min(losses[w] for losses in of.values()) for w in of[selector])


def compared(found: Sequence[Finished]) -> dict[str, tuple[Mean, Mean, int]]:
    """{selector: its regret, its excess over the default, tasks in which the default is better}, least regret first.

    Regret and excess are means over tasks.
    """
    rows = {}
    for name in COMPARED:
        excess = [of.excess(name, RECOMMENDED) for of in found]
        rows[name] = (
            mean_over_tasks([[of.regret(name)] for of in found]),
            mean_over_tasks([[value] for value in excess]),
            sum(value > 0 for value in excess),
        )
    return dict(sorted(rows.items(), key=lambda item: item[1][0].mean))
