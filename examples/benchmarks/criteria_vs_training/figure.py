# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The figure of a measurement: rank correlation of every criterion, and two of them against the test loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from scipy.stats import rankdata

from examples.benchmarks.criteria_vs_training.training import Run
from examples.common.correlation import Correlation
from examples.common.figure_style import INK, finish, save


COLORS = {"lora": "#d1495b", "weight": "#30638e"}
REFERENCE = "condition_number"  # the paper's predictor is always shown


def draw(
    results: Mapping[str, Mapping[str, Correlation]],
    runs: Sequence[Run],
    scores: Mapping[tuple[str, int], Mapping[str, Mapping[str, float]]],
    path: Path,
) -> None:
    """Correlations with their intervals, and the ranks of the best criterion and of the condition number."""
    space = next(iter(results))
    best = next(name for name in results[space] if name not in (REFERENCE, "parameters"))
    figure = Figure(figsize=(16, 5.8), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    draw_correlations(left, results)
    for axes, name in ((middle, best), (right, REFERENCE)):
        depth = draw_ranks(axes, name, space, runs, scores, results[space][name])
    bar = figure.colorbar(depth, ax=right, ticks=[0, 1], pad=0.03, fraction=0.05)
    bar.ax.set_yticklabels(["first\nlayer", "last\nlayer"], fontsize=10, color=INK)
    bar.outline.set_visible(False)
    save(figure, path)


def draw_correlations(axes: Axes, results: Mapping[str, Mapping[str, Correlation]]) -> None:
    names = list(results[next(iter(results))])
    step = 0.32
    for number, (space, of) in enumerate(results.items()):
        rows = [row + (number - (len(results) - 1) / 2) * step for row in range(len(names))]
        means = [of[name].mean for name in names]
        low = [of[name].mean - of[name].low for name in names]
        high = [of[name].high - of[name].mean for name in names]
        color = COLORS[space]
        axes.errorbar(
            means,
            rows,
            xerr=(low, high),
            fmt="o",
            color=color,
            markersize=8,
            label=f'space="{space}"',
            capsize=0,
            elinewidth=2.2,
        )
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=11, color=INK)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(-1.03, 1.03)
    axes.set_xlabel("Spearman correlation with the test loss after training", color=INK)
    axes.legend(frameon=False, loc="upper left", fontsize=11)
    finish(axes, "Does the criterion rank modules as training does?")
    axes.grid(axis="y", visible=False)


def draw_ranks(
    axes: Axes,
    name: str,
    space: str,
    runs: Sequence[Run],
    scores: Mapping[tuple[str, int], Mapping[str, Mapping[str, float]]],
    correlation: Correlation,
) -> ScalarMappable:
    """A dot for each module and seed: its place by the criterion against its test loss, coloured by depth."""
    colors = ScalarMappable(Normalize(0, 1), cmap="viridis_r")
    for seed in sorted({seed for _, seed in scores}):
        losses = {run.module: run.test_loss for run in runs if run.seed == seed}
        modules = list(scores[space, seed][name])
        places = len(modules) + 1 - rankdata([scores[space, seed][name][module] for module in modules])
        depth = colors.to_rgba([position / len(modules) for position in range(len(modules))])
        axes.scatter(places, [losses[m] for m in modules], c=depth, s=55, alpha=0.85, linewidth=0)
    axes.set_xlabel("place by the criterion, before training (1: best)", color=INK)
    axes.set_ylabel("test loss", color=INK)
    finish(axes, f"{name.replace('_', ' ')}: {correlation.mean:+.2f}")
    return colors
