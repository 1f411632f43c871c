# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Laws of Selective Projection Decay on tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_linear.functional.projection import projection_step_, projection_sums


SMALL = settings(max_examples=40, deadline=None)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@st.composite
def steps(draw):
    """(θ_{t−1}, gradient, θ̃, θ0) of some tensors, several of one shape; some anchors are zero."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    shapes = draw(st.lists(st.sampled_from([(2, 3), (3, 2), (4,)]), min_size=1, max_size=6))
    before, gradients = [torch.randn(s) for s in shapes], [torch.randn(s) for s in shapes]
    rate = draw(st.floats(1e-3, 10))
    after = [x - rate * g for x, g in zip(before, gradients, strict=True)]
    anchors = [torch.randn(s) if draw(st.booleans()) else None for s in shapes]
    return before, gradients, after, anchors


def take(before, gradients, after, anchors, strengths):
    squares, products = projection_sums(before, anchors, gradients)
    fires = [(product > 0).double() for product in products]
    moved = [x.clone() for x in after]
    lengths, nothing = projection_sums(moved, anchors)
    assert nothing == []
    projection_step_(moved, anchors, fires, squares, lengths, strengths)
    return moved, fires


def distance(x, anchor):
    return x.norm() if anchor is None else (x - anchor).norm()


@SMALL
@given(steps(), st.floats(0, 3))
def test_each_tensor_is_the_formula_by_itself(step, lam):
    before, gradients, after, anchors = step
    strengths = [lam + index for index in range(len(before))]
    moved, fires = take(*step, strengths)
    for x, g, tilde, anchor, strength, got, fired in zip(
        before, gradients, after, anchors, strengths, moved, fires, strict=True
    ):
        start = torch.zeros_like(x) if anchor is None else anchor
        condition = float((g * (x - start)).sum())
        assert bool(fired) == (condition > 0)
        if condition <= 0:
            assert torch.equal(got, tilde)
            continue
        length, old = float((tilde - start).norm()), float((x - start).norm())
        ratio = min(max((length - old) / length, 0), 1)
        torch.testing.assert_close(got, tilde - strength * ratio * (tilde - start), rtol=1e-12, atol=1e-12)


@SMALL
@given(steps(), st.floats(0, 1))
def test_lambda_one_projects_onto_the_ball_it_came_from_and_less_lies_between(step, lam):
    before, _, after, anchors = step
    for strength in (lam, 1.0):
        moved, fires = take(*step, [strength] * len(before))
        for x, tilde, anchor, got, fired in zip(before, after, anchors, moved, fires, strict=True):
            assert distance(got, anchor) <= distance(tilde, anchor) * (1 + 1e-12)
            if fired and strength == 1:
                nearest = min(distance(x, anchor), distance(tilde, anchor))
                torch.testing.assert_close(distance(got, anchor), nearest, rtol=1e-10, atol=1e-12)


@SMALL
@given(steps())
def test_lambda_zero_leaves_every_bit(step):
    moved, _ = take(*step, [0.0] * len(step[0]))
    assert all(torch.equal(got, tilde) for got, tilde in zip(moved, step[2], strict=True))


def test_nothing_fires_at_the_anchor_itself_and_a_step_to_it_is_no_division_by_zero():
    anchor = torch.ones(3)
    moved, fires = take([anchor.clone()], [torch.randn(3)], [anchor + 1], [anchor], [1.0])
    assert not fires[0] and torch.equal(moved[0], anchor + 1)
    away = anchor + torch.tensor([1.0, 0, 0])
    moved, fires = take([away], [away - anchor], [anchor.clone()], [anchor], [1.0])
    assert fires[0] and torch.equal(moved[0], anchor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_is_close_and_keeps_its_dtype(dtype):
    torch.manual_seed(0)
    before, gradient, anchor = torch.randn(4, 5), torch.randn(4, 5), torch.randn(4, 5)
    gradient = gradient * torch.sign((gradient * (before - anchor)).sum())
    after = anchor + 2 * (before - anchor)
    low = [t.to(dtype) for t in (before, gradient, after, anchor)]
    (got,), _ = take(*([t] for t in low), [1.0])
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got.double(), before, rtol=tolerance, atol=tolerance)
