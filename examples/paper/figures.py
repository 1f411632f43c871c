# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The two figures: λ against distance, gap and accuracy; condition number against the loss that training reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from examples.common.correlation import Correlation
from examples.common.figure_style import INK, finish, save
from examples.paper.condition import ARM_NAMES, ARMS, ordered
from examples.paper.predictors import PAPER
from examples.paper.strength import KINDS
from examples.paper.strength_report import ACCURACY, LINEAR_ACCURACY, Runs, mean, pulled_by, values


REAL, LINEAR, THIRD, FOURTH = "#d1495b", "#30638e", "#edae49", "#66a182"
ARM_COLORS = dict(zip(ARMS, (REAL, THIRD, LINEAR, FOURTH), strict=True))

Line = tuple[str, str, str]  # field, label, colour


def draw_lambda(runs: Runs, path: Path) -> None:
    """A row for each kind of pull, three panels over λ; a line through the means, a dot for each seed."""
    figure = Figure(figsize=(16, 15.5), layout="constrained", facecolor="white")
    rows = []
    for part, (pulled, kind) in zip(figure.subfigures(len(KINDS), 1, hspace=0.04), KINDS.items(), strict=True):
        words = kind.words[0].upper() + kind.words[1:]
        part.suptitle(words, x=0.01, ha="left", fontsize=14, color=INK)
        rows.append(part.subplots(1, 3))
        _draw_row(rows[-1], pulled_by(runs, pulled), kind.scope)
    for column in zip(*rows, strict=True):  # one scale, so that rows can be compared
        limits = [axes.get_ylim() for axes in column]
        for axes in column:
            axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    save(figure, path)


def _draw_row(row: Sequence[Axes], runs: Runs, scope: str) -> None:
    left, middle, right = row
    own, same = "gap_at_own", "gap_at_model"
    lines = [
        (f"distance/{scope}", "fine-tuned", REAL),
        (f"linear_distance/{scope}", "linearised, trained on its own", LINEAR),
    ]
    _panel(left, runs, lines, "‖θ−θ0‖ of the pulled parameters", "How far training goes")
    lines = [
        (f"{own}/relative_difference", "logits, each trained on its own", REAL),
        (f"{own}/pooled_movement_gap", "the same, by the movement", THIRD),
        (f"{same}/pooled_movement_gap", "by the movement, at the same θ", LINEAR),
    ]
    _panel(middle, runs, lines, "fine-tuned against linearised", "How linear it stays")
    lines = [(ACCURACY, "fine-tuned", REAL), (LINEAR_ACCURACY, "linearised", LINEAR)]
    _panel(right, runs, lines, "test accuracy", "What it costs")
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _panel(axes: Axes, runs: Runs, lines: Sequence[Line], ylabel: str, title: str) -> None:
    """Strengths in equal steps: 0 has no place on a logarithmic axis."""
    for field, label, color in lines:
        of = values(runs, field)
        strengths = sorted(of)
        means = [mean(of[pull]) for pull in strengths]
        axes.plot(range(len(strengths)), means, color=color, linewidth=2.4, label=label)
        for place, pull in enumerate(strengths):
            axes.scatter([place] * len(of[pull]), of[pull], s=42, color=color, alpha=0.6, linewidth=0, zorder=3)
    axes.set_xticks(range(len(strengths)), [f"{pull:g}" for pull in strengths])
    axes.set_xlabel("strength λ of the proximal term", color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.margins(y=0.16)
    axes.legend(frameon=False, fontsize=10, loc="lower left")
    finish(axes, title)


def draw_condition(
    runs: Runs,
    tables: Mapping[str, Mapping[tuple[str, str], Mapping[str, Correlation]]],
    path: Path,
) -> None:
    """Above, the paper's predictor against the final training loss; below, the rank correlation of all predictors."""
    figure = Figure(figsize=(16, 12.5), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.14)
    cells = figure.add_gridspec(2, 4, height_ratios=(1, 1.7))
    for column, arm in enumerate(ARMS):
        axes = figure.add_subplot(cells[0, column])
        sizes = _draw_scatter(axes, [run for run in runs if (run["loss"], run["optimizer"]) == arm])
        finish(axes, f"{ARM_NAMES[arm]}: {tables['final training loss'][arm][PAPER].mean:+.2f}")
        if column == 0:
            axes.set_ylabel("final training loss", color=INK)
    bar = figure.colorbar(sizes, ax=axes, pad=0.03, fraction=0.06)
    bar.set_label("number of layers", color=INK)
    bar.outline.set_visible(False)
    first = figure.add_subplot(cells[1, :2])
    second = figure.add_subplot(cells[1, 2:], sharey=first)
    for axes, (outcome, arms) in zip((first, second), tables.items(), strict=True):
        _draw_correlations(axes, arms)
        finish(axes, f"Rank correlation with the {outcome}")
        axes.grid(axis="y", visible=False)
    names = [name.replace("_", " ") for name in ordered(tables["final training loss"])]
    first.set_yticks(range(len(names)), names, fontsize=11, color=INK)
    second.tick_params(labelleft=False)
    first.legend(frameon=False, loc="lower left", fontsize=10)
    save(figure, path)


def _draw_scatter(axes: Axes, runs: Runs) -> ScalarMappable:
    """A dot for each choice of layers, coloured by the number of layers."""
    most = max(len(run["choice"]) for run in runs)
    colors = ScalarMappable(BoundaryNorm(np.arange(0.5, most + 1), ncolors=256), cmap="viridis_r")
    numbers = [run["predictors"][PAPER] for run in runs]
    losses = [run["train"]["loss"] for run in runs]
    shades = colors.to_rgba([len(run["choice"]) for run in runs])
    axes.scatter(numbers, losses, c=shades, s=55, alpha=0.9, linewidth=0, zorder=3)
    axes.set_xscale("log")
    axes.set_xlabel("condition number (σ = 1e-4) before training", color=INK)
    finite = [loss for loss in losses if 0 < loss < np.inf]
    if finite and max(finite) > 5 * min(finite):
        axes.set_yscale("log")
    if finite and max(numbers) < 10 * min(numbers):
        marks = np.geomspace(min(numbers), max(numbers), 3)
        axes.xaxis.set_major_locator(FixedLocator(marks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([f"{mark:.2g}" for mark in marks])
    colors.set_array([])
    return colors


def _draw_correlations(axes: Axes, arms: Mapping[tuple[str, str], Mapping[str, Correlation]]) -> None:
    names = ordered(arms)
    step = 0.18
    for number, (arm, of) in enumerate(arms.items()):
        rows = [row + (number - (len(arms) - 1) / 2) * step for row in range(len(names))]
        middle = [of[name].mean for name in names]
        low = [max(0.0, of[name].mean - of[name].low) for name in names]
        high = [max(0.0, of[name].high - of[name].mean) for name in names]
        axes.errorbar(
            middle,
            rows,
            xerr=(low, high),
            fmt="o",
            color=ARM_COLORS[arm],
            markersize=6,
            elinewidth=1.8,
            label=ARM_NAMES[arm],
        )
    for row in range(1, len(names), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#f4f6f7", zorder=0)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(-1.03, 1.03)
    axes.set_xlabel("positive: choices that the predictor prefers train better", color=INK)
