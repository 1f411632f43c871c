# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Which runs there are and in which order: what is there at any time is a usable part of the whole.

Rates: every arm is trained at the same rates of its model: the middle one first, then the one on the side where this
model's best rates lie, then the one on the other side. Two rules, for every arm, decide from validation losses:

- the third rate is left out where the second one is better than the middle one by more than CLEAR (the loss as a
  function of the rate is taken to have one minimum);
- where the best rate is the lowest or the highest and better than the middle one by more than CLEAR, the next rate
  beyond it is tried, once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from .tasks import KEPT, TUNING


LADDER = (1.5e-4, 4.4e-4, 1.3e-3, 4e-3, 1.2e-2, 3.6e-2)
CLEAR = 0.02  # nats per label token
MIDDLE = {"smollm2-135m": 4e-3, "gemma3-270m": 1.3e-3}  # the one rate of all arms
SECOND = {"smollm2-135m": 1.3e-3, "gemma3-270m": 4.4e-4}
MODELS = tuple(MIDDLE)
FIRST_ARMS = ("all_linear", "mlp", "o_down", "attention")
MORE_ARMS = ("down_proj", "qv", "random_0", "middle_layers", "last_layers", "first_layers", "random_1", "random_2")


@dataclass(frozen=True)
class Group:
    """Runs that differ in the rate alone."""

    model: str
    task: str
    budget: str
    arm: str
    seed: int


@dataclass(frozen=True)
class Run(Group):
    rate: float

    @property
    def group(self) -> Group:
        return Group(**{key: value for key, value in asdict(self).items() if key != "rate"})


def next_rate(model: str, seen: Mapping[float, float | None]) -> float | None:
    """The rate to try next, given {rate: validation loss} (None: diverged); None where the group is complete."""
    losses = {rate: math.inf if loss is None else loss for rate, loss in seen.items()}
    middle, second = MIDDLE[model], SECOND[model]
    for rate in (middle, second):
        if rate not in losses:
            return rate
    third = beyond(second, middle)
    if third not in losses and not losses[second] < losses[middle] - CLEAR:
        return third
    best = best_rate(seen)
    if best in (second, third) and losses[best] < losses[middle] - CLEAR:
        further = beyond(middle, best)
        return None if further in losses else further
    return None


def beyond(rate: float, neighbour: float) -> float:
    """The rate of LADDER that comes after `neighbour` on the way from `rate`."""
    return LADDER[2 * LADDER.index(neighbour) - LADDER.index(rate)]


def best_rate(seen: Mapping[float, float | None]) -> float:
    """The rate of the lowest validation loss."""
    return min(seen, key=lambda rate: math.inf if seen[rate] is None else seen[rate])


def groups(kept: bool = False) -> Iterator[Group]:
    """All groups, the most wanted first; with `kept`, those of the kept tasks instead."""
    tasks = KEPT if kept else TUNING
    stages = [("1/8", 0, FIRST_ARMS), ("1/8", 0, MORE_ARMS), ("1/8", 1, FIRST_ARMS)]
    stages += [(budget, 0, FIRST_ARMS) for budget in ("1/2", "1/16")]
    for budget, seed, arms in stages:
        for task in tasks:
            for model in MODELS:
                for arm in arms:
                    yield Group(model, task, budget, arm, seed)
