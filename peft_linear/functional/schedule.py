# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""How λ changes over a run: factors between 0 and 1 by the number of optimizer steps taken, as learning rates have."""

from __future__ import annotations

import math


SCHEDULES = ("constant", "linear", "cosine", "warmup")


def schedule_factor(name: str, step: int, total: int | None) -> float:
    """What λ is multiplied with in the step after `step` optimizer steps, T = `total` being the schedule's length.

    - `"constant"`: 1;
    - `"linear"`: 1 − t/T, from 1 down to 0, and 0 afterwards;
    - `"cosine"`: (1 + cos(πt/T))/2, likewise;
    - `"warmup"`: t/T, from 0 up to 1, and 1 afterwards.

    Args:
        name: one of `SCHEDULES`.
        step: t >= 0.
        total: T >= 1; not used by `"constant"`.
    """
    if name == "constant" or total is None:
        return 1.0
    done = min(step / total, 1.0)
    if name == "linear":
        return 1.0 - done
    if name == "cosine":
        return 0.0 if done == 1 else (1.0 + math.cos(math.pi * done)) / 2
    return done
