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
"""Laws of the schedules of λ."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_linear.functional.schedule import SCHEDULES, schedule_factor


LENGTHS = st.integers(1, 10_000)


@given(st.sampled_from(SCHEDULES), st.integers(0, 20_000), LENGTHS)
def test_factors_lie_between_zero_and_one_and_move_one_way(name, step, total):
    now, later = schedule_factor(name, step, total), schedule_factor(name, step + 1, total)
    assert 0 <= now <= 1
    assert later >= now if name == "warmup" else later <= now


@given(LENGTHS, st.integers(0, 100))
def test_ends(total, beyond):
    ends = {
        name: (schedule_factor(name, 0, total), schedule_factor(name, total + beyond, total)) for name in SCHEDULES
    }
    assert ends == {"constant": (1, 1), "linear": (1, 0), "cosine": (1, 0), "warmup": (0, 1)}


@given(LENGTHS, st.integers(0, 10_000))
def test_forms(total, step):
    part = min(step / total, 1)
    assert schedule_factor("linear", step, total) == pytest.approx(1 - part)
    assert schedule_factor("cosine", step, total) == pytest.approx(math.cos(math.pi * part / 2) ** 2, abs=1e-12)
    assert schedule_factor("linear", step, total) + schedule_factor("warmup", step, total) == pytest.approx(1)
