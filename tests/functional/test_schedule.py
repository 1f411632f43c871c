# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
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
def test_schedules_begin_and_end_where_they_say(total, beyond):
    ends = {
        name: (schedule_factor(name, 0, total), schedule_factor(name, total + beyond, total)) for name in SCHEDULES
    }
    assert ends == {"constant": (1, 1), "linear": (1, 0), "cosine": (1, 0), "warmup": (0, 1)}


@given(LENGTHS, st.integers(0, 10_000))
def test_schedules_are_their_formulas(total, step):
    part = min(step / total, 1)
    assert schedule_factor("linear", step, total) == pytest.approx(1 - part)
    assert schedule_factor("cosine", step, total) == pytest.approx(math.cos(math.pi * part / 2) ** 2, abs=1e-12)
    assert schedule_factor("linear", step, total) + schedule_factor("warmup", step, total) == pytest.approx(1)
