# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The figure of the forgetting benchmark, from its summary alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.common.figure_style import INK, finish, save


OURS = {
    "proximal_factors": "#d1495b",
    "proximal_factors_selective": "#e8909c",
    "proximal_delta": "#e07a1f",
    "proximal_delta_selective": "#f0b67f",
    "proximal_factors_scaled": "#8c1c2d",
    "proximal_delta_scaled": "#8a4a0f",
}
BASELINE_COLORS = ("#30638e", "#66a182", "#7b6ba8", "#003d5b", "#8d99a6", "#4aa8b8", "#a3a847", "#5c7f67")


def draw(record: Mapping, path: Path) -> None:
    """A row a setting: the paths in means over seeds, and how much more or less than ours each arm forgets."""
    settings = record["settings"]
    figure = Figure(figsize=(16, 6.6 * len(settings)), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    rows = figure.subplots(len(settings), 2, squeeze=False, width_ratios=(1.25, 1))
    for (left, right), summary in zip(rows, settings.values(), strict=True):
        draw_paths(left, summary)
        draw_levels(right, summary)
    save(figure, path)


def colors(summary: Mapping) -> dict[str, str]:
    baselines = [key for key, arm in summary["arms"].items() if not arm["ours"]]
    return {**OURS, **{key: BASELINE_COLORS[place % len(BASELINE_COLORS)] for place, key in enumerate(baselines)}}


def draw_paths(axes: Axes, summary: Mapping) -> None:
    """Target loss against what is forgotten: the lower left corner is where one wants to be."""
    measure, palette = summary["primary_measure"], colors(summary)
    for key, points in summary["curves"].items():
        ours = summary["arms"][key]["ours"]
        axes.plot(
            [point["target_loss"] for point in points],
            [point["forgotten"][measure] for point in points],
            color=palette[key],
            linewidth=2.4 if ours else 1.5,
            linestyle="-" if ours else (0, (4, 1.6)),
            marker="o" if ours else "s",
            markersize=5.5 if ours else 4,
            label=summary["arms"][key]["words"],
            zorder=3 if ours else 2,
        )
    base = summary["reference"]["base"]
    lora = next((points[0] for points in summary["curves"].values() if points[0]["arm"] == "lora"), None)
    axes.scatter(base["target_loss"], 0, color=INK, marker="D", s=60, zorder=4)
    axes.annotate(
        "base model", (base["target_loss"], 0), xytext=(-6, 8), textcoords="offset points", ha="right", color=INK
    )
    if lora is not None:
        corner = (lora["target_loss"], lora["forgotten"][measure])
        axes.scatter(*corner, color=INK, marker="*", s=170, zorder=5)
        axes.annotate("plain LoRA", corner, xytext=(9, 2), textcoords="offset points", color=INK)
    words = {entry["key"]: entry["words"] for entry in summary["setting"]["measures"]}
    axes.set_xlabel(summary["setting"]["target"], color=INK)
    axes.set_ylabel(words[measure], color=INK)
    axes.legend(frameon=False, fontsize=8.5, loc="upper right")
    finish(axes, summary["setting"]["title"])


def draw_levels(axes: Axes, summary: Mapping) -> None:
    """What each arm forgets at the primary level less what the plainest form of ours does, with intervals."""
    measure, level, palette = summary["primary_measure"], str(summary["primary_level"]), colors(summary)
    against = next((key for key in summary["differences"][measure] if summary["matched"][measure][key][level]), None)
    if against is None:
        axes.set_axis_off()
        return
    found = {key: of[level] for key, of in summary["differences"][measure][against].items() if of[level] is not None}
    order = sorted(found, key=lambda key: -found[key]["mean"])
    for row, key in enumerate(order):
        mean, low, high = (
            -found[key][name] if found[key][name] is not None else None for name in ("mean", "high", "low")
        )
        if low is not None:
            axes.plot([low, high], [row, row], color=palette[key], linewidth=2.6, solid_capstyle="round")
        axes.scatter(
            mean, row, color=palette[key], s=75, zorder=3, marker="o" if summary["arms"][key]["ours"] else "s"
        )
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(order)), [summary["arms"][key]["words"] for key in order], fontsize=9.5, color=INK)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_xlabel(f"← less forgotten than with {summary['arms'][against]['words']}, more →", color=INK)
    finish(axes, f"Paired differences at {float(level):.0%} of LoRA's gain")
    axes.grid(axis="y", visible=False)
