# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The figure of the demo's result: what was predicted for each arm, and every measured run as a dot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from examples.common.figure_style import INK, save
from examples.demo.arms import Arm, Run, mean_and_deviation
from examples.demo.summary import Summary


COLORS = ("#d1495b", "#30638e", "#8d99a6", "#edae49", "#66a182")


def draw_results(summary: Summary, arms: Sequence[Arm], path: Path) -> None:
    """Three panels with a row for each arm: predicted loss, measured test loss, measured test accuracy."""
    figure = Figure(figsize=(15, 1.6 + 1.05 * len(arms)), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    left, middle, right = figure.subplots(1, 3, sharey=True)
    draw_predictions(left, summary, arms)
    draw_runs(middle, summary, arms, lambda run: run.test_loss, "Measured: test loss")
    draw_runs(right, summary, arms, lambda run: run.test_accuracy, "Measured: test accuracy")
    right.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    labels = [
        f"{arm.label.replace(', ', chr(10))}\n{summary.runs[arm.key][0].adapter_parameters:,} parameters"
        for arm in arms
    ]
    left.set_yticks(range(len(arms)), labels, fontsize=11, color=INK)
    left.set_ylim(len(arms) - 0.5, -0.5)
    save(figure, path)


def draw_predictions(axes: Axes, summary: Summary, arms: Sequence[Arm]) -> None:
    """A diamond an arm: the held-out loss that the kernels predict."""
    for row, (arm, color) in enumerate(zip(arms, COLORS, strict=False)):
        axes.scatter(summary.predicted[arm.key]["loss"], row, s=110, marker="D", color=color, linewidth=0, zorder=3)
    axes.margins(x=0.25)
    _finish(axes, "Predicted before training: loss")


def draw_runs(axes: Axes, summary: Summary, arms: Sequence[Arm], value: Callable[[Run], float], title: str) -> None:
    """A dot for each seed, a bar at the mean."""
    for row, (arm, color) in enumerate(zip(arms, COLORS, strict=False)):
        values = [value(run) for run in summary.runs[arm.key]]
        mean, _ = mean_and_deviation(values)
        axes.scatter(values, [row] * len(values), s=75, color=color, alpha=0.55, linewidth=0, zorder=3)
        axes.plot([mean, mean], [row - 0.24, row + 0.24], color=color, linewidth=3.5, solid_capstyle="round", zorder=4)
    axes.margins(x=0.12)
    _finish(axes, title)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=12.5, color=INK, fontweight="bold", pad=12)
    axes.grid(axis="x", color="#e3e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
