# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The forgetting benchmark as text, from its summary alone: a page, and the report at full length."""

from __future__ import annotations

from collections.abc import Mapping

from examples.benchmarks.forgetting.analysis import LESS, MORE
from examples.benchmarks.forgetting.verdict import interval, overall, verdict
from examples.common.reports import as_page, provenance
from peft_linear.report.markdown import markdown_table


MARKS = "<!-- verdict of forgetting.py -->", "<!-- end of the verdict -->"
ARROWS = {LESS: "less", MORE: "more", "undecided": "·"}


def opening(record: Mapping) -> list[str]:
    """Title, verdict over all settings, and how arms are compared."""
    return [
        "# What is forgotten, at the same gain",
        "**A quick run of tiny models, to check that the program works. Its numbers mean nothing.**"
        if record["quick"]
        else "",
        overall(record["settings"]),
        "Gain is the reduction of the target loss, relative to that of plain LoRA in the same seed at its best "
        "learning rate. Every arm is a path with one parameter from there toward the base model; it is interpolated "
        "at a given gain, seed by seed. In brackets: Student's 95 % intervals over seeds, each comparison for itself; "
        "a path that misses a level in one seed is compared in the others.",
    ]


def summary_page(record: Mapping) -> str:
    """README.md: for each setting the verdict and one table."""
    parts = [
        *opening(record),
        "![what is forgotten against what is gained, and paired differences](figure.png)",
    ]
    for summary in record["settings"].values():
        measure = summary["primary_measure"]
        words = {entry["key"]: entry["words"] for entry in summary["setting"]["measures"]}
        parts += [
            f"## {summary['setting']['title']}",
            verdict(summary)[0],
            f"Forgotten ({words[measure]}) at each share of LoRA's gain; mean over seeds, 95 % interval:",
            level_table(summary, measure),
        ]
    parts += [
        "## How it was run",
        f"{provenance(record)} Seeds {', '.join(map(str, record['seeds']))}. The command trains what is not recorded "
        "in results.jsonl.gz beside the program (nothing, with the options above) and writes the report at full "
        "length (all pairs, measures and curves) to build/measurements/forgetting/report.md.",
    ]
    return as_page(parts)


def report(record: Mapping) -> str:
    """The report at full length."""
    parts = opening(record)
    for summary in record["settings"].values():
        parts += setting_section(summary)
    parts += [
        "## How it was run",
        f"{provenance(record)} Seeds {', '.join(map(str, record['seeds']))}. All numbers are in summary.json.",
    ]
    return as_page(parts)


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
