# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Which runs there are and in which order: what is there at any time is a usable part of the whole.

First the arms that decide, on every model and task with seed 0, then all other arms, then the arms that decide with
seeds 1 to 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


MODELS = ("smollm2-135m", "gemma3-270m")
TASKS = ("translation_fr", "word_sorting", "caesar_cipher", "spam")
RATES = {"smollm2-135m": 2e-3, "gemma3-270m": 1e-3}
RANK = 4
SEEDS = (0, 1, 2, 3, 4)
LORA = "lora"
FIELDS = ("model", "task", "arm", "strength", "seed")

# (arm, strengths), the most wanted first. What a strength is: the arm's docstring.
DECIDING = (
    (LORA, (0.0,)),
    ("pull_function", (10.0, 30.0)),
    ("kl", (5.0, 1.0)),
    ("pull_delta", (3.0, 10.0)),
    ("kl_budget", (0.03,)),
    ("pull_function", (100.0, 3.0)),
    ("kl", (20.0,)),
    ("pull_delta", (1.0,)),
)
OTHERS = (
    ("ewc_lora", (1.0, 10.0, 100.0)),
    ("replay", (1.0, 3.0)),
    ("lower_rate", (0.5, 0.25)),
    ("pull_factors", (3.0, 10.0, 30.0)),
    ("early_stopping", (0.6, 0.3)),
    ("weight_decay", (1.0, 3.0, 10.0)),
    ("lalora_kfac", (1.0, 10.0, 100.0)),
    ("lalora_diagonal", (1.0, 10.0, 100.0)),
    ("masked_kl", (0.5, 1.0, 5.0)),
    ("replay_kl", (0.5, 1.0, 5.0)),
    ("projection_decay", (1.0, 3.0, 8.0)),
    ("corda", (1.0, 0.5)),
    ("lora_null", (1.0, 0.5)),
    ("stm", (2.5, 25.0, 250.0)),
    ("pull_delta", (30.0,)),
    ("pull_function", (1.0, 300.0)),
    ("kl", (0.5,)),
)


@dataclass(frozen=True)
class Run:
    model: str
    task: str
    arm: str
    strength: float
    seed: int


def runs() -> Iterator[Run]:
    stages = [(DECIDING, 0), (OTHERS, 0), *((DECIDING, seed) for seed in SEEDS[1:])]
    for arms, seed in stages:
        for model, task in cells():
            for arm, strengths in arms:
                for strength in strengths:
                    yield Run(model, task, arm, strength, seed)


def cells() -> Iterator[tuple[str, str]]:
    """Models and tasks, two tasks of one model in a row: a change of the model costs the statistics that it needs."""
    for pair in (TASKS[:2], TASKS[2:]):
        for model in MODELS:
            for task in pair:
                yield model, task
