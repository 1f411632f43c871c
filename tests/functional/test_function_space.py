# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The proximal term with a second moment C, against dense matrices, and its laws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_linear.functional.proximal import delta_gradient, delta_proximal_step, delta_squared_distance
from peft_linear.functional.second_moment import MomentSketch, SecondMoment, stacked
from tests.helpers.reference_proximal import dense_block_step, dense_penalty


SEEDS = st.integers(0, 2**31)
SMALL = settings(max_examples=40, deadline=None)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def random_moment(d=6, k=2):
    return SecondMoment(torch.rand(d), torch.randn(k, d))


def dense(moment):
    return torch.diag_embed(moment.diagonal) + moment.factors.mT @ moment.factors


def random_factors(seed, anchored, r=3, d=6, out=4):
    torch.manual_seed(seed)
    a, b = torch.randn(r, d), torch.randn(out, r)
    return a, b, (torch.randn(r, d), torch.randn(out, r)) if anchored else (None, None)


def zeros_for(anchor, a, b):
    return (torch.zeros_like(a), torch.zeros_like(b)) if anchor[0] is None else anchor


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("k", [0, 2, 6])
@SMALL
@given(seed=SEEDS, lam=st.floats(0, 1e3), rate_a=st.floats(0, 1), rate_b=st.floats(0, 1))
def test_a_step_solves_both_systems_exactly(anchored, k, seed, lam, rate_a, rate_b):
    a, b, anchor = random_factors(seed, anchored)
    moment = random_moment(k=k)
    start = zeros_for(anchor, a, b)
    expected = dense_block_step(a, b, *start, 0.7, lam, rate_a, rate_b, dense(moment))
    found = delta_proximal_step(a, b, *anchor, rate_a * lam * 0.49, rate_b * lam * 0.49, moment)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("anchored", [False, True])
@SMALL
@given(seed=SEEDS, lam=st.floats(0.01, 1e3))
def test_the_gradient_is_autograd_s_and_the_distance_the_dense_one(anchored, seed, lam):
    a, b, anchor = random_factors(seed, anchored)
    moment, start = random_moment(), zeros_for(anchor, a, b)
    leaves = [a.clone().requires_grad_(), b.clone().requires_grad_()]
    penalty = dense_penalty(*leaves, *start, 0.7, dense(moment))
    expected = torch.autograd.grad(lam / 2 * penalty, leaves)
    for one, other in zip(delta_gradient(a, b, *anchor, lam * 0.49, moment), expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)
    assert float(delta_squared_distance(a, b, *anchor, 0.7, moment)) == pytest.approx(
        float(penalty.detach()), rel=1e-10
    )


@SMALL
@given(seed=SEEDS, step=st.floats(0, 1e4))
def test_the_identity_is_delta_space(seed, step):
    a, b, anchor = random_factors(seed, True)
    identity = SecondMoment(torch.ones(6), torch.zeros(0, 6))
    for anchors in (anchor, (None, None)):
        for one, other in zip(
            delta_proximal_step(a, b, *anchors, step, step, identity),
            delta_proximal_step(a, b, *anchors, step, step),
            strict=True,
        ):
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)


@SMALL
@given(seed=SEEDS)
def test_the_distance_and_the_change_of_the_weight_do_not_depend_on_the_factorisation(seed):
    """B→BM, A→M⁻¹A: the distance for every M; the direction of the first-order change for orthogonal M."""
    a, b, _ = random_factors(seed, False)
    moment = random_moment()
    m = torch.randn(3, 3) + 3 * torch.eye(3)
    distance = delta_squared_distance(a, b, None, None, 1.0, moment)
    other = delta_squared_distance(torch.linalg.solve(m, a), b @ m, None, None, 1.0, moment)
    assert float(other) == pytest.approx(float(distance), rel=1e-8)
    q = torch.linalg.qr(torch.randn(3, 3))[0]
    new_a, new_b = delta_proximal_step(a, b, None, None, 0.3, 0.3, moment)
    turned_a, turned_b = delta_proximal_step(q.T @ a, b @ q, None, None, 0.3, 0.3, moment)
    assert torch.allclose(turned_b @ turned_a, new_b @ new_a, rtol=1e-9, atol=1e-9)


