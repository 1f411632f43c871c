# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Experiment B: does the condition number of the kernel predict how well LoRA on a choice of layers trains?

Every choice of layers is trained with both losses and both optimizers from the same adapters and the same head; the
final loss on the training examples and the accuracy on the test split are then ranked against the value of each
predictor before training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy.stats import rankdata
from tqdm.auto import tqdm

from examples.common.correlation import Correlation, correlate
from examples.common.records import Records
from examples.common.tasks import Task
from examples.common.training import trained_parameters
from examples.paper.claims import Claim, verdict
from examples.paper.predictors import (
    CONDITIONS,
    COUNT,
    PAPER,
    Start,
    kernels_at_start,
    predictors,
    stable_rate,
    utility,
)
from examples.paper.training import (
    LOSSES,
    OPTIMIZERS,
    Protocol,
    adapted,
    fit,
    make_optimizer,
    score,
    start_from,
)


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
            starts = {seed: kernels_at_start(task, layers, seed, protocol, examples)}
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
        "train": asdict(score(model, task, task.train, loss)),
        "test": asdict(score(model, task, task.test, loss)),
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
                predicted = [[utility(name, run["predictors"][name]) for run in row] for row in by_seed]
                tables[outcome][arm][name] = correlate([_ranks(row, sizes, within) for row in predicted], truth)
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
            measured = f"rank correlation {number} over {choices} choices of layers. On the same runs: {others}."
            claim = f"a low condition number (σ = 1e-4) at the start predicts {better} ({ARM_NAMES[arm]})."
            outcome_found = verdict(number.low, number.high)
            question = f"a low condition number predicts {better}"
            found.append(Claim(claim, measured, outcome_found, question, ARM_NAMES[arm], str(number)))
    return found


def ordered(arms: Mapping[Any, Mapping[str, Correlation]]) -> list[str]:
    """Condition numbers first, the paper's on top; the others by their mean; without what one arm does not have."""
    names = list(dict.fromkeys(name for of in arms.values() for name in of))
    names = [name for name in names if all(name in of for of in arms.values())]

    def average(name: str) -> float:
        return sum(of[name].mean for of in arms.values())

    rest = sorted((name for name in names if name not in CONDITIONS), key=average, reverse=True)
    return [*(name for name in CONDITIONS if name in names), *rest]
