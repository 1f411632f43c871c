# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from peft_linear.errors import KernelError, PeftLinearError
from peft_linear.functional.bounds import (
    LipschitzEstimate,
    distance_bound,
    risk_bounds_after_adding,
    sample_jacobian_lipschitz,
    sample_lipschitz,
    taylor_remainder_bound,
)
from peft_linear.functional.regression import dual_distance, simulate_training, solve_ridge
from peft_linear.functional.spectrum import Spectrum


SLACK = 1 + 1e-9
seeds = st.integers(0, 100_000)
ridges = st.floats(1e-3, 1e3)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seeds, st.integers(1, 8), st.integers(1, 12), ridges)
@settings(max_examples=60, deadline=None)
def test_the_distance_bounds_hold_for_ridge_regression(seed, n, parameters, ridge):
    features, residual = normal(seed, n, parameters), normal(seed + 1, n)
    gram = features @ features.T
    alpha = solve_ridge(gram, residual, ridge)
    initial = 0.5 * float(residual.square().sum())
    final = 0.5 * float((ridge * alpha).square().sum())
    distance = dual_distance(gram, alpha)
    convex = distance_bound(initial, final, ridge, convex_minimum=True)
    assert distance <= convex * SLACK
    assert convex < distance_bound(initial, final, ridge) <= distance_bound(initial, 0.0, ridge)


@given(seeds, st.floats(1e-3, 10), st.integers(0, 40), st.sampled_from(["cross_entropy", "squared"]))
@settings(max_examples=40, deadline=None)
def test_the_distance_bound_holds_at_every_step_of_descent(seed, ridge, steps, loss):
    features = normal(seed, 12, 5)
    labels = torch.arange(4) % 3
    curve = simulate_training(
        features @ features.T, normal(seed + 1, 4, 3), labels, steps=steps, loss=loss, ridge=ridge
    )
    bound = distance_bound(float(curve.train_loss[0]), float(curve.train_loss[-1]), ridge)
    assert curve.distance[-1] <= bound * SLACK + 1e-12


@given(seeds, st.floats(0.1, 10))
@settings(max_examples=30, deadline=None)
def test_the_distance_bound_holds_where_the_risk_is_not_convex(seed, ridge):
    # The global minimum over a fine grid of a multimodal risk in one dimension.
    theta = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    waves = normal(seed, 3)
    risk = sum(((k + 1) * theta + waves[k]).cos() for k in range(3)) + 3
    best = int((risk + 0.5 * ridge * theta**2).argmin())
    assert abs(theta[best]) <= distance_bound(float(risk[10_000]), float(risk[best]), ridge) * SLACK


@given(st.floats(0.1, 10), st.floats(0.1, 10))
def test_the_convex_distance_bound_is_attained_by_a_linear_risk(slope, ridge):
    # R(θ) = −gθ: the minimum of R + λθ²/2 is at g/λ, where R has fallen by g²/λ.
    assert distance_bound(0.0, -(slope**2) / ridge, ridge, convex_minimum=True) == pytest.approx(slope / ridge)


@given(st.floats(0.1, 10), st.floats(0.1, 10))
def test_the_distance_bound_is_attained_where_the_objective_is_equal(drop, ridge):
    distance = distance_bound(1.0 + drop, 1.0, ridge)
    assert 1.0 + 0.5 * ridge * distance**2 == pytest.approx(1.0 + drop)


