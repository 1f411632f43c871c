# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The report of the selection benchmark at full length."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from examples.benchmarks.selection.analysis import (
    CHANCE,
    SETS,
    SINGLES,
    Measured,
    agreement_of_seeds,
    calibration,
    correlations,
    summary,
)
from examples.benchmarks.selection.picks import Picks, pick_regrets
from examples.common.reports import as_page, setting_table
from peft_linear.report.markdown import markdown_table


SHOWN = 30  # rows of a table of criteria
HEADINGS = {
    "one_rate": "One learning rate for all sets",
    "tuned": "The learning rate tuned for every set, on validation data",
    "decayed_one_rate": "One learning rate for all sets, decaying linearly; more steps, larger batches",
    "decayed": "The learning rate tuned for every set, decaying linearly; more steps, larger batches",
}


@dataclass
class View:
    """The tasks under one protocol, at one learning rate for all sets or the tuned ones."""

    steps: tuple[int, ...]
    tasks: list[Measured] = field(default_factory=list)
    picks: dict[str, Picks] = field(default_factory=dict)  # of the tasks whose picks are trained


@dataclass
class Results:
    """Everything that is recorded."""

    views: dict[str, View]
    rates: dict[str, Any]  # by task, see `by_rate`


def report(results: Results, setting: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    text = ["# Ways to choose modules against the loss that training reaches"]
    for name, view in results.views.items():
        if view.tasks:
            text += sections(view.tasks, view.picks, view.steps, name)
    return as_page([*text, rates_section(results.rates), "## Setting", setting_table(setting)])


def sections(
    all_measured: Sequence[Measured], picks: Mapping[str, Picks], steps: Sequence[int], view: str
) -> list[str]:
    """Markdown of one view of the learning rates, the families apart."""
    parts = [f"## {HEADINGS[view]}", tasks_table(all_measured, steps)]
    for family in ("validation", "test"):
        members = [of for of in all_measured if of.task.family == family]
        if not members:
            parts.append(f"### Tasks of the family “{family}”\n\nNone has been measured yet.")
            continue
        names = ", ".join(of.task.key for of in members)
        parts.append(f"### Tasks of the family “{family}”: {names}")
        parts.append(_over_tasks(members, steps))
        trained = [of for of in members if of.task.key in picks]
        if trained:
            parts.append(_of_picks(trained, picks, steps))
    parts.append("### Task by task")
    parts += [_of_task(of, steps) for of in all_measured]
    return parts


def tasks_table(all_measured: Sequence[Measured], steps: Sequence[int]) -> str:
    rows = []
    for of in all_measured:
        seeds = len(next(iter(of.losses.values()))[steps[0]])
        everything = [of.mean_loss("all linear", budget) for budget in steps if "all linear" in of.losses]
        single = [c for c in of.sets if c.single]
        best = [min(of.mean_loss(c.key, budget) for c in single) for budget in steps]
        worst = [max(of.mean_loss(c.key, budget) for c in single) for budget in steps]
        agreement = [agreement_of_seeds(of, SINGLES, budget) for budget in steps]
        rows.append(
            (
                of.task.key,
                of.task.words,
                of.task.family,
                str(len(of.task.modules)),
                f"{len(of.sets)} of {of.planned}",
                str(seeds),
                _each(everything),
                _each(best),
                _each(worst),
                _each(agreement, "+.2f"),
            )
        )
    header = (
        "task", "what", "family", "modules", "sets trained", "seeds",
        "loss: all linear", "best single", "worst single", "seeds agree",
    )  # fmt: skip
    text = (
        "Losses are test losses, for each budget of steps. “Seeds agree”: rank correlation of the losses of single "
        "modules between two seeds."
    )
    return "\n\n".join([markdown_table(header, rows, right=range(3, len(header))), text])


def _each(numbers: Sequence[float | None], form: str = ".3f") -> str:
    return " / ".join("–" if number is None else format(number, form) for number in numbers) or "–"


def _over_tasks(members: Sequence[Measured], steps: Sequence[int]) -> str:
    found = summary(members, steps)
    rows = [
        (f"`{name}`", *(str(row[part]) if part in row else "–" for part in (SINGLES, SETS, "regret")))
        for name, row in list(found.items())[:SHOWN]
    ]
    header = ("criterion", "rank correlation, single modules", "sets", "regret (nats)")
    text = (
        "Means over tasks, budgets of steps and, for the regret, budgets of modules and parameters; from three tasks "
        "on with 95 % bootstrap intervals over tasks. Regret: test loss of the measured set that fits the budget and "
        f"is scored best, less the least test loss of those that fit. “{CHANCE}”: the mean of the sets that use the "
        "whole budget."
    )
    return "\n\n".join([markdown_table(header, rows, right=(1, 2, 3)), text])


def _of_picks(members: Sequence[Measured], picks: Mapping[str, Picks], steps: Sequence[int]) -> str:
    tables = [[pick_regrets(of, picks[of.task.key], budget) for budget in steps] for of in members]
    everywhere = set.intersection(*(set(table) for of in tables for table in of)) if tables else set()
    rows = []
    for name in everywhere:
        values = [value for of in tables for table in of for value in table[name].values()]
        rows.append((statistics.fmean(values), name, len(values)))
    body = [(f"`{name}`", f"{mean:+.4f}", str(count)) for mean, name, count in sorted(rows)]
    text = (
        "The choice of each selector within the budgets, trained like the other sets: its test loss minus the least "
        "that was measured within the budget, picks included."
    )
    return "\n\n".join([text, markdown_table(("selector", "regret (nats)", "cases"), body, right=(1, 2))])


def _of_task(of: Measured, steps: Sequence[int]) -> str:
    parts = [f"#### {of.task.key}: {of.task.words}"]
    tables = {(group, budget): correlations(of, group, budget) for group in (SINGLES, SETS) for budget in steps}
    names = sorted(
        of.scores, key=lambda name: -statistics.fmean(t[name].mean if name in t else -1.0 for t in tables.values())
    )
    rows = [(f"`{name}`", *(str(table.get(name, "–")) for table in tables.values())) for name in names[:SHOWN]]
    header = ("rank correlation", *(f"{group}, {budget} steps" for group, budget in tables))
    parts.append(markdown_table(header, rows, right=range(1, len(header))))
    predicted = calibration(of)
    if predicted:
        columns = list(next(iter(predicted.values())))
        rows = [(f"`{name}`", *(f"{row[c]:+.3f}" for c in columns)) for name, row in predicted.items()]
        parts.append(markdown_table(("predicted loss", *columns), rows, right=range(1, 1 + len(columns))))
    times = "; ".join(f"{look} {seconds:.1f}" for look, seconds in of.seconds.items())
    parts.append(f"Seconds to score all {len(of.sets)} sets, the passes included: {times}.")
    return "\n\n".join(parts)


def rates_section(tables: Mapping[str, Mapping[float, Any]]) -> str:
    """Rank correlations of a few criteria, by task and by the learning rate that all modules are trained with."""
    rows = []
    for task, by_rate in tables.items():
        for rate, (count, table) in by_rate.items():
            rows += [
                (task, f"{rate:g}", str(count), f"`{name}`", _each(list(of.values()), "+.2f"))
                for name, of in table.items()
            ]
    text = (
        "Rank correlation with the test losses of single modules that are all trained with the same learning rate, "
        "for each budget of steps, first seed. Small rates are the regime that kernels describe; with large ones "
        "modules become unstable, those that learn fastest first, and every correlation changes its sign."
    )
    header = ("task", "learning rate", "modules", "criterion", "rank correlation")
    return "\n\n".join(["## By learning rate", text, markdown_table(header, rows, right=(1, 2, 4))])


def as_json(results: Results, setting: Mapping[str, Any]) -> dict[str, Any]:
    """Every number of the tables."""
    views = {
        name: {of.task.key: _task_as_json(of, view.picks, view.steps) for of in view.tasks}
        for name, view in results.views.items()
    }
    return {**setting, "by_rate": results.rates, **views}


def _task_as_json(of: Measured, picks: Mapping[str, Picks], steps: Sequence[int]) -> dict[str, Any]:
    correlation = {
        group: {
            budget: {name: [c.mean, c.low, c.high] for name, c in correlations(of, group, budget).items()}
            for budget in steps
        }
        for group in (SINGLES, SETS)
    }
    regrets = {b: pick_regrets(of, picks[of.task.key], b) for b in steps} if of.task.key in picks else {}
    return {
        "family": of.task.family,
        "losses": of.losses,
        "correlations": correlation,
        "pick_regrets": regrets,
        "calibration": calibration(of),
        "seconds": of.seconds,
    }
