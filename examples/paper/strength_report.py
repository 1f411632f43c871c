# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Experiment A as text: numbers by λ, the paper's claims beside them, tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from examples.common.correlation import spearman
from examples.paper.claims import CONTRARY, HELD, NOT_SHOWN, Claim
from examples.paper.strength import KINDS, NOTHING
from peft_linear.report.markdown import markdown_table


ACCURACY, LINEAR_ACCURACY = "gap_at_own/accuracy", "gap_at_own/linear_accuracy"  # on the test split
STEEP = 0.8  # a rank correlation with λ beyond this, in every seed, counts as a trend

QUESTIONS = (  # what a larger λ does, in the order of `claims`
    "‖θ−θ0‖ of the pulled parameters falls",
    "gap of the logits falls, each model trained on its own",
    "KL divergence falls, each model trained on its own",
    "Taylor remainder falls, relative to the movement of the logits",
    "accuracy falls",
)

Runs = Sequence[Mapping[str, Any]]


def pulled_by(runs: Runs, pulled: str) -> list[Mapping[str, Any]]:
    """The runs of one kind of pull, those without any included."""
    return [run for run in runs if run["pulled"] in (pulled, NOTHING)]


def values(runs: Runs, path: str) -> dict[float, list[float]]:
    """{λ: one value a seed} of a field, "gap_at_own/kl" for one within a field."""
    found: dict[float, list[float]] = {}
    for record in runs:
        value: Any = record
        for part in path.split("/"):
            value = value[part]
        found.setdefault(record["pull"], []).append(math.nan if value is None else float(value))
    return found


def trend(runs: Runs, path: str) -> tuple[float, ...]:
    """Rank correlation of a field with λ, one a seed."""
    of = values(runs, path)
    columns = list(zip(*(of[pull] for pull in sorted(of)), strict=True))
    return tuple(float(spearman(sorted(of), list(column))) for column in columns)


def falls(runs: Runs, path: str, words: str, claim: str) -> Claim:
    """The claim that a field falls as λ rises: in every seed steeply, and lower at the largest λ than at none."""
    of, slopes = values(runs, path), trend(runs, path)
    first, last = of[min(of)], of[max(of)]
    lower = all(b < a for a, b in zip(first, last, strict=True))
    higher = all(b > a for a, b in zip(first, last, strict=True))
    outcome = NOT_SHOWN
    if lower and max(slopes) <= -STEEP:
        outcome = HELD
    elif higher and min(slopes) >= STEEP:
        outcome = CONTRARY
    measured = (
        f"{words} {mean(first):.3g} at λ = {min(of):g} and {mean(last):.3g} at λ = {max(of):g}, rank correlation "
        f"with λ {', '.join(f'{slope:+.2f}' for slope in slopes)} (one a seed)."
    )
    return Claim(claim, measured, outcome, numbers=f"{mean(first):.3g} → {mean(last):.3g}")


def accuracy_falls(runs: Runs, examples: int, words: str) -> Claim:
    """The claim that a large λ costs accuracy: from none to the largest, beyond two standard errors."""
    of = {pull: mean(accuracies) for pull, accuracies in values(runs, ACCURACY).items()}
    seeds = len(next(iter(values(runs, ACCURACY).values())))
    none, last = of[min(of)], of[max(of)]
    error = math.sqrt((none * (1 - none) + last * (1 - last)) / (examples * seeds))
    outcome = HELD if none - last > 2 * error else CONTRARY if last - none > 2 * error else NOT_SHOWN
    best = max(of, key=of.__getitem__)
    measured = (
        f"{none:.1%} at λ = {min(of):g}, {last:.1%} at λ = {max(of):g} (standard error of the difference "
        f"{100 * error:.1f} points, {examples} test examples, {seeds} seed{'s' * (seeds > 1)}); best {of[best]:.1%} "
        f"at λ = {best:g}."
    )
    claim = f"{words} (CoLA in the paper: 80.44 % at λ = 5, 74.59 % at λ = 50)."
    return Claim(claim, measured, outcome, "accuracy falls", numbers=f"{none:.1%} → {last:.1%}")


def claims(runs: Runs, examples: int) -> list[Claim]:
    """Distance, three measures of linearity, and accuracy, for each kind of pull."""
    found: list[Claim] = []
    for pulled, kind in KINDS.items():
        of = pulled_by(runs, pulled)
        where = f"Where {kind.words}"
        linear = f"{where}: a larger λ brings the fine-tuned model closer to the linearised one"
        of_kind = [
            falls(
                of,
                f"distance/{kind.scope}",
                "‖θ−θ0‖ of the pulled parameters is",
                f"{where}: a larger λ keeps the parameters closer to the pretrained ones.",
            ),
            falls(
                of,
                "gap_at_own/relative_difference",
                "the relative difference of the logits is",
                f"{linear} (each trained on its own, the paper's comparison).",
            ),
            falls(of, "gap_at_own/kl", "the KL divergence is", f"{linear} (the same, KL in nats)."),
            falls(
                of,
                "gap_at_model/pooled_movement_gap",
                "the Taylor remainder relative to the movement of the logits is",
                f"{linear} (at the same parameters; this measure does not favour models that hardly moved).",
            ),
            accuracy_falls(of, examples, f"{where}: a larger λ costs accuracy"),
        ]
        found += [
            replace(claim, question=question, case=kind.words)
            for claim, question in zip(of_kind, QUESTIONS, strict=True)
        ]
    return found


