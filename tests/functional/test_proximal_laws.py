# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Limits and orders of the proximal step, and the selective rule's theorem with the hypotheses it needs.

All on a risk whose every derivative is known: least squares R(θ) = ‖Xθ − y‖²/(2n), with Hessian H = XᵀX/n and largest
eigenvalue L, and the logistic loss.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from peft_linear.functional.proximal import (
    delta_proximal_step,
    factor_gradient,
    factor_proximal_step_,
    inner_product,
)
from tests.helpers.reference_proximal import dense_penalty


SMALL = settings(max_examples=40, deadline=None)
SEEDS = st.integers(0, 2**31)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class LeastSquares:
    def __init__(self, seed, n=8, dimension=4):
        torch.manual_seed(seed)
        self.x, self.y = torch.randn(n, dimension), torch.randn(n)
        self.anchor = torch.randn(dimension)
        self.smoothness = float(torch.linalg.eigvalsh(self.x.T @ self.x / n)[-1])

    def risk(self, theta):
        return float((self.x @ theta - self.y).square().mean() / 2)

    def gradient(self, theta):
        return self.x.T @ (self.x @ theta - self.y) / len(self.y)


class Logistic(LeastSquares):
    """log(1 + exp(−yx·θ)), averaged; its second derivative is at most a quarter of the squares'."""

    def __init__(self, seed):
        super().__init__(seed)
        self.signed = self.x * torch.sign(self.y)[:, None]
        self.smoothness /= 4

    def risk(self, theta):
        return float(torch.nn.functional.softplus(-self.signed @ theta).mean())

    def gradient(self, theta):
        return -self.signed.T @ torch.sigmoid(-self.signed @ theta) / len(self.y)


def step(problem, theta, rate, lam, mode, fires):
    gradient = problem.gradient(theta)
    if mode == "coupled":
        pull = factor_gradient([theta], [problem.anchor], lam)[0] if fires else 0
        return theta - rate * (gradient + pull)
    moved = theta - rate * gradient
    if fires:
        factor_proximal_step_([moved], [problem.anchor], rate * lam)
    return moved


def product(problem, theta):
    return float(inner_product([problem.gradient(theta)], [theta], [problem.anchor]))


# --- the selective rule -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
@pytest.mark.parametrize("make", [LeastSquares, Logistic])
@settings(max_examples=150, deadline=None)
@given(seed=SEEDS, share=st.floats(0.01, 1), pull=st.floats(0, 1), away=st.floats(0.01, 30))
def test_where_it_fires_the_risk_does_not_rise_if_the_pull_is_not_longer_than_the_gradient(
    mode, make, seed, share, pull, away
):
    """For any L-smooth risk, η <= 1/L and λ‖θ−θ0‖ <= ‖∇R(θ)‖; at any θ, not only on a trajectory."""
    problem = make(seed)
    theta = problem.anchor + away * torch.randn_like(problem.anchor)
    if product(problem, theta) < 0:
        theta = 2 * problem.anchor - theta
    if product(problem, theta) < 0:
        return
    lam = pull * float(problem.gradient(theta).norm() / (theta - problem.anchor).norm())
    after = step(problem, theta, share / problem.smoothness, lam, mode, fires=True)
    assert problem.risk(after) <= problem.risk(theta) * (1 + 1e-12)


@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
@settings(max_examples=150, deadline=None)
@given(seed=SEEDS, share=st.floats(0.01, 1), lam=st.floats(0, 100), away=st.floats(0.01, 30))
def test_without_that_it_rises_by_no_more_than_a_term_of_second_order(mode, seed, share, lam, away):
    problem = LeastSquares(seed)
    theta = problem.anchor + away * torch.randn_like(problem.anchor)
    rate = share / problem.smoothness
    beta = rate * lam / (1 + rate * lam) if mode == "decoupled" else rate * lam
    bound = problem.smoothness / 2 * beta**2 * float((theta - problem.anchor).square().sum())
    after = step(problem, theta, rate, lam, mode, fires=product(problem, theta) >= 0)
    assert problem.risk(after) <= (problem.risk(theta) + bound) * (1 + 1e-12)


