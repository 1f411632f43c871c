# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The figure of the tasks that are sampled with fixed seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from examples.benchmarks.selection.picks import RECOMMENDED
from examples.benchmarks.selection_fresh.compared import Finished, compared
from examples.common.figure_style import INK, finish, save


TICKS = (-0.3, -0.1, -0.03, 0.0, 0.03, 0.1, 0.3, 1.0)  # of the figure, nats
COLORS = {"text": "#30638e", "vision": "#d1495b", "language": "#edae49"}


def draw(found: Sequence[Finished], path: Path) -> None:
    """A dot for each task: what a selector's modules lose against the default's."""
    names = [name for name in compared(found) if name != RECOMMENDED]
    figure = Figure(figsize=(10, 1.6 + 0.4 * len(names)), layout="constrained", facecolor="white")
    axes = figure.subplots()
    rows = np.arange(len(names))
    for kind, color in COLORS.items():
        for number, of in enumerate(of for of in found if of.kind == kind):
            values = [of.excess(name, RECOMMENDED) for name in names]
            label = kind if number == 0 else None
            axes.plot(values, rows, "o", color=color, alpha=0.6, markersize=6, linewidth=0, label=label)
    for row, name in enumerate(names):
        mean = compared(found)[name][1]
        axes.plot([mean.low, mean.high], [row, row], color=INK, linewidth=2)
        axes.plot([mean.mean], [row], "|", color=INK, markersize=16, markeredgewidth=2)
    axes.axvline(0.0, color=INK, linewidth=0.8)
    axes.set_xscale("symlog", linthresh=0.05)
    axes.set_xticks(TICKS, [f"{value:+g}" if value else "0" for value in TICKS])
    axes.minorticks_off()
    axes.set_yticks(rows, [name.replace("_", " ") for name in names], fontsize=10, color=INK)
    axes.set_ylim(len(names) - 0.5, -0.5)
    finish(axes, "Test loss above the default's (nats)")
    figure.legend(frameon=False, loc="outside lower center", ncols=len(COLORS))
    save(figure, path)
