# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The best set for an additive criterion and a budget in parameters: a knapsack, solved exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch


def best_set(gains: Mapping[str, float], sizes: Mapping[str, int], room: int) -> tuple[str, ...]:
    """The names of the largest sum of gains whose sizes sum to `room` at most, in the order of `gains`.

    Dynamic programming over the classes of equal size: within a class modules are taken best first, so only the count
    per class is decided. O(M·room/g) time and O(K·room/g) memory for K classes and g the greatest common divisor of
    the sizes. Remaining capacity is filled with the modules of no positive gain, best first.
    """
    unit = math.gcd(*(sizes[name] for name in gains))
    capacity = room // unit
    classes: dict[int, list[str]] = {}
    for name in sorted(gains, key=lambda name: -gains[name]):
        if gains[name] > 0:
            classes.setdefault(sizes[name] // unit, []).append(name)
    best = torch.zeros(capacity + 1, dtype=torch.float64)  # of each room
    counts = []
    for size, names in classes.items():
        taken = torch.zeros(capacity + 1, dtype=torch.int16)
        new, gain = best.clone(), 0.0
        for count, name in enumerate(names[: capacity // size], start=1):
            gain += gains[name]
            rooms = slice(count * size, None)
            value = best[: capacity + 1 - count * size] + gain
            better = value > new[rooms]
            new[rooms] = torch.where(better, value, new[rooms])
            taken[rooms][better] = count
        best = new
        counts.append(taken)
    chosen: set[str] = set()
    left = capacity
    for (size, names), taken in zip(reversed(classes.items()), reversed(counts), strict=True):
        count = int(taken[left])
        chosen.update(names[:count])
        left -= count * size
    used = sum(sizes[name] for name in chosen)
    for name in sorted(gains, key=lambda name: -gains[name]):
        if name not in chosen and used + sizes[name] <= room:
            chosen.add(name)
            used += sizes[name]
    return tuple(name for name in gains if name in chosen)
