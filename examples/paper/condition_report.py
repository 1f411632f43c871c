# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Experiment B as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from examples.paper.condition import ARM_NAMES, ARMS, Tables, ordered
from examples.paper.predictors import CONDITIONS, COUNT, PAPER
from peft_linear.report.markdown import markdown_table


SHOWN = (PAPER, "κ, no ridge", "κ with head, σ = 1e-4", "gradient_energy", "trace", "leave_one_out", COUNT)
EXPLANATION = (
    "Spearman's rank correlation over choices of layers (query, key and value of each); 95 % bootstrap interval "
    "over the choices, which treats them as independent although they share layers. Positive: choices that the "
    "predictor prefers train better; a condition number prefers the lower one, as the paper claims."
)


def short_sections(tables: Tables) -> list[str]:
    """A few predictors, both outcomes."""
    return [EXPLANATION, *tables_text(tables, SHOWN)]


def sections(runs: Sequence[Mapping[str, Any]], tables: Tables, within: Tables, seeds: Sequence[int]) -> list[str]:
    """The parts of the report, in Markdown."""
    choices = len({tuple(run["choice"]) for run in runs})
    return [
        f"{choices} choices of layers, seeds {', '.join(map(str, seeds))}. {EXPLANATION}",
        *tables_text(tables),
        "The same at an equal number of layers: ranks minus the mean rank of choices of that size, so that it does "
        "not help to know that more layers train better.",
        *tables_text(within),
        "How far the choices differ at all:",
        spread(runs),
        "The condition numbers:",
        markdown_table(("", ""), list(CONDITIONS.items())),
    ]


def tables_text(tables: Tables, shown: Sequence[str] | None = None) -> list[str]:
    """One Markdown table for each outcome: predictors by losses and optimizers."""
    parts = []
    for outcome, arms in tables.items():
        rows = [(name, *(str(of[name]) for of in arms.values())) for name in shown or ordered(arms)]
        header = (outcome, *(ARM_NAMES[arm] for arm in arms))
        parts.append(markdown_table(header, rows, right=range(1, len(header))))
    return parts


def spread(runs: Iterable[Mapping[str, Any]]) -> str:
    """How far the choices of layers differ at all, for each loss and optimizer."""
    runs = list(runs)
    rows = []
    for arm in ARMS:
        of = [run for run in runs if (run["loss"], run["optimizer"]) == arm]
        losses = [run["train"]["loss"] for run in of]
        accuracies = [run["test"]["accuracy"] for run in of]
        rates = sorted({run["learning_rate"] for run in of})
        rows.append(
            (
                ARM_NAMES[arm],
                ", ".join(f"{rate:.2g}" for rate in rates),
                f"{min(losses):.3g} to {max(losses):.3g}",
                f"{min(accuracies):.1%} to {max(accuracies):.1%}",
                str(sum(math.isinf(loss) for loss in losses)),
            )
        )
    header = ("", "learning rate", "final training loss", "test accuracy", "diverged")
    return markdown_table(header, rows, right=range(1, 5))


def summary(tables: Tables, within: Tables) -> dict[str, Any]:
    """For results.json."""

    def flat(given: Tables) -> dict[str, Any]:
        return {
            outcome: {ARM_NAMES[arm]: {name: asdict(c) for name, c in of.items()} for arm, of in arms.items()}
            for outcome, arms in given.items()
        }

    return {"spearman": flat(tables), "spearman_at_equal_number_of_layers": flat(within)}