@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
@SMALL
@given(seed=SEEDS, share=st.floats(0.05, 1), lam=st.floats(0, 100))
def test_full_batch_descent_on_squares_from_the_anchor_is_never_pulled(mode, seed, share, lam):
    """With η <= 1/L, d_t = −p(H)g_0 and g_t = (I − Hp(H))g_0 with 0 <= Hp(H) <= I, so ⟨g_t, d_t⟩ <= 0 for every t.

    The risk then falls as in plain descent: the theorem holds, because the rule keeps still.
    """
    problem = LeastSquares(seed)
    rate = share / problem.smoothness
    theta = step(problem, problem.anchor.clone(), rate, lam, mode, fires=True)  # the product is 0: it acts
    plain = theta.clone()
    for _ in range(60):
        risk, inner = problem.risk(theta), product(problem, theta)
        scale = float(problem.gradient(theta).norm() * (theta - problem.anchor).norm())
        assert inner <= 1e-9 * scale + 1e-15
        if scale < 1e-12:
            return  # converged: what is left is rounding
        theta = step(problem, theta, rate, lam, mode, fires=inner > 0)
        plain = plain - rate * problem.gradient(plain)
        assert problem.risk(theta) <= risk * (1 + 1e-12)
    torch.testing.assert_close(theta, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("mode", "path"),
    [("coupled", [0.0, 1.0, 0.0]), ("decoupled", [0.0, 0.5, 1.0, 0.5])],
)
def test_the_theorem_as_stated_has_a_counterexample_at_the_minimum(mode, path):
    """R(θ) = (θ−1)²/2, θ0 = 0, η = 1/L = 1, λ = 1: descent arrives, ⟨0, θ−θ0⟩ >= 0 fires, and the risk rises from 0.

    Everything the theorem asks for is there: squared loss, a linear model, full batches, a step below 2/L. With > in
    place of >= this start would have been kept.
    """
    problem = LeastSquares(0, n=1, dimension=1)
    problem.x, problem.y, problem.anchor = torch.ones(1, 1), torch.ones(1), torch.zeros(1)
    theta, found = torch.zeros(1), [0.0]
    for _ in path[1:]:
        theta = step(problem, theta, 1.0, 1.0, mode, fires=product(problem, theta) >= 0)
        found.append(float(theta))
    assert found == path
    assert problem.risk(torch.tensor([path[-2]])) == 0 < problem.risk(theta)


@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
def test_between_one_and_two_over_l_it_can_raise_the_risk_also_with_a_strict_inequality(mode):
    """ηL = 1.5 jumps over the minimum, the rule fires by right, and a strong pull jumps back farther."""
    problem = LeastSquares(0, n=1, dimension=1)
    problem.x, problem.y, problem.anchor = torch.ones(1, 1), torch.ones(1), torch.zeros(1)
    theta = torch.tensor([1.5])
    assert product(problem, theta) > 0
    after = step(problem, theta, 1.5, 100.0, mode, fires=True)
    assert problem.risk(after) > problem.risk(theta)


# --- λ → ∞ --------------------------------------------------------------------------------------------------------


@SMALL
@given(SEEDS, st.floats(1, 1e6))
def test_always_pulling_decoupled_stays_within_the_gradient_over_lambda(seed, lam):
    """d' = (d − ηg)/(1 + ηλ): with ‖g‖ <= G on the way, ‖d‖ <= G/λ."""
    problem = LeastSquares(seed)
    rate, theta, steepest = 0.5 / problem.smoothness, problem.anchor.clone(), 0.0
    for _ in range(50):
        steepest = max(steepest, float(problem.gradient(theta).norm()))
        theta = step(problem, theta, rate, lam, "decoupled", fires=True)
        assert float((theta - problem.anchor).norm()) <= steepest / lam * (1 + 1e-9)


@SMALL
@given(SEEDS, st.floats(1, 1e6))
def test_always_pulling_coupled_ends_within_the_gradient_over_lambda(seed, lam):
    """Coupled, λ → ∞ at a fixed step diverges (ηλ > 2); its minimum tends to θ0, and 1/(L+λ) gets there."""
    problem = LeastSquares(seed)
    theta = problem.anchor.clone()
    for _ in range(2000):
        theta = step(problem, theta, 1 / (problem.smoothness + lam), lam, "coupled", fires=True)
    limit = float(problem.gradient(problem.anchor).norm()) / lam
    assert float((theta - problem.anchor).norm()) <= limit * (1 + 1e-9)