@given(seeds, st.floats(0.01, 3))
@settings(max_examples=40, deadline=None)
def test_the_remainder_is_never_above_its_bound(seed, radius):
    # f(θ) = sin(Wθ), Jacobian diag(cos(Wθ))W, with Lipschitz constant at most ‖W‖₂·max_i‖w_i‖.
    weights, center = normal(seed, 4, 3), normal(seed + 1, 3)
    lipschitz = float(torch.linalg.matrix_norm(weights, ord=2) * weights.norm(dim=1).max())
    move = normal(seed + 2, 3)
    move = radius * move / move.norm()

    def f(theta):
        return (weights @ theta).sin()

    start, tangent = torch.func.jvp(f, (center,), (move,))
    remainder = (f(center + move) - start - tangent).norm()
    assert remainder <= taylor_remainder_bound(lipschitz, radius) * SLACK

    def linear(theta):
        return start + torch.func.jvp(f, (center,), (theta - center,))[1]

    estimate = sample_jacobian_lipschitz(f, linear, center, [radius / 4, radius], samples=5, seed=seed)
    assert (estimate.maximum <= lipschitz * (1 + 1e-6)).all()
    slopes = sample_lipschitz(f, center, [radius / 4, radius], samples=5, seed=seed)
    assert (slopes.maximum <= torch.linalg.matrix_norm(weights, ord=2) * SLACK).all()
    assert (slopes.average <= slopes.maximum).all() and (slopes.average > 0).all()


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(-5, 5))
def test_remainder_bound_and_estimate_are_exact_for_a_parabola(curvature, radius, center):
    def f(theta):
        return 0.5 * curvature * theta**2

    def linear(theta):
        return f(start) + curvature * start * (theta - start)

    start = torch.tensor([center], dtype=torch.float64)
    remainder = float((f(start + radius) - linear(start + radius)).norm())
    assert remainder == pytest.approx(taylor_remainder_bound(curvature, radius), rel=1e-6)
    estimate = sample_jacobian_lipschitz(f, linear, start, [radius], samples=2)
    assert float(estimate.maximum) == pytest.approx(curvature, rel=1e-6)


def test_the_sampled_slope_of_a_linear_map_is_its_gain_in_that_direction():
    weights = torch.diag(torch.tensor([3.0, 0.0], dtype=torch.float64))
    estimate = sample_lipschitz(lambda theta: weights @ theta, torch.zeros(2, dtype=torch.float64), [0.1, 7.0], 400)
    assert_close(estimate.average[0], estimate.average[1])  # the same directions at every radius
    assert float(estimate.average[0]) == pytest.approx(3 * 2 / math.pi, rel=0.1)  # mean of 3·|cos| over the circle
    assert 2.99 < float(estimate.maximum[0]) <= 3.0 * SLACK
    again = sample_lipschitz(lambda theta: weights @ theta, torch.zeros(2, dtype=torch.float64), [0.1], 400, seed=1)
    assert float(again.average) != float(estimate.average[0])


def test_the_lower_estimate_on_a_ball_counts_what_smaller_balls_have_shown():
    radii, maximum = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.5, 2.0, 1.0])
    estimate = LipschitzEstimate(radii, average=maximum / 2, maximum=maximum)
    assert estimate.lower_estimate.tolist() == [2.0, 2.0, 2.0]
    assert "r=3: 0.25 (max 0.5)" in repr(estimate)


def risk(gram, residual, ridge):
    return float(residual @ solve_ridge(gram, residual, ridge))


@given(seeds, st.integers(1, 8), st.integers(1, 10), st.integers(1, 10), ridges, st.floats(1e-3, 1e3))
@settings(max_examples=100, deadline=None)
def test_the_risk_after_adding_a_module_lies_between_its_bounds(seed, n, first, second, ridge, scale):
    one, two = normal(seed, n, first), scale * normal(seed + 1, n, second)
    gram, added, residual = one @ one.T, two @ two.T, normal(seed + 2, n)
    bounds = risk_bounds_after_adding(gram, added, residual, ridge)
    actual = risk(gram + added, residual, ridge)
    assert bounds.lower / SLACK - 1e-12 <= actual <= bounds.upper * SLACK
    assert bounds.upper == pytest.approx(risk(gram, residual, ridge), rel=1e-8)
    shifted = gram + ridge * torch.eye(n, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(shifted)
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    assert bounds.rho == pytest.approx(float(torch.linalg.matrix_norm(root @ added @ root, ord=2)), rel=1e-6)


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0.01, 10), st.floats(-10, 10))
def test_the_lower_risk_bound_is_attained_in_one_dimension(k, s, ridge, y):
    gram, added = (torch.tensor([[value]], dtype=torch.float64) for value in (k, s))
    bounds = risk_bounds_after_adding(gram, added, torch.tensor([y], dtype=torch.float64), ridge)
    assert bounds.lower == pytest.approx(y**2 / (k + s + ridge), rel=1e-9, abs=1e-12)


