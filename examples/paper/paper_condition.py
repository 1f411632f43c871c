# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Experiment B: does the condition number of the kernel predict how well LoRA on a choice of layers trains?

Every choice of layers is trained with both losses and both optimizers from the same adapters and the same head; the
final loss on the training examples and the accuracy on the test split are then ranked against what each predictor said
before training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from common import Task
from correlation import Correlation, correlate
from paper_predictors import (
    CONDITIONS,
    COUNT,
    PAPER,
    Start,
    look,
    predictors,
    stable_rate,
    utility,
)
from paper_records import Claim, verdict
from paper_training import (
    LOSSES,
    OPTIMIZERS,
    Protocol,
    adapted,
    evaluate,
    fit,
    make_optimizer,
    start_from,
    trained_parameters,
)
from records import Records
from scipy.stats import rankdata
from tqdm.auto import tqdm

from peft_linear.report.markdown import markdown_table


ARMS = tuple((loss, optimizer) for loss in LOSSES for optimizer in OPTIMIZERS)
ARM_NAMES = {
    ("cross_entropy", "adamw"): "cross-entropy, AdamW",
    ("cross_entropy", "sgd"): "cross-entropy, SGD",
    ("squared", "adamw"): "squared loss, AdamW",
    ("squared", "sgd"): "squared loss, SGD",
}
OUTCOMES: dict[str, Callable[[Mapping[str, Any]], float]] = {  # higher is better
    "final training loss": lambda run: -run["train"]["loss"],
    "test accuracy": lambda run: run["test"]["accuracy"],
}

OURS = ("gradient_energy", "trace", "leave_one_out", COUNT)  # named beside the paper's predictor

Choice = tuple[int, ...]
Tables = dict[str, dict[tuple[str, str], dict[str, Correlation]]]  # {outcome: {arm: {predictor: correlation}}}


def measure(
    task: Task,
    layers: Mapping[int, Sequence[str]],
    choices: Sequence[Choice],
    seeds: Sequence[int],
    protocol: Protocol,
    examples: int,
    records: Records,
) -> list[dict[str, Any]]:
    """Runs what `records` lacks of seeds x losses x optimizers x choices and returns all of it."""
    wanted = [(choice, loss, optimizer, seed) for seed in seeds for choice in choices for loss, optimizer in ARMS]
    missing = [key for key in wanted if key not in records]
    starts: dict[int, Start] = {}
    for choice, loss, optimizer, seed in tqdm(missing, desc="B: choices of layers"):
        if seed not in starts:
            starts = {seed: look(task, layers, seed, protocol, examples)}
        records.add(run(task, layers, choice, loss, optimizer, seed, protocol, starts[seed]))
    return records.select(wanted)


def run(
    task: Task,
    layers: Mapping[int, Sequence[str]],
    choice: Choice,
    loss: str,
    optimizer: str,
    seed: int,
    protocol: Protocol,
    start: Start,
) -> dict[str, Any]:
    """One choice of layers, trained once, with what was predicted for it."""
    began = time.perf_counter()
    names = [name for layer in choice for name in layers[layer]]
    model = start_from(adapted(task.new_model(seed), names, protocol), start.matrices)
    rate = protocol.learning_rate if optimizer == "adamw" else stable_rate(start.kernels, loss)
    fit(model, task, seed, protocol, make_optimizer(trained_parameters(model), optimizer, rate), loss)
    return {
        "choice": choice,
        "loss": loss,
        "optimizer": optimizer,
        "seed": seed,
        "learning_rate": rate,
        "train": asdict(evaluate(model, task, task.train, loss)),
        "test": asdict(evaluate(model, task, task.test, loss)),
        "predictors": {**predictors(start, names, loss), COUNT: float(len(choice))},
        "seconds": round(time.perf_counter() - began, 1),
    }


