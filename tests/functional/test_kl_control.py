# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""λ is steered to a KL in simulated runs: dy/dσ = a − λ·b·y, y² the KL, in steps whose rates fall to zero."""

from __future__ import annotations

import itertools
from dataclasses import asdict

import numpy as np
import pytest

from peft_linear.functional.kl_control import LARGEST_CHANGE, PULLED, KlResponse


STEPS, EVERY = 60, 3


def simulated(strength, drive, fall=0.0, noise=0.0, target=1.0, kept=False):
    """The KL at the end; b is 1, and the drive falls as exp(−fall·σ)."""
    generator = np.random.default_rng(0)
    rates = np.array([1 - step / STEPS for step in range(STEPS)])
    rates /= rates.sum()
    y = share = 0.0
    response, strengths = KlResponse(PULLED / strength), [strength]
    for step, rate in enumerate(rates, 1):
        y = (y + rate * drive * np.exp(-fall * share)) / (1 + rate * strength)
        share += rate
        if step % EVERY == 0:
            measured = float(y**2 * np.exp(noise * generator.standard_normal()))
            if kept:
                response = KlResponse(**asdict(response))
            strength = response.next_strength(measured, share, strength, target)
            strengths.append(strength)
    return y**2, strengths


@pytest.mark.parametrize(("strength", "drive"), itertools.product([0.1, 0.3, 1.0, 3.0, 10.0], [2.0, 3.0, 6.0]))
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_run_ends_at_the_target_from_any_strength(strength, drive, noise):
    end, strengths = simulated(strength, drive, noise=noise)
    assert end == pytest.approx(1.0, rel=0.15)
    ratios = np.array(strengths[1:]) / np.array(strengths[:-1])
    assert ratios.max() <= LARGEST_CHANGE * (1 + 1e-9) and ratios.min() >= (1 - 1e-9) / LARGEST_CHANGE


@pytest.mark.parametrize("strength", [0.3, 1.0, 3.0])
def test_a_drive_that_falls_is_followed(strength):
    assert simulated(strength, 6.0, fall=2.0)[0] == pytest.approx(1.0, rel=0.1)


def test_a_run_that_cannot_reach_the_target_is_released():
    end, strengths = simulated(1.0, 0.3)
    assert strengths[-1] < 1e-6
    assert end == pytest.approx(0.09, rel=0.3)


def test_what_is_kept_in_plain_numbers_continues_exactly():
    assert simulated(3.0, 6.0, noise=0.02, kept=True) == simulated(3.0, 6.0, noise=0.02)


def test_degenerate_measurements_give_a_strength():
    for kl, share in ((0.0, 0.1), (1e-30, 1.0), (1e6, 0.5)):
        assert KlResponse(2.0).next_strength(kl, share, 1.0, 0.03) > 0
    response = KlResponse(2.0)
    for _ in range(5):  # the same share, as where a schedule has ended
        assert 0 < response.next_strength(0.05, 1.0, 1.0, 0.03) < float("inf")