@SMALL
@given(seed=SEEDS)
def test_an_infinite_strength_gives_the_base_weights_on_the_span_of_the_reference_and_keeps_the_rest(seed):
    """C of rank 2: what the weight does to inputs of the reference goes back to zero, in one step in B and A."""
    torch.manual_seed(seed)
    a, b = torch.randn(2, 6), torch.randn(4, 2)
    span = torch.randn(2, 6)
    moment = SecondMoment(torch.zeros(6), span)
    only_a = delta_proximal_step(a, b, None, None, 1e12, 0.0, moment)
    before = b @ a
    after = only_a[1] @ only_a[0]
    inside = span.T @ torch.linalg.solve(span @ span.T, span)
    assert torch.allclose(after @ inside, torch.zeros(4, 6), atol=1e-6 * float(before.norm()))
    outside = torch.eye(6) - inside
    assert torch.allclose(after @ outside, before @ outside, atol=1e-8 * float(before.norm()))


@SMALL
@given(seed=SEEDS, step=st.floats(0, 1e30))
def test_no_step_increases_its_objective_and_a_step_of_zero_changes_no_bit(seed, step):
    a, b, _ = random_factors(seed, False)
    moment = random_moment()
    same_a, same_b = delta_proximal_step(a, b, None, None, 0.0, 0.0, moment)
    assert torch.equal(same_a, a)
    assert torch.equal(same_b, b)
    new_a, new_b = delta_proximal_step(a, b, None, None, step, step, moment)
    before = delta_squared_distance(a, b, None, None, 1.0, moment)
    assert float(delta_squared_distance(new_a, new_b, None, None, 1.0, moment)) <= float(before) * (1 + 1e-12)


def test_modules_together_are_modules_one_by_one_whatever_their_ranks():
    torch.manual_seed(0)
    a, b = torch.randn(3, 2, 6), torch.randn(3, 4, 2)
    moments = [random_moment(k=k) for k in (0, 3, 1)]
    steps = torch.tensor([0.1, 2.0, 0.0]).reshape(3, 1, 1)
    together = delta_proximal_step(a, b, None, None, steps, steps, stacked(moments))
    for index, moment in enumerate(moments):
        step = float(steps[index])
        for one, other in zip(
            delta_proximal_step(a[index], b[index], None, None, step, step, moment), together, strict=True
        ):
            assert torch.allclose(one, other[index], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("n", "d", "rank"), [(40, 8, 8), (3, 20, 4), (200, 30, 40)])
def test_a_sketch_that_holds_the_rank_is_the_second_moment(n, d, rank):
    torch.manual_seed(1)
    inputs = torch.randn(n, d)
    sketch = MomentSketch(d, rank, CPU, torch.Generator().manual_seed(0))
    for part in inputs.split(7):
        sketch.add(part)
    moment, share = sketch.moment()
    exact = inputs.T @ inputs / n
    assert torch.allclose(dense(moment), exact, rtol=1e-10, atol=1e-10 * float(exact.norm()))
    assert share == pytest.approx(1.0)


def test_a_sketch_of_lower_rank_has_the_exact_diagonal_and_is_near_the_best_of_its_rank():
    torch.manual_seed(2)
    inputs = torch.randn(500, 60) * torch.logspace(0, -3, 60) @ torch.linalg.qr(torch.randn(60, 60))[0]
    sketch = MomentSketch(60, 8, CPU, torch.Generator().manual_seed(0))
    sketch.add(inputs)
    moment, share = sketch.moment()
    exact = inputs.T @ inputs / 500
    assert torch.allclose(dense(moment).diagonal(), exact.diagonal(), rtol=1e-10)
    values = torch.linalg.eigvalsh(exact).flip(0)
    best = float(values[:8].sum() / values.sum())
    assert 0.97 * best < share <= best + 1e-12


def test_a_sketch_of_nothing_is_zero():
    moment, share = MomentSketch(5, 2, CPU, torch.Generator()).moment()
    assert float(moment.trace()) == 0
    assert share == 1.0
