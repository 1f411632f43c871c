# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Laws of the proximal term on tensors, against dense computations of another kind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_linear.functional.proximal import (
    delta_gradient,
    delta_proximal_step,
    delta_squared_distance,
    factor_gradient,
    factor_proximal_step_,
    inner_product,
    squared_distance,
)
from tests.helpers.reference_proximal import dense_block_step, dense_penalty


SMALL = settings(max_examples=40, deadline=None)
STEPS = st.floats(1e-6, 1e6)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@st.composite
def modules(draw, anchored=None):
    """(A, B, A0, B0, s); without an anchor product one of the anchors is None."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    d_in, d_out, r = draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.integers(1, 4))
    a, b, a0, b0 = torch.randn(r, d_in), torch.randn(d_out, r), torch.randn(r, d_in), torch.randn(d_out, r)
    scaling = draw(st.floats(0.1, 4))
    if anchored is False or not draw(st.booleans()):
        a0, b0 = (a0, None) if draw(st.booleans()) else (None, b0)
    return a, b, a0, b0, scaling


def dense_anchor(a, b, a0, b0):
    return (torch.zeros_like(a) if a0 is None else a0), (torch.zeros_like(b) if b0 is None else b0)


@SMALL
@given(modules())
def test_delta_distance_is_the_dense_frobenius_norm(module):
    a, b, a0, b0, s = module
    expected = dense_penalty(a, b, *dense_anchor(a, b, a0, b0), s)
    torch.testing.assert_close(delta_squared_distance(a, b, a0, b0, s), expected, rtol=1e-10, atol=1e-10)


@SMALL
@given(modules(), st.integers(0, 10**6))
def test_delta_distance_does_not_depend_on_how_the_product_is_written(module, seed):
    a, b, a0, b0, s = module
    torch.manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(len(a), len(a)))[0] * 2.5
    expected = delta_squared_distance(a, b, a0, b0, s)
    torch.testing.assert_close(
        delta_squared_distance(torch.linalg.solve(mix, a), b @ mix, a0, b0, s), expected, rtol=1e-9, atol=1e-9
    )


def test_delta_distance_near_a_large_anchor_has_no_cancellation():
    torch.manual_seed(0)
    a0, b0 = 1e6 * torch.randn(3, 6), 1e6 * torch.randn(5, 3)
    a, b = a0.clone(), b0.clone()
    assert delta_squared_distance(a, b, a0, b0, 1.0) == 0
    b[0, 0] += 1e-3  # the product moves by 1e-3·A0[0], next to 1e12
    step = b[0, 0] - b0[0, 0]
    torch.testing.assert_close(
        delta_squared_distance(a, b, a0, b0, 1.0), step**2 * (a0[0] ** 2).sum(), rtol=1e-9, atol=0
    )


@SMALL
@given(modules(), st.floats(0.1, 10))
def test_delta_gradient_is_autograd_of_the_dense_penalty(module, lam):
    a, b, a0, b0, s = module
    leaf_a, leaf_b = a.clone().requires_grad_(True), b.clone().requires_grad_(True)
    (lam / 2 * dense_penalty(leaf_a, leaf_b, *dense_anchor(a, b, a0, b0), s)).backward()
    gradient_a, gradient_b = delta_gradient(a, b, a0, b0, lam * s * s)
    torch.testing.assert_close(gradient_a, leaf_a.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient_b, leaf_b.grad, rtol=1e-9, atol=1e-9)


@SMALL
@given(modules(), st.floats(1e-6, 1e3), st.floats(1e-6, 1e3))
def test_delta_step_solves_the_dense_normal_equations(module, step_a, step_b):
    a, b, a0, b0, _ = module
    expected = dense_block_step(a, b, *dense_anchor(a, b, a0, b0), 1.0, 1.0, step_a, step_b)
    for got, want in zip(delta_proximal_step(a, b, a0, b0, step_a, step_b), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)


@SMALL
@given(modules(), STEPS)
def test_delta_step_of_one_factor_is_the_proximal_operator_whatever_its_size(module, step):
    a, b, a0, b0, _ = module
    zero_a, zero_b = dense_anchor(a, b, a0, b0)

    def objective(new_b):
        return ((new_b - b) ** 2).sum() / 2 + step / 2 * dense_penalty(a, new_b, zero_a, zero_b, 1.0)

    same_a, new_b = delta_proximal_step(a, b, a0, b0, 0.0, step)
    assert torch.equal(same_a, a)
    torch.manual_seed(0)
    lowest = objective(new_b)
    for size in (1e-3, 1e-1):
        assert objective(new_b + size * torch.randn_like(b)) >= lowest * (1 - 1e-9)
    assert lowest <= objective(b) * (1 + 1e-9)


@SMALL
@given(modules(anchored=False))
def test_delta_step_without_limit_is_the_pretrained_weight(module):
    a, b, _, b0, s = module
    a = torch.cat([a, torch.eye(len(a))], dim=1)  # of full row rank
    new_a, new_b = delta_proximal_step(a, b, None, b0, 1e12, 1e12)
    assert delta_squared_distance(new_a, new_b, None, b0, s) <= 1e-12 * delta_squared_distance(a, b, None, b0, s)


@SMALL
@given(modules())
def test_delta_step_is_the_gradient_step_to_first_order(module):
    a, b, a0, b0, _ = module
    gradient_a, gradient_b = delta_gradient(a, b, a0, b0, 1.0)
    gaps = []
    for step in (1e-4, 1e-5):
        new_a, new_b = delta_proximal_step(a, b, a0, b0, step, step)
        gaps.append(
            float(torch.cat([(new_a - a + step * gradient_a).ravel(), (new_b - b + step * gradient_b).ravel()]).norm())
        )
    assert gaps[0] == pytest.approx(100 * gaps[1], rel=0.05, abs=1e-12)


@SMALL
@given(modules(), st.booleans())
def test_a_step_of_zero_leaves_every_bit(module, gated):
    a, b, a0, b0, _ = module
    step = torch.zeros(()) if gated else 0.0
    new_a, new_b = delta_proximal_step(a, b, a0, b0, step, step)
    assert torch.equal(new_a, a) and torch.equal(new_b, b)
    parameters = [a.clone(), b.clone()]
    factor_proximal_step_(parameters, [a0, b0], 7.0, torch.zeros(()))
    assert torch.equal(parameters[0], a) and torch.equal(parameters[1], b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_stacked_modules_are_the_modules_one_by_one(dtype):
    torch.manual_seed(0)
    a, b, a0, b0 = (torch.randn(3, *shape, dtype=dtype) for shape in ((2, 5), (4, 2), (2, 5), (4, 2)))
    steps = torch.tensor([0.0, 0.3, 7.0]).reshape(-1, 1, 1)
    stacked = delta_proximal_step(a, b, a0, b0, steps, 2 * steps)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for i in range(3):
        single = delta_proximal_step(a[i], b[i], a0[i], b0[i], float(steps[i]), 2 * float(steps[i]))
        for got, want in zip(stacked, single, strict=True):
            assert got.dtype == dtype
            torch.testing.assert_close(got[i], want, rtol=tolerance, atol=tolerance)


@SMALL
@given(modules(), STEPS, st.booleans())
def test_factor_step_is_the_proximal_operator(module, step, gated):
    a, b, a0, b0, _ = module
    start_a, start_b = dense_anchor(a, b, a0, b0)
    parameters = [a.clone(), b.clone()]
    factor_proximal_step_(parameters, [a0, b0], torch.tensor(step), torch.ones(())) if gated else (
        factor_proximal_step_(parameters, [a0, b0], step)
    )
    torch.testing.assert_close(parameters[0], start_a + (a - start_a) / (1 + step), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(parameters[1], start_b + (b - start_b) / (1 + step), rtol=1e-9, atol=1e-12)
    # optimality of ½‖x−θ‖² + (step/2)‖x−θ0‖²
    gradient = (parameters[0] - a) + step * (parameters[0] - start_a)
    assert gradient.norm() <= 1e-9 * (1 + step) * (1 + start_a.norm() + a.norm())


@SMALL
@given(modules(), st.floats(0, 10))
def test_factor_gradient_distance_and_inner_product(module, lam):
    a, b, a0, b0, _ = module
    start_a, start_b = dense_anchor(a, b, a0, b0)
    for got, want in zip(
        factor_gradient([a, b], [a0, b0], lam), [lam * (a - start_a), lam * (b - start_b)], strict=True
    ):
        torch.testing.assert_close(got, want)
    squared = (a - start_a).square().sum() + (b - start_b).square().sum()
    torch.testing.assert_close(squared_distance([a, b], [a0, b0]), squared)
    product = inner_product([a, torch.ones_like(b)], [a, b], [a0, b0])
    torch.testing.assert_close(product, (a * (a - start_a)).sum() + (b - start_b).sum(), rtol=1e-9, atol=1e-9)


def test_inner_product_over_mixed_dtypes_and_over_nothing():
    half, single = torch.ones(3, dtype=torch.bfloat16), torch.full((2, 2), 2.0, dtype=torch.float32)
    assert inner_product([half, single], [half, single], [None, single / 2]) == 3 + 4 * 2 * 1
    assert inner_product([], [], []) == 0
    assert squared_distance([], []) == 0


@pytest.mark.parametrize("selective", [True, False])
def test_the_selective_rule_raises_the_risk_by_second_order_terms_at_most(selective):
    """The paper's Theorem 1 on linear least squares, with its discretisation error written out.

    R(θ − ηv) = R − η⟨g, v⟩ + (η²/2)·vᵀHv with v = g + λ(θ−θ0): the rule makes ⟨g, v⟩ >= 0. Always pulling breaks it.
    """
    torch.manual_seed(3)
    x, y = torch.randn(20, 6), torch.randn(20)
    anchor = torch.randn(6)
    theta, lam = anchor + 3 * torch.randn(6), 0.5
    hessian = x.T @ x / len(y)
    learning_rate = 0.01 / float(torch.linalg.eigvalsh(hessian)[-1])
    excess, fired = [], 0
    for _ in range(1000):
        gradient = x.T @ (x @ theta - y) / len(y)
        fires = not selective or bool(inner_product([gradient], [theta], [anchor]) >= 0)
        fired += fires
        direction = gradient + (factor_gradient([theta], [anchor], lam)[0] if fires else 0)
        risk = (x @ theta - y).square().mean() / 2
        theta = theta - learning_rate * direction
        second_order = learning_rate**2 / 2 * direction @ hessian @ direction
        excess.append(float((x @ theta - y).square().mean() / 2 - risk - second_order))
    assert (max(excess) <= 1e-12) == selective
    assert 0 < fired < 1000 or not selective
