# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The forgetting benchmark on a page: README.md and figure.png, both from summary.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from forgetting_analysis import LESS, MORE
from forgetting_verdict import interval, overall, verdict
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peft_linear.report.markdown import markdown_table


INK, GRID, LORA_COLOR = "#22303c", "#e3e8eb", "#22303c"
OURS = {
    "proximal_factors": "#d1495b",
    "proximal_factors_selective": "#e8909c",
    "proximal_delta": "#e07a1f",
    "proximal_delta_selective": "#f0b67f",
    "proximal_factors_scaled": "#8c1c2d",
    "proximal_delta_scaled": "#8a4a0f",
}
MARKS = "<!-- verdict of forgetting.py -->", "<!-- end of the verdict -->"
RIVALS = ("#30638e", "#66a182", "#7b6ba8", "#003d5b", "#8d99a6", "#4aa8b8", "#a3a847", "#5c7f67")
ARROWS = {LESS: "less", MORE: "more", "undecided": "·"}


def readme(record: Mapping) -> str:
    """The whole report in Markdown."""
    settings = record["settings"]
    parts = ["# What is forgotten, at the same gain"]
    if record["quick"]:
        parts.append("**A quick run of tiny models, to see that the script works. Its numbers mean nothing.**")
    parts += [
        overall(settings),
        "Gain is how far the target loss falls, as a part of what plain LoRA reaches in the same seed at its best "
        "learning rate. Every arm is a path with one parameter from there toward the base model; it is interpolated "
        "at a given gain, seed by seed. In brackets: Student's 95 % intervals over seeds, each comparison for itself; "
        "a path that misses a level in one seed is compared in the others.",
        "![what is forgotten against what is gained, and paired differences](figure.png)",
    ]
    for summary in settings.values():
        parts += setting_section(summary)
    parts += [
        "## How it was run",
        f"`{record['command']}`, {record['date']}, {record['machine']}, "
        + ", ".join(f"{name} {number}" for name, number in record["versions"].items())
        + f"; seeds {', '.join(map(str, record['seeds']))}. Every run is a line of results.jsonl, all numbers of this "
        "page are in summary.json.",
    ]
    return "\n\n".join(parts) + "\n"


def with_verdict(page: str, record: Mapping) -> str:
    """The page with the verdict between its two marks."""
    start, end = MARKS
    if page.count(start) != 1 or page.count(end) != 1:
        raise SystemExit(f"the page needs the marks {start} and {end}, each once")
    lines = [f"**{overall(record['settings'])}**"]
    lines += [f"- {summary['setting']['title']}. {verdict(summary)[0]}" for summary in record["settings"].values()]
    before, rest = page.split(start)
    return before + start + "\n" + lines[0] + "\n\n" + "\n".join(lines[1:]) + "\n" + end + rest.split(end)[1]


def setting_section(summary: Mapping) -> list[str]:
    """One setting: verdict, tables, protocol."""
    setting, level, primary = summary["setting"], str(summary["primary_level"]), summary["primary_measure"]
    measures = {measure["key"]: measure["words"] for measure in setting["measures"]}
    protocol = setting["protocol"]
    base, lora = summary["reference"]["base"], summary["reference"]["lora"]
    return [
        f"## {setting['title']}",
        "\n".join(f"- {line}" for line in verdict(summary)),
        f"Decided by: {measures[primary]}. Paired differences at {float(level):.0%} of LoRA's gain, row less column: "
        "**less** is forgotten, **more**, or · where the interval holds zero.",
        sign_table(summary, primary, level),
        f"What is forgotten at each gain, mean over seeds ({measures[primary]}):",
        level_table(summary, primary),
        f"All measures at {float(level):.0%} of LoRA's gain:",
        measure_table(summary, level, measures),
        "The runs, in means over seeds:",
        curve_table(summary, primary),
        "Before and after plain LoRA: "
        + "; ".join(f"{key} {base[key]:.4f} → {lora[key]:.4f}" for key in base)
        + f". Protocol: AdamW, {protocol['steps']} steps of {protocol['batch_size']}, learning rate "
        f"{protocol['learning_rate']:g} falling linearly to zero (Σ η = {protocol['sum_of_rates']:.3g}), rank "
        f"{protocol['rank']}, lora_alpha {protocol['lora_alpha']}; {summary['runs']} runs, "
        f"{summary['training_seconds']:.0f} s of training. Options: "
        + ", ".join(f"{key} {value}" for key, value in setting["options"].items())
        + ".",
    ]