def test_the_upper_risk_bound_is_attained_by_a_module_that_does_not_see_the_residual():
    gram, added = torch.eye(2, dtype=torch.float64), torch.diag(torch.tensor([0.0, 5.0], dtype=torch.float64))
    residual = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert risk(gram + added, residual, 1.0) == pytest.approx(
        risk_bounds_after_adding(gram, added, residual, 1.0).upper
    )


def test_the_counterexample_to_a_bound_without_a_condition_on_the_added_kernel():
    # K=1, S=3, σ=1, y=1: the true ratio of the risks is 0.4. Theorem 7 of the paper, applied here although its
    # perturbation is not small, gives a lower bound of 10 on a ratio that can never exceed 1.
    one = torch.ones(1, 1, dtype=torch.float64)
    residual = torch.ones(1, dtype=torch.float64)
    bounds = risk_bounds_after_adding(one, 3 * one, residual, ridge=1.0)
    true_ratio = risk(4 * one, residual, 1.0) / risk(one, residual, 1.0)
    assert true_ratio == pytest.approx(0.4)
    assert bounds.rho == pytest.approx(1.5)  # not below 1: outside of every argument by a convergent series
    assert bounds.lower / bounds.upper == pytest.approx(0.4)  # tight


@given(seeds, st.integers(1, 8), st.integers(1, 10), st.integers(1, 10), ridges, st.floats(1e-3, 1e3))
@settings(max_examples=60, deadline=None)
def test_eigenvalues_and_condition_number_after_adding_lie_in_weyls_intervals(seed, n, first, second, ridge, scale):
    one, two = normal(seed, n, first), scale * normal(seed + 1, n, second)
    before, added = Spectrum.from_gram(one @ one.T), Spectrum.from_gram(two @ two.T)
    after = Spectrum.from_gram(one @ one.T + two @ two.T)
    lower, upper = before.bounds_after_adding(added)
    room = 1e-10 * float(after.eigenvalues[0])
    assert (lower - room <= after.eigenvalues).all() and (after.eigenvalues <= upper + room).all()
    low, high = before.condition_number_after_adding(added, ridge)
    assert low / (1 + 1e-6) <= after.condition_number(ridge) <= high * (1 + 1e-6)


IDENTITY, ONES = torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (PeftLinearError, "ridge must be above 0", lambda: distance_bound(1.0, 0.5, 0.0)),
        (PeftLinearError, "final_risk must be a finite number", lambda: distance_bound(1.0, math.nan, 1.0)),
        (PeftLinearError, "the penalised objective has risen", lambda: distance_bound(1.0, 2.0, 1.0)),
        (PeftLinearError, "must not be negative, got -1", lambda: taylor_remainder_bound(-1.0, 1.0)),
        (PeftLinearError, "distance must be a finite", lambda: taylor_remainder_bound(1.0, math.inf)),
        (PeftLinearError, "radii must be above 0", lambda: sample_lipschitz(torch.sin, ONES, [])),
        (PeftLinearError, "radii must be above 0", lambda: sample_lipschitz(torch.sin, ONES, [1.0, 0.0])),
        (PeftLinearError, "samples=0", lambda: sample_lipschitz(torch.sin, ONES, [1.0], samples=0)),
        (KernelError, "needs .n,.", lambda: risk_bounds_after_adding(IDENTITY, torch.eye(3), ONES, 1.0)),
        (KernelError, "ridge must be a finite", lambda: risk_bounds_after_adding(IDENTITY, IDENTITY, ONES, -1.0)),
        (KernelError, "residual must have shape", lambda: risk_bounds_after_adding(IDENTITY, IDENTITY, IDENTITY, 1.0)),
        (KernelError, "not positive definite", lambda: risk_bounds_after_adding(0 * IDENTITY, IDENTITY, ONES, 0.0)),
        (KernelError, "not positive semidef", lambda: risk_bounds_after_adding(IDENTITY, -IDENTITY, ONES, 2.0)),
    ],
)
def test_hypotheses_are_checked(error, message, call):
    with pytest.raises(error, match=message):
        call()
