# Copyright 2026 The peft-linear authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The figure of the demo's result: every run as a dot, and the predicted loss beside the measured one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from arms import Arm, Run, mean_and_deviation
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from summary import Summary


COLORS = ("#d1495b", "#30638e", "#8d99a6")
INK = "#22303c"


def draw_results(summary: Summary, arms: Sequence[Arm], path: Path) -> None:
    """Three panels: test loss, test accuracy, and predicted against measured loss."""
    figure = Figure(figsize=(15, 5), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    left, middle, right = figure.subplots(1, 3)
    draw_dots(left, summary, arms, lambda run: run.test_loss, "Test loss (lower is better)")
    draw_dots(middle, summary, arms, lambda run: run.test_accuracy, "Test accuracy (higher is better)")
    middle.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    middle.set_yticklabels([])
    draw_prediction(right, summary, arms)
    figure.savefig(path, dpi=160)


def draw_dots(axes: Axes, summary: Summary, arms: Sequence[Arm], value: Callable[[Run], float], title: str) -> None:
    """One row an arm: a dot for each seed, a bar at the mean."""
    for row, (arm, color) in enumerate(zip(arms, COLORS, strict=True)):
        values = [value(run) for run in summary.runs[arm.key]]
        mean, _ = mean_and_deviation(values)
        axes.scatter(values, [row] * len(values), s=70, color=color, alpha=0.55, linewidth=0, zorder=3)
        axes.plot([mean, mean], [row - 0.22, row + 0.22], color=color, linewidth=3.5, solid_capstyle="round", zorder=4)
    labels = [f"{arm.label.replace(', ', chr(10))}\n{summary.runs[arm.key][0].adapter_parameters:,}" for arm in arms]
    axes.set_yticks(range(len(arms)), labels, fontsize=11, color=INK)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.margins(x=0.12)
    _finish(axes, title)


def draw_prediction(axes: Axes, summary: Summary, arms: Sequence[Arm]) -> None:
    """Predicted loss (kernels, before training) against measured test loss, a dot for each run."""
    for arm, color in zip(arms, COLORS, strict=True):
        predicted = summary.predicted[arm.key]["loss"]
        measured = [run.test_loss for run in summary.runs[arm.key]]
        axes.scatter([predicted] * len(measured), measured, s=70, color=color, alpha=0.6, linewidth=0, zorder=3)
        mean, _ = mean_and_deviation(measured)
        axes.annotate(
            arm.key.replace("_", " "), (predicted, mean), (10, 0), textcoords="offset points", color=color, va="center"
        )
    axes.set_xlabel("predicted before training", color=INK)
    axes.set_ylabel("measured", color=INK)
    axes.margins(x=0.35, y=0.15)
    _finish(axes, "Test loss, predicted and measured")
    axes.grid(axis="y", color="#e3e8eb", linewidth=0.8)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=13, color=INK, fontweight="bold", pad=12)
    axes.grid(axis="x", color="#e3e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
