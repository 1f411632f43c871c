# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The figure of one view of the selection benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from examples.benchmarks.selection.analysis import (
    SETS,
    SINGLES,
    Measured,
    correlations,
    regrets,
    summary,
    with_sets,
)
from examples.common.figure_style import INK, finish, save


COLORS = {"validation": "#30638e", "test": "#d1495b"}


def draw(all_measured: Sequence[Measured], steps: Sequence[int], path: Path, count: int = 24) -> None:
    """A dot for each task: rank correlations on single modules and on sets, and the regret; criteria best first."""
    found = summary(all_measured, steps)
    all_measured = with_sets(all_measured)
    names = [name for name, row in found.items() if {SINGLES, SETS, "regret"} <= set(row)][:count]
    figure = Figure(figsize=(16, 1.6 + 0.34 * len(names)), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 3, sharey=True)
    rows = np.arange(len(names))
    for axes, group in zip(panels, (SINGLES, SETS, "regret"), strict=True):
        for of in all_measured:
            values = [_value(of, group, name, steps) for name in names]
            axes.plot(values, rows, "o", color=COLORS[of.task.family], alpha=0.6, markersize=6, linewidth=0)
        axes.plot([found[name][group].mean for name in names], rows, "|", color=INK, markersize=16, markeredgewidth=2)
    panels[0].set_yticks(rows, [name.replace("_", " ") for name in names], fontsize=10, color=INK)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    titles = ("Rank correlation: single modules", "Rank correlation: sets", "Regret (nats)")
    for axes, title in zip(panels, titles, strict=True):
        finish(axes, title)
    for family, color in COLORS.items():
        if any(of.task.family == family for of in all_measured):
            panels[2].plot([], [], "o", color=color, label=f"a task of the family “{family}”")
    panels[2].plot([], [], "|", color=INK, markersize=12, markeredgewidth=2, label="mean of all tasks")
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    save(figure, path)


def _value(of: Measured, group: str, name: str, steps: Sequence[int]) -> float:
    if group == "regret":
        return statistics.fmean(value for budget in steps for value in regrets(of, budget)[name].values())
    return statistics.fmean(correlations(of, group, budget)[name].mean for budget in steps)