COLUMNS = (
    ("‖θ−θ0‖", "distance/everything", "{:.2f}"),
    ("of the factors", "distance/factors", "{:.2f}"),
    ("linear", "linear_distance/everything", "{:.2f}"),
    ("term acted", "firing_rate", "{:.0%}"),
    ("linear", "linear_firing_rate", "{:.0%}"),
    ("train loss", "train/loss", "{:.3f}"),
    ("linear", "linear_train/loss", "{:.3f}"),
    ("accuracy", ACCURACY, "{:.1%}"),
    ("linear", LINEAR_ACCURACY, "{:.1%}"),
)
GAPS = (
    ("rel. difference", "relative_difference", "{:.2f}"),
    ("rel. to movement", "pooled_movement_gap", "{:.2f}"),
    ("KL", "kl", "{:.3f}"),
    ("agreement", "agreement", "{:.1%}"),
)


SHORT_COLUMNS = (
    ("‖θ−θ0‖", "distance/everything", "{:.2f}"),
    ("term acted", "firing_rate", "{:.0%}"),
    ("accuracy", ACCURACY, "{:.1%}"),
    ("linearised", LINEAR_ACCURACY, "{:.1%}"),
    ("gap, own θ", "gap_at_own/pooled_movement_gap", "{:.2f}"),
    ("gap, same θ", "gap_at_model/pooled_movement_gap", "{:.2f}"),
)


def sections(runs: Runs, seeds: Sequence[int]) -> list[str]:
    """The parts of the report, in Markdown."""
    parts = [
        f"Seeds: {', '.join(map(str, seeds))}; numbers are means over them. Losses are means over the training "
        "examples, accuracies over the test examples, dropout off. “Term acted”: share of the steps at which the "
        "selective rule applied the proximal term. “Linear”: the same of the linearised model, trained in the same "
        "way.",
        "The gap between the fine-tuned and the linearised model is that on the test examples: with each model where "
        "its own training took it (“own θ”, the paper's comparison), and with the linear model at the fine-tuned "
        "model's parameters (“same θ”, the Taylor remainder). “Rel. difference” is ‖f−f̄‖/‖f‖, “rel. to movement” "
        "‖f−f̄‖/‖f−f(θ0)‖.",
    ]
    for pulled, kind in KINDS.items():
        parts += [f"## Where {kind.words}", *tables(pulled_by(runs, pulled))]
    return parts


def short_sections(runs: Runs) -> list[str]:
    """For each kind of pull, one table by λ."""
    parts = [
        "Numbers are at λ = 0 and at the largest λ, means over seeds; a claim holds where every seed shows the "
        "trend. By λ: distance, share of the steps at which the term acted, accuracy of the fine-tuned and of the "
        "linearised model, and the relative gap of their logits (each trained on its own; both at the same "
        "parameters).",
    ]
    for pulled, kind in KINDS.items():
        words = kind.words[0].upper() + kind.words[1:]
        parts += [f"## {words}", _table(pulled_by(runs, pulled), SHORT_COLUMNS)]
    return parts


def tables(runs: Runs) -> list[str]:
    """Two tables with a row for each λ: training, and the gap at the real model's and at the linear model's own θ."""
    gaps = [
        (f"{words}, {place}", f"gap_at_{at}/{name}", form)
        for at, place in (("own", "own θ"), ("model", "same θ"))
        for words, name, form in GAPS
    ]
    return [_table(runs, COLUMNS), _table(runs, gaps)]


def _table(runs: Runs, columns: Sequence[tuple[str, str, str]]) -> str:
    found = [(form, values(runs, path)) for _, path, form in columns]
    rows = [(f"{pull:g}", *(_cell(of[pull], form) for form, of in found)) for pull in sorted(found[0][1])]
    header = ("λ", *(words for words, _, _ in columns))
    return markdown_table(header, rows, right=range(len(header)))


def _cell(numbers: Sequence[float], form: str) -> str:
    average = mean(numbers)
    return "–" if math.isnan(average) else form.format(average)


def mean(numbers: Sequence[float]) -> float:
    return statistics.fmean(numbers)


def summary(runs: Runs) -> dict[str, Any]:
    """For results.json: every shown number, one a seed."""
    paths = [path for _, path, _ in COLUMNS]
    paths += [f"gap_at_{at}/{name}" for at in ("own", "model") for _, name, _ in GAPS]

    def of(pulled: str, path: str) -> dict[str, list[float]]:
        return {f"{pull:g}": numbers for pull, numbers in values(pulled_by(runs, pulled), path).items()}

    return {"by_pull": {pulled: {path: of(pulled, path) for path in paths} for pulled in KINDS}}