def sign_table(summary: Mapping, measure: str, level: str) -> str:
    arms, differences = summary["arms"], summary["differences"][measure]
    rows = []
    for key, of in differences.items():
        cells = ["" if other == key else _sign(of[other][level]) for other in arms]
        rows.append((f"**{number(arms, key)}** {arms[key]['words']}", *cells))
    return markdown_table(("", *(number(arms, key) for key in arms)), rows)


def level_table(summary: Mapping, measure: str) -> str:
    levels = [str(level) for level in summary["levels"]]
    rows = []
    for key, arm in summary["arms"].items():
        cells = [over_seeds(summary, summary["matched"][measure][key][level]) for level in levels]
        rows.append((number(summary["arms"], key), arm["words"], *cells))
    return markdown_table(
        ("", "arm", *(f"{float(level):.0%}" for level in levels)), rows, right=range(2, 2 + len(levels))
    )


def measure_table(summary: Mapping, level: str, measures: Mapping[str, str]) -> str:
    rows = [
        (arm["words"], *(over_seeds(summary, summary["matched"][measure][key][level]) for measure in measures))
        for key, arm in summary["arms"].items()
    ]
    return markdown_table(("arm", *measures.values()), rows, right=range(1, 1 + len(measures)))


def over_seeds(summary: Mapping, found: Mapping | None) -> str:
    """The interval, and of how many seeds where some do not reach the level."""
    short = found is not None and len(found["per_seed"]) < summary["seeds"]
    return interval(found) + (f" ({len(found['per_seed'])} seeds)" if found is not None and short else "")


def curve_table(summary: Mapping, measure: str) -> str:
    rows = []
    for key, points in summary["curves"].items():
        for point in points[1:]:  # the first is where the path starts
            gain = "" if point["gain"] is None else f"{point['gain']:.2f}"
            rate = "" if point["firing_rate"] is None else f"{point['firing_rate']:.2f}"
            cells = (
                f"{point['target_loss']:.4f}",
                gain,
                f"{point['forgotten'][measure]:+.4f}",
                f"{point['distance']:.2f}",
            )
            rows.append((summary["arms"][key]["words"], f"{point['value']:g}", *cells, rate))
    header = ("arm", "value", "target loss", "gain", "forgotten", "‖ΔW‖", "firing rate")
    return markdown_table(header, rows, right=range(1, 7))


def number(arms: Mapping, key: str) -> str:
    return str(list(arms).index(key) + 1)


def _sign(found: Mapping | None) -> str:
    return "–" if found is None else ARROWS[found["sign"]]


def draw(record: Mapping, path: Path) -> None:
    """A row a setting: the paths in means over seeds, and how much more or less than ours each arm forgets."""
    settings = record["settings"]
    figure = Figure(figsize=(16, 6.6 * len(settings)), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    rows = figure.subplots(len(settings), 2, squeeze=False, width_ratios=(1.25, 1))
    for (left, right), summary in zip(rows, settings.values(), strict=True):
        draw_paths(left, summary)
        draw_levels(right, summary)
    figure.savefig(path, dpi=110)


def colors(summary: Mapping) -> dict[str, str]:
    rivals = [key for key, arm in summary["arms"].items() if not arm["ours"]]
    return {**OURS, **{key: RIVALS[place % len(RIVALS)] for place, key in enumerate(rivals)}}


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
        axes.scatter(*corner, color=LORA_COLOR, marker="*", s=170, zorder=5)
        axes.annotate("plain LoRA", corner, xytext=(9, 2), textcoords="offset points", color=INK)
    words = {entry["key"]: entry["words"] for entry in summary["setting"]["measures"]}
    axes.set_xlabel(summary["setting"]["target"], color=INK)
    axes.set_ylabel(words[measure], color=INK)
    axes.legend(frameon=False, fontsize=8.5, loc="upper right")
    _finish(axes, summary["setting"]["title"])
    axes.grid(color=GRID, linewidth=0.8)


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
    _finish(axes, f"Paired differences at {float(level):.0%} of LoRA's gain, 95 % intervals")
    axes.grid(axis="x", color=GRID, linewidth=0.8)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=12.5, color=INK, fontweight="bold", pad=12)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
