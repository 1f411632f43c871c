# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The summary of the selection benchmark: a few criteria, every view, on one page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from examples.benchmarks.selection.analysis import CHANCE, SETS, SINGLES, Measured, agreement_of_seeds, summary
from examples.benchmarks.selection.picks import pick_regrets
from examples.benchmarks.selection.report import Results, View
from examples.benchmarks.selection.scores import DEFAULT, PARAMETERS
from examples.common.reports import as_page, provenance
from peft_linear.report.markdown import markdown_table


MOST_SELECTORS = 12  # rows
PICKS_VIEW = "decayed_one_rate"  # in which the choices of most selectors are trained on all tasks
FAMILIES = ("validation", "test")
SHOWN = (
    DEFAULT,
    "gradient_energy, AdamW (lora, 8 draws)",
    "gradient_energy (weight)",
    "leave_one_out, AdamW (lora, 8 draws)",
    "predicted_loss, AdamW (lora, 8 draws)",
    "condition_number (lora, 8 draws)",
    "fisher",
    "eva",
    PARAMETERS,
    CHANCE,
)
NAMES = {
    "one_rate": "one rate, short",
    "tuned": "tuned, short",
    "decayed_one_rate": "one rate, long",
    "decayed": "tuned, long",
}
MEASURES = {
    SINGLES: "Rank correlation with the test losses of single modules",
    SETS: "Rank correlation with the test losses of sets",
    "regret": "Regret of the best-scored measured set within a budget (nats)",
}


def summary_page(results: Results, setting: Mapping[str, Any], figures: Sequence[str]) -> str:
    """README.md."""
    views = {name: view for name, view in results.views.items() if view.tasks}
    tasks = {of.task.key: of for view in views.values() for of in view.tasks}
    text = [
        "# Ways to choose modules against the loss that training reaches",
        "Every module alone and some fifty sets are fine-tuned on every task. Before training, every criterion and "
        "baseline scores the same modules and sets. “One rate”: one learning rate for all sets; “tuned”: a "
        "rate for every set, chosen on validation data; “short”: constant rate, 16 and 64 steps; “long”: 96 steps "
        "of larger batches, the rate decays linearly. Criteria were developed on the tasks of the family "
        "“validation”; those of the family “test” were kept for the end.",
        tasks_table(tasks.values(), views),
        *(f"![rank correlation and regret of the criteria, {NAMES[name]}]({name}.png)" for name in figures),
        "Means over the tasks of a family and over budgets. Regret: test loss of the best-scored set that fits, minus "
        "the least test loss of those that fit; random choice is the mean of the sets that use the whole budget. "
        "Intervals are in the report at full length; with two to four tasks a family they are wide.",
    ]
    for measure, words in MEASURES.items():
        text += [f"## {words}", criteria_table(views, measure)]
    text += [
        *picks_section(views),
        "## By learning rate",
        f"Rank correlation of `{DEFAULT}` with the losses of single modules that are all trained with the same rate "
        "(constant, the longer budget, first seed). Small rates are the regime that kernels describe; with large ones "
        "modules become unstable, those that learn fastest first, and the correlation changes its sign.",
        rates_table(results.rates),
        "## How it was run",
        f"{setting['hours of training']} hours of training. {provenance(setting)} The command computes this page "
        "from the runs and scores beside the program, and the report at full length (every criterion, task by task, "
        "with intervals): build/measurements/selection/report.md. Without `--report-only` it trains and scores what "
        "is missing.",
    ]
    return as_page(text)


def tasks_table(tasks: Any, views: Mapping[str, View]) -> str:
    """What each task is; how many sets and seeds of each view; how well seeds agree."""
    rows = []
    for of in tasks:
        by_view = [next((m for m in view.tasks if m.task.key == of.task.key), None) for view in views.values()]
        cells = [_extent(found, view) for found, view in zip(by_view, views.values(), strict=True)]
        rows.append((of.task.key, of.task.words, of.task.family, str(len(of.task.modules)), *cells))
    header = ("task", "what", "family", "modules", *(NAMES[name] for name in views))
    note = "Cells: sets x seeds, and the mean rank correlation of single modules' losses between two seeds."
    return f"{markdown_table(header, rows, right=range(3, len(header)))}\n\n{note}"


def _extent(of: Measured | None, view: View) -> str:
    if of is None:
        return "–"
    seeds = len(next(iter(of.losses.values()))[view.steps[0]])
    agreement = agreement_of_seeds(of, SINGLES, view.steps[-1])
    return f"{len(of.sets)} x {seeds}" + ("" if agreement is None else f", {agreement:+.2f}")


def criteria_table(views: Mapping[str, View], measure: str) -> str:
    columns = {}
    for name, view in views.items():
        for family in FAMILIES:
            members = [of for of in view.tasks if of.task.family == family]
            if members:
                columns[f"{NAMES[name]}: {family}"] = summary(members, view.steps)
    form = "{:.3f}" if measure == "regret" else "{:+.2f}"
    rows = []
    for criterion in SHOWN:
        found = [column.get(criterion, {}).get(measure) for column in columns.values()]
        if any(value is not None for value in found):
            rows.append((f"`{criterion}`", *("–" if value is None else form.format(value.mean) for value in found)))
    return markdown_table(("criterion", *columns), rows, right=range(1, 1 + len(columns)))


def picks_section(views: Mapping[str, View]) -> list[str]:
    if PICKS_VIEW not in views or not views[PICKS_VIEW].picks:
        return []
    return [
        "## Choices of each selector",
        f"The sets that selectors choose by themselves, trained like the others ({NAMES[PICKS_VIEW]}): test loss "
        "minus the least that was measured within the budget (nats).",
        picks_table(views[PICKS_VIEW]),
    ]


def picks_table(view: View) -> str:
    columns: dict[str, dict[str, float]] = {}
    for family in FAMILIES:
        members = [of for of in view.tasks if of.task.family == family and of.task.key in view.picks]
        if members:
            columns[f"{family} ({len(members)} tasks)"] = mean_regrets(members, view)
    names = [name for name in next(iter(columns.values()), {}) if all(name in of for of in columns.values())]
    names.sort(key=lambda name: (statistics.fmean(of[name] for of in columns.values()), name))
    rows = [(f"`{name}`", *(f"{of[name]:.3f}" for of in columns.values())) for name in names[:MOST_SELECTORS]]
    return markdown_table(("selector", *columns), rows, right=range(1, 1 + len(columns)))


def mean_regrets(members: Sequence[Measured], view: View) -> dict[str, float]:
    """{selector: the mean over tasks and budgets} of the selectors that are trained on all of these tasks."""
    tables = [pick_regrets(of, view.picks[of.task.key], budget) for of in members for budget in view.steps]
    shared = set.intersection(*(set(table) for table in tables))
    return {name: statistics.fmean(value for table in tables for value in table[name].values()) for name in shared}


def rates_table(rates: Mapping[str, Mapping[float, Any]]) -> str:
    columns = sorted({rate for of in rates.values() for rate in of})
    rows = []
    for task, of in rates.items():
        found = [list(of[rate][1][DEFAULT].values())[-1] if rate in of else None for rate in columns]
        rows.append((task, *("–" if value is None else f"{value:+.2f}" for value in found)))
    return markdown_table(("task", *(f"{rate:g}" for rate in columns)), rows, right=range(1, 1 + len(columns)))