def test_the_selective_rule_does_not_stay_at_the_anchor_however_large_lambda_is():
    """After the first step it is silent: the gradient leads away, which is what it never opposes."""
    problem = LeastSquares(1)
    rate, theta = 0.5 / problem.smoothness, problem.anchor.clone()
    for _ in range(50):
        theta = step(problem, theta, rate, 1e9, "decoupled", fires=product(problem, theta) >= 0)
    plain = problem.anchor.clone()
    for _ in range(49):
        plain = plain - rate * problem.gradient(plain)
    torch.testing.assert_close(theta, plain, rtol=1e-6, atol=1e-6)


# --- orders and minimisers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selective", [True, False])
@SMALL
@given(SEEDS, st.floats(0.1, 3))
def test_coupled_and_decoupled_descent_differ_by_a_fourth_when_the_step_is_halved(selective, seed, lam):
    problem = LeastSquares(seed)
    start = problem.anchor + torch.randn_like(problem.anchor)

    def gap(rate, steps=4):
        ends = []
        for mode in ("coupled", "decoupled"):
            theta = start.clone()
            for _ in range(steps):
                fires = not selective or product(problem, start) >= 0  # the same decision for every rate
                theta = step(problem, theta, rate, lam, mode, fires)
            ends.append(theta)
        return float((ends[0] - ends[1]).norm())

    coarse, fine = gap(1e-4), gap(5e-5)
    assert coarse == pytest.approx(4 * fine, rel=0.02, abs=1e-14)


def lowest(objective, start):
    """The minimiser of a smooth convex function of one matrix, by a quasi-Newton method that knows no formula."""

    def value_and_slope(flat):
        x = torch.from_numpy(flat).reshape(start.shape).requires_grad_(True)
        value = objective(x)
        (slope,) = torch.autograd.grad(value, x)
        return float(value.detach()), slope.numpy().ravel()

    options = {"maxiter": 10_000, "gtol": 1e-10, "ftol": 0.0, "maxcor": 50}
    found = minimize(value_and_slope, start.numpy().ravel().copy(), jac=True, method="L-BFGS-B", options=options)
    return torch.from_numpy(np.asarray(found.x)).reshape(start.shape)


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.floats(1e-2, 30), st.floats(1e-2, 30))
def test_decoupled_steps_are_what_a_numeric_minimiser_finds(seed, step_a, step_b):
    torch.manual_seed(seed)
    a, b, a0, b0 = torch.randn(2, 4), torch.randn(3, 2), torch.randn(2, 4), torch.randn(3, 2)
    found = lowest(lambda x: (x - a).square().sum() / 2 + step_a / 2 * (x - a0).square().sum(), a)
    moved = [a.clone()]
    factor_proximal_step_(moved, [a0], step_a)
    torch.testing.assert_close(moved[0], found, rtol=1e-5, atol=1e-6)

    new_a, new_b = delta_proximal_step(a, b, a0, b0, step_a, step_b)
    found_b = lowest(lambda x: (x - b).square().sum() / 2 + step_b / 2 * dense_penalty(a, x, a0, b0, 1.0), b)
    torch.testing.assert_close(new_b, found_b, rtol=1e-5, atol=1e-6)
    found_a = lowest(lambda x: (x - a).square().sum() / 2 + step_a / 2 * dense_penalty(x, new_b, a0, b0, 1.0), a)
    torch.testing.assert_close(new_a, found_a, rtol=1e-5, atol=1e-6)


@SMALL
@given(SEEDS, st.floats(1e-3, 1e3), st.booleans())
def test_the_delta_step_turns_with_the_factors(seed, mu, anchored):
    """B → BQ, A → QᵀA with an orthogonal Q: the step of the turned factors is the turned step."""
    torch.manual_seed(seed)
    a, b = torch.randn(3, 5), torch.randn(4, 3)
    a0, b0 = (torch.randn(3, 5), torch.randn(4, 3)) if anchored else (torch.randn(3, 5), None)
    turn = torch.linalg.qr(torch.randn(3, 3))[0]
    new_a, new_b = delta_proximal_step(a, b, a0, b0, mu, 2 * mu)
    turned_anchor = (turn.T @ a0, None if b0 is None else b0 @ turn)
    turned_a, turned_b = delta_proximal_step(turn.T @ a, b @ turn, *turned_anchor, mu, 2 * mu)
    torch.testing.assert_close(turned_a, turn.T @ new_a, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(turned_b, new_b @ turn, rtol=1e-8, atol=1e-9)
