# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The learning rate of a choice, from short trainings of its own adapters.

Four AdamW steps with a linear decay are trained at rates a factor of two apart, each from the same start, until the
held-out loss has its least between two of them: 12 to 20 real steps, 28 at most. A longer run bears a lower rate:
measured, the best rate of 60 steps was 0.6 times that of four (docs/measurements/language). Between and beyond these
two, `rate ∝ steps^-0.19` is assumed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..capture.batches import Batch
from ..capture.trial import Run, TokenLosses
from .one_step import vertex


TRIAL_STEPS = 4
MOST_RATES = 7
FACTOR = 2.0
MEASURED_STEPS, MEASURED_RATIO = 60, 0.6  # the best rate of that many steps, in units of that of the trial
SPREAD = 0.25  # standard deviation of the logarithm of that ratio over the cells in which it was measured
ONE_SIDED = 1.645
RESAMPLES = 200


@dataclass(frozen=True)
class LearningRate:
    """A rate for AdamW with linear decay, and the interval that holds the best one in 90 % of cases."""

    rate: float
    interval: tuple[float, float]
    tried: Mapping[float, float]  # {rate: held-out loss after the trial}
    steps: int  # optimizer steps that were taken in all


def find_learning_rate(
    run: Run,
    ranks: Mapping[str, int],
    learning: Sequence[Batch],
    held_out: Sequence[Batch],
    guess: float,
    steps: int,
    seed: int = 0,
) -> LearningRate:
    """The rate for a training of `steps` steps.

    Args:
        guess: Where the search begins.
        learning: Batches of the trial; taken in turn where there are fewer than four.
        seed: Of the resamples of held-out examples.

    Cost: four training steps and a pass of the held-out examples a rate.
    """
    batches = [learning[step % len(learning)] for step in range(TRIAL_STEPS)]

    def at(rate: float) -> TokenLosses:
        run.train(ranks, batches, rate)
        return run.losses(held_out)

    found = {rate: at(rate) for rate in (guess, guess * FACTOR)}
    while len(found) < MOST_RATES:
        best = min(found, key=lambda rate: found[rate].mean)
        if best == min(found):
            rate = best / FACTOR
        elif best == max(found):
            rate = best * FACTOR
        else:
            break
        found[rate] = at(rate)
    run.use({}, {})
    rates = sorted(found)
    middle = min(range(1, len(rates) - 1), key=lambda i: found[rates[i]].mean)
    around = [found[rates[i]] for i in (middle - 1, middle, middle + 1)]
    best = rates[middle] * FACTOR ** vertex(*(losses.mean for losses in around))
    ratio = horizon(steps)
    spread = math.hypot(SPREAD, _spread_of_the_best(around, seed))
    width = math.exp(ONE_SIDED * spread)
    rate = best * ratio
    return LearningRate(
        rate, (rate / width, rate * width), {rate: found[rate].mean for rate in rates}, TRIAL_STEPS * len(found)
    )


def horizon(steps: int) -> float:
    """The best rate of a run of `steps` steps, in units of that of the trial; 1 for as many steps as the trial."""
    exponent = math.log(MEASURED_RATIO) / math.log(MEASURED_STEPS / TRIAL_STEPS)
    return (max(steps, TRIAL_STEPS) / TRIAL_STEPS) ** exponent


def _spread_of_the_best(around: Sequence[TokenLosses], seed: int) -> float:
    """Standard deviation of the logarithm of the best rate over resamples of the examples."""
    count = len(around[0].sums)
    draws = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))
    columns = torch.stack([losses.resampled(draws) for losses in around], 1).tolist()
    places = [vertex(*column) * math.log(FACTOR) for column in columns]
    return float(torch.tensor(places).std())
