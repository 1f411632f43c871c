# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The table of the cost of a recommendation, and its goals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from examples.common.files import read_json, save_json, save_text
from examples.common.reports import Folders, as_page
from peft_linear.report.markdown import markdown_table
from peft_linear.selection.criteria import DEFAULT_NAME


CRITERIA = (DEFAULT_NAME, "leave_one_out")  # the goals are for the first
BUDGET = 8


def missed(results: Mapping[str, Any]) -> list[str]:
    """What takes longer than its goal, in words. The goals are for the default criterion."""
    return [
        f"{case}: {row['in_steps'][CRITERIA[0]]['median']:.1f} training steps, at most {row['goal_steps']} wanted"
        for case, row in results["cases"].items()
        if row["in_steps"][CRITERIA[0]]["median"] > row["goal_steps"]
    ]


def report(results: Mapping[str, Any]) -> str:
    """The measurement in Markdown."""
    rows = []
    for case, row in results["cases"].items():
        seconds, peaks = row["seconds"], row.get("peak_mebibytes", {})
        shape = f"{case}: {row['candidates']} candidates, {row['examples']} examples of {row['outputs']} "
        shape += "output" if row["outputs"] == 1 else "outputs"
        for name in CRITERIA:
            steps, clock = row["in_steps"][name], row["in_steps_by_the_clock"][name]
            goal = name == CRITERIA[0]
            rows.append(
                (
                    shape,
                    name,
                    f"{seconds[f'kernels, {name}']:.1f} + {seconds[name]:.1f} s",
                    f"{steps['median']:.1f} ({steps['low']:.1f} to {steps['high']:.1f})",
                    f"{clock['median']:.1f}",
                    f"{row['goal_steps']}" if goal else "none",
                    ("yes" if steps["median"] <= row["goal_steps"] else "no") if goal else "",
                    f"{peaks[name]:.0f} / {peaks['step']:.0f}" if name in peaks else "",
                )
            )
    header = (
        "case",
        "criterion",
        "kernels + choice",
        "training steps (over rounds)",
        "by the clock",
        "goal",
        "reached",
        "peak MiB / of a step",
    )
    rounds = ", ".join(f"{case} {row['rounds']}" for case, row in results["cases"].items())
    taken = ", ".join(f"{case} {row['seconds']['step']:.2f} s" for case, row in results["cases"].items())
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    commands = ", ".join(f"`{row['command']}`" for row in results["cases"].values())
    return as_page(
        [
            "# Cost of a recommendation",
            f"`compute_ntk` and `recommend(kernels, {BUDGET})` in training steps of LoRA (all linear modules, AdamW, "
            f"batches of 32; a step takes {taken}). Medians over rounds ({rounds}), in each of which both took turns "
            "in one process; times are of the processor, with those by the clock beside them. Peak memory is what a "
            "call adds, in a process of its own.",
            "Kernels are computed once: another criterion, budget or strategy costs "
            'the second number only. A language model has one output an example (`outputs="log_likelihood"`).',
            markdown_table(header, rows, right=range(2, 8)),
            results.get("note", ""),
            f"{commands}, {results['date']}, {results['machine']}, {versions}.",
        ]
    )


def write(results: dict[str, Any], folders: Folders) -> None:
    """Writes record and README.md; cases of an earlier run stay where this one did not measure them again."""
    file = folders.runs / "results.json.gz"
    earlier = read_json(file)["cases"] if file.exists() else {}
    results = {**results, "cases": {**earlier, **results["cases"]}}
    save_json(file, results)
    save_text(folders.summary / "README.md", report(results))
