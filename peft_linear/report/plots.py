# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Figures of a `Recommendation`, without pyplot: no global backend, figure list or rcParams is touched."""

from __future__ import annotations

import importlib.util
import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PeftLinearError
from ..files import atomic_file
from ..recommendation.data import RecommendationData
from ..recommendation.names import Grid, layer_grid, short_labels
from .formatting import alike, improvements


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


CHOSEN, ALL, REST, HEAD, INK = "#d1495b", "#30638e", "#b8c4cc", "#8d99a6", "#22303c"
_MAX_BARS = 60
_TITLE = 120  # characters of the rule above the figure
_LOG_RANGE = 20.0  # with a best improvement so many times the median one, the axis is logarithmic


def matplotlib_available() -> bool:
    """Whether figures can be drawn here (the extra `[plot]`)."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_recommendation(recommendation: RecommendationData, path: str | os.PathLike) -> None:
    """Spectra, scores by layer and kind, and sorted scores, written to `path` (its suffix says the format).

    Raises:
        PeftLinearError: matplotlib is not installed, or it cannot write files of this suffix.
    """
    write_figure(recommendation_figure(recommendation), path)


def write_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a figure whole or not at all.

    Raises:
        PeftLinearError: matplotlib cannot write files of this suffix.
    """
    kind = Path(path).suffix.lstrip(".").lower() or "png"
    if kind not in figure.canvas.get_supported_filetypes():
        known = ", ".join(sorted(figure.canvas.get_supported_filetypes()))
        raise PeftLinearError(f"cannot write a figure as {Path(path).name!r}: the suffix must be one of {known}")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=160)


