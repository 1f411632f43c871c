# Copyright 2026 The peft-linear authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
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
        total: T >= 1; not looked at by `"constant"`.
    """
    if name == "constant" or total is None:
        return 1.0
    done = min(step / total, 1.0)
    if name == "linear":
        return 1.0 - done
    if name == "cosine":
        return 0.0 if done == 1 else (1.0 + math.cos(math.pi * done)) / 2
    return done