def analyse(runs: Sequence[Mapping[str, Any]], within: bool = False) -> Tables:
    """Rank correlation of every predictor with every outcome, positive where the predictor prefers what trains better.

    With `within`, of what is left of the ranks after each number of layers lost its mean: does the predictor tell
    choices of equally many layers apart?
    """
    tables: Tables = {}
    for outcome, quality in OUTCOMES.items():
        tables[outcome] = {}
        for arm in ARMS:
            of_arm = [run for run in runs if (run["loss"], run["optimizer"]) == arm]
            seeds = sorted({run["seed"] for run in of_arm})
            by_seed = [[run for run in of_arm if run["seed"] == seed] for seed in seeds]
            sizes = [len(run["choice"]) for run in by_seed[0]]
            truth = [_ranks([quality(run) for run in row], sizes, within) for row in by_seed]
            tables[outcome][arm] = {}
            for name in by_seed[0][0]["predictors"]:
                said = [[utility(name, run["predictors"][name]) for run in row] for row in by_seed]
                tables[outcome][arm][name] = correlate([_ranks(row, sizes, within) for row in said], truth)
    return tables


def _ranks(values: Sequence[float], sizes: Sequence[int], within: bool) -> list[float]:
    ranks = rankdata(values)
    if within:
        groups = np.asarray(sizes)
        for size in set(sizes):
            ranks[groups == size] -= ranks[groups == size].mean()
        ranks = ranks.round(9)  # so that ties stay ties
    return ranks.tolist()


def claims(tables: Tables, choices: int) -> list[Claim]:
    """One for each outcome, loss and optimizer: does a low condition number of the paper's kind go with success?"""
    found = []
    for outcome, arms in tables.items():
        better = "a lower final training loss" if outcome == "final training loss" else "a higher accuracy"
        for arm, of in arms.items():
            number = of[PAPER]
            others = ", ".join(f"{name.replace('_', ' ')} {of[name]}" for name in OURS)
            said = f"rank correlation {number} over {choices} choices of layers. On the same runs: {others}."
            claim = f"a low condition number (σ = 1e-4) at the start predicts {better} ({ARM_NAMES[arm]})."
            found.append(Claim(claim, said, verdict(number.low, number.high)))
    return found


def sections(runs: Sequence[Mapping[str, Any]], tables: Tables, within: Tables, seeds: Sequence[int]) -> list[str]:
    """The parts of the report, in Markdown."""
    choices = len({tuple(run["choice"]) for run in runs})
    return [
        "![condition number and other predictors against what training reached](figure.png)",
        f"Spearman's rank correlation over {choices} choices of layers (query, key and value of each), seeds: "
        f"{', '.join(map(str, seeds))}; 95 % bootstrap interval over the choices, which takes them for independent "
        "although they share layers. Positive: what the predictor prefers trains better; a condition number prefers "
        "the lower one, as the paper claims.",
        *tables_text(tables),
        "The same at an equal number of layers: ranks after each number of layers has lost its mean, so that it does "
        "not help to know that more layers train better.",
        *tables_text(within),
        "How far the choices differ at all:",
        spread(runs),
        "The condition numbers:",
        markdown_table(("", ""), list(CONDITIONS.items())),
    ]


def tables_text(tables: Tables) -> list[str]:
    """One Markdown table for each outcome: predictors by losses and optimizers."""
    parts = []
    for outcome, arms in tables.items():
        rows = [(name, *(str(of[name]) for of in arms.values())) for name in ordered(arms)]
        header = (outcome, *(ARM_NAMES[arm] for arm in arms))
        parts.append(markdown_table(header, rows, right=range(1, len(header))))
    return parts


def ordered(arms: Mapping[Any, Mapping[str, Correlation]]) -> list[str]:
    """Condition numbers first, the paper's on top; the others by their mean; without what one arm does not have."""
    names = list(dict.fromkeys(name for of in arms.values() for name in of))
    names = [name for name in names if all(name in of for of in arms.values())]

    def average(name: str) -> float:
        return sum(of[name].mean for of in arms.values())

    rest = sorted((name for name in names if name not in CONDITIONS), key=average, reverse=True)
    return [*(name for name in CONDITIONS if name in names), *rest]


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
