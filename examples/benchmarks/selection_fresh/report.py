# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The tasks that are sampled with fixed seeds, as text: a page, and the report at full length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from examples.benchmarks.selection.picks import EXCLUDING, RANDOM, RECOMMENDED, WITHOUT_EXCLUSIONS
from examples.benchmarks.selection.sets import ALL_LINEAR, FRACTIONS
from examples.benchmarks.selection_fresh.compared import WITHOUT_EXCLUDED, Finished, compared
from examples.benchmarks.selection_fresh.tasks import KINDS
from examples.common.reports import as_page, provenance, setting_table
from peft_linear.report.markdown import markdown_table


QUARTER = f"{FRACTIONS[-1]:.0%} of the parameters"
FISHER_EXCLUDING = EXCLUDING.format("fisher")
TITLE = "# Choices of each selector, trained, on tasks sampled with fixed seeds"
EXPLANATION = (
    "Regret: test loss of a selector's modules above the least of all selectors' within the same budget. Loss above "
    "the default's: of the same task and budget. Both are means over budgets, then tasks, with 95 % bootstrap "
    "intervals over tasks where there are three or more."
)


def table(found: Sequence[Finished]) -> str:
    rows = [
        (f"`{name}`", str(regret), "–" if name == RECOMMENDED else str(excess), f"{better} of {len(found)}")
        for name, (regret, excess, better) in compared(found).items()
    ]
    header = ("selector", "regret (nats)", "loss above the default's (nats)", "tasks in which the default is better")
    return markdown_table(header, rows, right=(1, 2, 3))


def kind_tables(found: Sequence[Finished]) -> list[str]:
    kinds = [kind for kind in KINDS if any(of.kind == kind for of in found)]
    parts = []
    for kind in kinds if len(kinds) > 1 else ():
        parts += [f"## {kind.capitalize()}", table([of for of in found if of.kind == kind])]
    return parts


def verdict(found: Sequence[Finished]) -> str:
    """The default against itself without exclusions, and against a baseline with the same exclusions."""
    rows = compared(found)
    free, fisher = (rows[name][1] for name in (WITHOUT_EXCLUSIONS, FISHER_EXCLUDING))
    numbers = (
        f"without the exclusion its loss is {free} nats higher, and Fisher information with the same exclusion is at "
        f"{fisher} nats from it"
    )
    if free.low > 0 and fisher.low < 0 < fisher.high:
        return f"Most of the default's lead is the exclusion of the pooler, not the criterion: {numbers} (level)."
    return f"The default against itself and a baseline: {numbers}."


def summary_page(found: Sequence[Finished], setting: Mapping[str, Any]) -> str:
    """README.md."""
    rows = [
        (
            of.task.key,
            of.task.words,
            *(f"{of.references[key]:.3f}" if key in of.references else "–" for key in (ALL_LINEAR, WITHOUT_EXCLUDED)),
            f"{of.losses[RECOMMENDED][QUARTER]:.3f}",
        )
        for of in found
    ]
    header = ("task", "what", f"loss: {ALL_LINEAR}", WITHOUT_EXCLUDED, f"the default's {QUARTER}")
    return as_page(
        [
            TITLE,
            f"{len(found)} tasks, each sampled with a fixed seed after the method was frozen. {verdict(found)}",
            "![loss of every selector's modules above the default's](figure.png)",
            f"{EXPLANATION} In the figure a dot is a task and a bar the interval.",
            f"## All {len(found)} tasks",
            table(found),
            *kind_tables(found),
            "## Tasks",
            f"“{QUARTER}” means of the adapter parameters of all candidates.",
            markdown_table(header, rows, right=range(2, len(header))),
            "## How it was run",
            f"One learning rate, {setting['learning rate']:g}, decaying linearly; seeds "
            f"{', '.join(map(str, setting['seeds']))}. {provenance(setting)} Runs and choices are beside the program; "
            "the command writes the report at full length to build/measurements/selection_fresh/report.md. Without "
            "`--report-only` it trains what is missing.",
        ]
    )


def report(found: Sequence[Finished], setting: Mapping[str, Any]) -> str:
    """The report at full length."""
    shown = (RECOMMENDED, "fisher", "page", "eva", "qv", RANDOM)
    rows = [
        (
            of.task.key,
            of.task.words,
            *(f"{of.references[key]:.3f}" if key in of.references else "–" for key in (ALL_LINEAR, WITHOUT_EXCLUDED)),
            f"{of.losses[RECOMMENDED][QUARTER]:.3f}",
            *(f"{of.regret(name):.3f}" for name in shown),
        )
        for of in found
    ]
    losses = (ALL_LINEAR, WITHOUT_EXCLUDED, f"the default's {QUARTER}")
    header = ("task", "what", *(f"loss: {name}" for name in losses), *(f"regret: `{name}`" for name in shown))
    return as_page(
        [
            TITLE,
            EXPLANATION,
            f"## All {len(found)} tasks",
            table(found),
            *kind_tables(found),
            "## Task by task",
            markdown_table(header, rows, right=range(2, len(header))),
            "## Setting",
            setting_table(setting),
        ]
    )


def as_json(found: Sequence[Finished], setting: Mapping[str, Any]) -> dict[str, Any]:
    """Every number."""
    tasks = {of.task.key: {"words": of.task.words, "losses": of.losses, "references": of.references} for of in found}
    return {**setting, "tasks": tasks}