def recommendation_figure(recommendation: RecommendationData) -> Figure:
    """The figure itself, not attached to any window.

    Raises:
        PeftLinearError: matplotlib is not installed.
    """
    grid = _grid(recommendation)
    bars = min(len(recommendation.scores), _MAX_BARS)
    height = max(7.5, 2.6 + 0.20 * bars, 4.2 + 0.34 * len(grid.rows))
    figure = new_figure((15, min(height, 24)))
    cells = figure.add_gridspec(2, 2, width_ratios=(1.15, 1), height_ratios=(1, 1.15))
    draw_spectra(figure.add_subplot(cells[0, 0]), recommendation)
    draw_heat_map(figure.add_subplot(cells[1, 0]), recommendation)
    draw_scores(figure.add_subplot(cells[:, 1]), recommendation)
    total = sum(row.parameters for row in recommendation.scores)
    rule = textwrap.shorten(recommendation.rule.text, _TITLE, placeholder=" …").replace("$", r"\$")
    figure.suptitle(
        f"{rule}\n{len(recommendation.modules)} of {len(recommendation.scores)} modules chosen before training, "
        f"{recommendation.parameters:,} of {total:,} adapter parameters",
        fontsize=15,
        color=INK,
        fontweight="bold",
    )
    return figure


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure of that many inches, with no window and no entry in pyplot's list.

    Raises:
        PeftLinearError: matplotlib is not installed.
    """
    if not matplotlib_available():
        raise PeftLinearError("figures need matplotlib; install it with: pip install 'peft-linear[plot]'")
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.03, hspace=0.04)
    return Figure(figsize=size, layout=layout, facecolor="white")


def draw_spectra(axes: Axes, recommendation: RecommendationData) -> None:
    """Eigenvalues of the kernels of the choice, of all candidates and of the always-trained parameters, log scale.

    With always-trained parameters the first two are of the adapters alone: the head's kernel would cover both.
    """
    styles = {"all": (ALL, "all candidates"), "chosen": (CHOSEN, "the choice")}
    if "always trained" in recommendation.spectra:
        styles = {f"{key}, adapters": style for key, style in styles.items()}
        styles["always trained"] = (HEAD, "the head")
    floor, low = 0.0, float("inf")
    for key, (color, label) in styles.items():
        spectrum = recommendation.spectra.get(key)
        if spectrum is None or not spectrum.numerical_rank:
            continue
        values = spectrum.eigenvalues[: spectrum.numerical_rank]
        text = f"{label} (numerical rank {spectrum.numerical_rank} of {len(spectrum)})"
        marker = "o" if len(values) == 1 else None
        axes.plot(range(1, len(values) + 1), values.tolist(), color=color, linewidth=2.2, label=text, marker=marker)
        floor, low = max(floor, spectrum.noise_floor), min(low, float(values[-1]))
    if not floor:
        axes.text(0.5, 0.5, "no spectrum", ha="center", transform=axes.transAxes, color=INK)
        return finish(axes, "Spectrum of the kernel")
    axes.set_yscale("log")
    ridge = low if recommendation.ridge is None else recommendation.ridge
    bottom = min(low, ridge) / 8
    if floor * 100 > bottom:  # near enough to be worth the room
        bottom = min(bottom, floor / 3)
        axes.axhspan(bottom, floor, color="#eceff1", zorder=0)
        axes.text(0.01, floor, " noise floor", va="top", fontsize=9, color=HEAD, transform=axes.get_yaxis_transform())
    axes.axhline(ridge, color=INK, linewidth=1, linestyle=(0, (5, 4)))
    axes.text(
        0.99,
        ridge,
        "ridge λ ",
        va="bottom",
        ha="right",
        color=INK,
        transform=axes.get_yaxis_transform(),
    )
    axes.set_ylim(bottom=bottom)
    axes.set_xlabel("index i", color=INK)
    axes.set_ylabel("eigenvalue λi", color=INK)
    axes.set_ylim(top=axes.get_ylim()[1] * 8)  # room for the legend
    axes.legend(frameon=False, fontsize=10, loc="upper right")
    finish(axes, "Spectrum of the kernel")


def draw_heat_map(axes: Axes, recommendation: RecommendationData) -> None:
    """Each candidate by layer and kind, coloured by the rank of its score; a chosen one has a frame and its rank r.

    Beside layers and kinds are the sums of their improvements. Ranks, not scores, so that one outstanding module does
    not make all others look alike; the colour bar has scores.
    """
    import numpy as np
    from matplotlib.patches import Rectangle

    grid = _grid(recommendation)
    rows = recommendation.scores
    matrix = np.full((len(grid.rows), len(grid.columns)), np.nan)
    for row in rows:
        matrix[grid.cells[row.name]] = len(rows) - row.rank
    by_layer, by_kind = _sums(recommendation, grid)
    last = max(len(rows) - 1, 1)
    image = axes.imshow(matrix, aspect="auto", cmap="YlGnBu", vmin=0, vmax=last)
    axes.set_facecolor("#f4f6f7")
    for name, rank in recommendation.ranks.items():
        layer, x = grid.cells[name]
        axes.add_patch(Rectangle((x - 0.46, layer - 0.44), 0.92, 0.88, fill=False, edgecolor=CHOSEN, linewidth=2.6))
        color = "white" if matrix[layer, x] > 0.55 * last else INK
        axes.text(x, layer, str(rank), ha="center", va="center", fontsize=10, fontweight="bold", color=color)
    axes.set_xticks(
        range(len(grid.columns)),
        [f"{c} ({s})" for c, s in zip(grid.columns, by_kind, strict=True)],
        rotation=28,
        ha="right",
        fontsize=9,
        rotation_mode="anchor",
    )
    axes.set_yticks(
        range(len(grid.rows)), [f"{r} ({s})" for r, s in zip(grid.rows, by_layer, strict=True)], fontsize=9
    )
    axes.set_ylabel("layer (sum of improvements)", color=INK)
    axes.tick_params(length=0)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.015, fraction=0.05)
    bar.outline.set_visible(False)  # type: ignore[operator]
    marks = sorted({round(last * part) for part in (0, 0.25, 0.5, 0.75, 1)})
    marks = [mark for mark in marks if mark < len(rows)]
    bar.set_ticks(marks, labels=[f"{rows[len(rows) - 1 - mark].score:.4g}" for mark in marks])
    bar.ax.tick_params(labelsize=9, length=0)
    bar.set_label("score at this rank, best on top", fontsize=9, color=INK)
    finish(axes, "Rank of the score; framed: chosen, with the adapter's rank")
    for side in axes.spines.values():
        side.set_visible(False)


def draw_scores(axes: Axes, recommendation: RecommendationData) -> None:
    """Sorted candidates, the choice highlighted; longer is better.

    Where the score without any adapter is known, a bar is the improvement over it (logarithmic if improvements span
    decades; modules that improve nothing then have no bar); otherwise the score itself.
    """
    rows = recommendation.scores
    shown = rows if len(rows) <= _MAX_BARS else _best_and_chosen(recommendation)
    labels = short_labels(row.name for row in rows)
    gains, label = improvements(recommendation)
    values = [gains[row.name] for row in shown]
    better = [value for value in values if value > 0]
    logarithmic = bool(better) and max(better) > _LOG_RANGE * sorted(better)[len(better) // 2]
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(max(min(better), 1e-7 * max(better)) / 2, max(better) * 1.5)
    colors = [CHOSEN if row.chosen else REST for row in shown]
    axes.barh(range(len(shown)), values, color=colors, height=0.74)
    if not logarithmic:
        axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(shown)), [labels[row.name] for row in shown], fontsize=8.5 if len(shown) <= 40 else 7)
    for text, row in zip(axes.get_yticklabels(), shown, strict=True):
        text.set_color(CHOSEN if row.chosen else INK)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", color="#e3e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(label + (", log scale" if logarithmic else ""), color=INK)
    hidden = len(rows) - len(shown)
    finish(axes, "Each alone, best first; red: chosen" + (f" ({hidden} more not shown)" if hidden else ""))


def _grid(recommendation: RecommendationData) -> Grid:
    return layer_grid(recommendation.candidates)


def _sums(recommendation: RecommendationData, grid: Grid) -> tuple[list[str], list[str]]:
    """Improvements summed by row and by column, as texts."""
    gains, _ = improvements(recommendation)
    totals = [[0.0] * len(grid.rows), [0.0] * len(grid.columns)]
    for name, place in grid.cells.items():
        for axis in (0, 1):
            totals[axis][place[axis]] += gains[name]
    by_layer, by_kind = ([alike(values)[value] for value in values] for values in totals)
    return by_layer, by_kind


def _best_and_chosen(recommendation: RecommendationData) -> list[Any]:
    budget = _MAX_BARS - len(recommendation.modules)
    rejected = {row.name for row in [row for row in recommendation.scores if not row.chosen][: max(budget, 0)]}
    return [row for row in recommendation.scores if row.chosen or row.name in rejected]


def finish(axes: Axes, text: str) -> None:
    """Title, and no frame above and to the right."""
    axes.set_title(text, loc="left", fontsize=11.5, color=INK, fontweight="bold")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
