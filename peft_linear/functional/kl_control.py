# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Which λ brings the KL of a run to a target, from the measurements so far.

With σ the share of Ση that has passed and y = √KL, which is about proportional to the displacement, a pulled run is
taken for `dy/dσ = a − λ·b·y`: the loss drives with a, the pull acts with b. Both are fitted to the measurements by
least squares in which each counts FORGETTING times as much as the next, because a falls as the loss does. λ is the one
that leads to the target within HORIZON of Ση: early, and held from then on, because a pull acts through the learning
rate, and a run whose rate falls to zero cannot be corrected at its end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


FORGETTING = 0.3
HORIZON = 0.2  # of Ση
LARGEST_CHANGE = 4.0  # of λ, from one measurement to the next
PULLED = 2.0  # λ·b of the λ that a run begins with, until the measurements say more
_PRIOR = 0.01  # weight of it, relative to the measurements


@dataclass
class KlResponse:
    """The fit so far; plain numbers, so that it can be kept in an optimizer's state."""

    prior: float  # b
    y: float = 0.0
    share: float = 0.0
    weight: float = 0.0  # Σ of weights, 1
    pull: float = 0.0  # Σ λy
    pull_squared: float = 0.0
    slope: float = 0.0  # Σ dy/dσ
    slope_pull: float = 0.0

    def next_strength(self, kl: float, share: float, strength: float, target: float) -> float:
        """λ for the time after a measurement.

        Args:
            kl: KL in nats.
            share: σ, between that of the last measurement and 1.
            strength: λ since the last measurement, > 0.
            target: KL in nats.
        """
        y, passed = math.sqrt(max(kl, 0.0)), max(share - self.share, 1e-9)
        slope, pull = (y - self.y) / passed, strength * (y + self.y) / 2
        for name, value in (
            ("weight", 1.0),
            ("pull", pull),
            ("pull_squared", pull * pull),
            ("slope", slope),
            ("slope_pull", slope * pull),
        ):
            setattr(self, name, FORGETTING * getattr(self, name) + value)
        self.y, self.share = y, share
        a, b = self._fitted(slope + self.prior * pull)
        return _solved(y, a, b, min(max(1 - share, 0.0), HORIZON), strength, math.sqrt(target))

    def _fitted(self, without_pull: float) -> tuple[float, float]:
        """a and b of the weighted least squares, with a weak prior on b; both positive."""
        ridge = _PRIOR * self.pull_squared
        determinant = self.weight * (self.pull_squared + ridge) - self.pull**2
        if determinant <= 0:
            return max(without_pull, 1e-12), self.prior
        right = ridge * self.prior - self.slope_pull
        b = (self.weight * right + self.pull * self.slope) / determinant
        b = max(b, 1e-2 * self.prior)
        return max((self.slope + b * self.pull) / self.weight, 1e-12), b


def _solved(y: float, a: float, b: float, passing: float, strength: float, goal: float) -> float:
    """λ with y(σ + passing) = goal, at most LARGEST_CHANGE from the present one; y falls as λ grows."""

    def end(each: float) -> float:
        rate = each * b
        if rate * passing < 1e-9:
            return y + a * passing
        return a / rate + (y - a / rate) * math.exp(-rate * passing)

    low, high = strength / LARGEST_CHANGE, strength * LARGEST_CHANGE
    if end(low) <= goal:
        return low
    if end(high) >= goal:
        return high
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if end(middle) > goal else (low, middle)
    return math.sqrt(low * high)
