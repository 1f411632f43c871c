# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The figures of predicted curves: predicted and real losses at every λ, and the gap against the error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from examples.benchmarks.predicted_curves.report import comparisons
from examples.common.figure_style import INK, finish, save
from peft_linear.capture.gap import VERDICTS


SERIES = (("#d1495b", "o"), ("#30638e", "s"), ("#66a182", "^"))


def draw(record: Mapping[str, Any], path: Path) -> None:
    """A row for each optimizer: training loss, held-out loss, gap and error at the end against λ."""
    methods = record["methods"]
    figure = Figure(figsize=(16, 5.3 * len(methods)), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    grid = figure.subplots(len(methods), 3, squeeze=False)
    for row, method in zip(grid, methods, strict=True):
        runs = [run for run in record["runs"] if run["method"] == method["key"]]
        title = f"{method['label']}, learning rate {method['learning_rate']:g}"
        draw_curves(row[0], runs, "train_loss", f"{title}: training loss")
        draw_curves(row[1], runs, "held_out_loss", "held-out loss")
        draw_ends(row[2], runs)
    save(figure, path)


def draw_curves(axes: Axes, runs: list[dict], quantity: str, title: str) -> None:
    """Predicted dashed, real solid with a dot at every evaluation; a colour for each λ."""
    handles = []
    for number, run in enumerate(runs):
        color = colormaps["plasma"](0.88 * (1 - number / max(1, len(runs) - 1)))
        axes.plot(run["predicted"]["recorded"], run["predicted"][quantity], "--", color=color, linewidth=2)
        steps = [point["step"] for point in run["points"]]
        axes.plot(steps, [point[quantity] for point in run["points"]], "-o", color=color, linewidth=2, markersize=5)
        handles.append(Line2D([], [], color=color, linewidth=3, label=f"λ = {run['ridge']:g}"))
    handles += [
        Line2D([], [], color=INK, linestyle="--", linewidth=2, label="predicted before training"),
        Line2D([], [], color=INK, marker="o", markersize=5, linewidth=2, label="real"),
    ]
    if quantity == "train_loss":  # one legend a row
        axes.legend(handles=handles, frameon=False, fontsize=10, loc="lower left")
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("cross-entropy", color=INK)
    finish(axes, title)


def draw_ends(axes: Axes, runs: list[dict]) -> None:
    ends = [comparisons(run)[-1] for run in runs]
    series = (
        ("gap, relative to the movement", [run["report"]["pooled_movement_gap"] for run in runs]),
        ("gap, relative to the logits", [run["report"]["relative_difference"] for run in runs]),
        ("predicted held-out loss off by", [end.relative_error for end in ends]),
    )
    for (label, values), (color, marker) in zip(series, SERIES, strict=True):
        axes.plot(range(len(runs)), values, marker=marker, color=color, linewidth=2, markersize=7, label=label)
    axes.set_xticks(range(len(runs)), [f"{run['ridge']:g}" for run in runs])
    axes.set_xlabel("λ", color=INK)
    axes.set_ylim(0, None)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(frameon=False, fontsize=10)
    finish(axes, "at the end of the training")


def draw_thresholds(record: Mapping[str, Any], path: Path) -> None:
    """Every evaluation of every run: the gap against the relative error of the predicted held-out loss."""
    figure = Figure(figsize=(8.5, 5.6), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for method, (color, marker) in zip(record["methods"], SERIES, strict=False):
        points = [c for run in record["runs"] if run["method"] == method["key"] for c in comparisons(run)]
        gaps, errors = [c.gap for c in points], [max(c.relative_error, 1e-5) for c in points]
        axes.scatter(gaps, errors, s=55, color=color, marker=marker, alpha=0.75, linewidth=0, label=method["label"])
    for verdict in VERDICTS:
        axes.axvline(verdict.gap, color=INK, linewidth=1, linestyle=":")
        place = {"xycoords": ("data", "axes fraction"), "va": "top", "ha": "right", "rotation": 90}
        axes.annotate(f"{verdict.word} ", (verdict.gap, 1), color=INK, **place)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.set_xlabel("gap relative to the movement (held-out examples)", color=INK)
    axes.set_ylabel("error of the predicted held-out loss", color=INK)
    axes.legend(frameon=False, fontsize=11, loc="lower right")
    finish(axes, "Does the gap tell whether the prediction holds?")
    save(figure, path)
