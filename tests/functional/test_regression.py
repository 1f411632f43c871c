# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from peft_linear.errors import KernelError
from peft_linear.functional.regression import (
    dual_distance,
    leave_one_out_path,
    leave_one_out_residuals,
    predict_ridge,
    select_ridge,
    simulate_training,
    solve_ridge,
)
from tests.helpers.reference_linear import descend_in_parameters, refit_without_each_example, ridge_solution


EXACT = {"rtol": 1e-9, "atol": 1e-10}


def problem(seed, examples=5, outputs=3, parameters=7, held_out=4):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "J": normal(examples * outputs, parameters),
        "f0": normal(examples, outputs),
        "labels": torch.randint(0, outputs, (examples,), generator=generator),
        "J_held": normal(held_out * outputs, parameters),
        "f0_held": normal(held_out, outputs),
        "labels_held": torch.randint(0, outputs, (held_out,), generator=generator),
    }


def residual_of(p):
    return (F.one_hot(p["labels"], p["f0"].shape[1]) - p["f0"]).reshape(-1)


problems = st.builds(
    problem,
    seed=st.integers(0, 10_000),
    examples=st.integers(1, 6),
    outputs=st.integers(2, 4),
    parameters=st.integers(1, 30),
)
ridges = st.floats(1e-3, 1e3)


@given(problems, ridges)
@settings(max_examples=40, deadline=None)
def test_dual_solution_is_the_primal_solution(p, ridge):
    gram, residual = p["J"] @ p["J"].T, residual_of(p)
    alpha = solve_ridge(gram, residual, ridge)
    displacement = ridge_solution(p["J"], residual, ridge)
    assert_close(p["J"].T @ alpha, displacement, rtol=1e-7, atol=1e-8)
    assert_close(residual - gram @ alpha, ridge * alpha, rtol=1e-7, atol=1e-8)
    # αᵀKα cancels where α lies off the range of K: its rounding error is of the order of ‖α‖²‖K‖
    rounding = 16 * torch.finfo(gram.dtype).eps * float(alpha.square().sum() * torch.linalg.matrix_norm(gram, 2))
    square = float(displacement.square().sum())
    assert dual_distance(gram, alpha) ** 2 == pytest.approx(square, rel=1e-6, abs=1e-16 + rounding)
    predicted = predict_ridge(p["J_held"] @ p["J"].T, alpha, p["f0_held"])
    assert_close(predicted, p["f0_held"] + (p["J_held"] @ displacement).view(4, -1), rtol=1e-7, atol=1e-7)


@given(problems, ridges)
@settings(max_examples=40, deadline=None)
def test_leave_one_out_is_refitting_without_the_example(p, ridge):
    gram, residual, block = p["J"] @ p["J"].T, residual_of(p), p["f0"].shape[1]
    slow = refit_without_each_example(p["J"], residual, ridge, block)
    assert_close(leave_one_out_residuals(gram, residual, ridge, block), slow, rtol=1e-6, atol=1e-7)
    path = leave_one_out_path(gram, residual, [ridge, 2 * ridge], block)
    assert_close(path[0], slow, rtol=1e-6, atol=1e-7)
    assert_close(path[1], leave_one_out_residuals(gram, residual, 2 * ridge, block), rtol=1e-6, atol=1e-7)


def test_several_residuals_share_one_factorisation():
    p = problem(1)
    gram, residual = p["J"] @ p["J"].T, residual_of(p)
    both = torch.stack([residual, 3 * residual], dim=1)
    assert_close(solve_ridge(gram, both, 0.1)[:, 1], 3 * solve_ridge(gram, residual, 0.1), **EXACT)
    columns = leave_one_out_residuals(gram, both, 0.1, 3)
    assert_close(columns[:, 0], leave_one_out_residuals(gram, residual, 0.1, 3), **EXACT)


def test_limits_of_the_ridge():
    p = problem(2, parameters=40)
    gram, residual = p["J"] @ p["J"].T, residual_of(p)
    assert_close(gram @ solve_ridge(gram, residual, 0.0), residual, **EXACT)  # interpolation
    assert_close(1e9 * solve_ridge(gram, residual, 1e9), residual, rtol=1e-6, atol=1e-6)  # θ stays at θ0
    assert_close(leave_one_out_residuals(gram, residual, 1e9, 3), residual, rtol=1e-6, atol=1e-6)


def test_float32_input_is_solved_in_float64():
    p = problem(3)
    gram, residual = p["J"] @ p["J"].T, residual_of(p)
    single = solve_ridge(gram.float(), residual.float(), 1.0)
    assert single.dtype == torch.float64
    assert_close(single, solve_ridge(gram.float().double(), residual.float().double(), 1.0), **EXACT)


def test_select_ridge_finds_the_planted_noise_level():
    # For y = Jδ + noise with δ ~ N(0, τ²I), the best ridge is the noise variance over τ².
    generator = torch.Generator().manual_seed(0)
    J = torch.randn(300, 20, generator=generator, dtype=torch.float64)
    noise = torch.randn(300, generator=generator, dtype=torch.float64)
    signal = J @ torch.randn(20, generator=generator, dtype=torch.float64)
    quiet = select_ridge(J @ J.T, signal + 0.01 * noise, ridges=[1e-4, 1e-2, 1.0, 1e2, 1e4])
    loud = select_ridge(J @ J.T, signal + 10 * noise, ridges=[1e-4, 1e-2, 1.0, 1e2, 1e4])
    assert quiet < 1.0 < loud <= 1e2
    scaled = select_ridge(4 * J @ J.T, signal + 10 * noise)
    assert scaled == pytest.approx(4 * select_ridge(J @ J.T, signal + 10 * noise))


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["cross_entropy", "squared", "own"])
@pytest.mark.parametrize("mini", [False, True])
def test_simulation_is_gradient_descent_in_the_parameters(kind, ridge, mini):
    p = problem(4)
    steps, rates = 6, [0.02, 0.05, 0.1, 0.05, 0.02, 0.01]
    batches = [torch.tensor([step % 5, (step + 2) % 5]) for step in range(steps)] if mini else None

    def squared(outputs, labels):
        return 0.5 * (outputs - F.one_hot(labels, 3)).square().sum(1).mean()

    def own(outputs, labels):
        return F.multi_margin_loss(outputs, labels, p=2)

    function = {"cross_entropy": F.cross_entropy, "squared": squared, "own": own}[kind]
    path = descend_in_parameters(p["J"], p["f0"], function, p["labels"], rates, ridge, batches)
    curve = simulate_training(
        p["J"] @ p["J"].T,
        p["f0"],
        p["labels"],
        learning_rate=rates,
        steps=steps,
        loss=own if kind == "own" else kind,
        ridge=ridge,
        held_out=(p["J_held"] @ p["J"].T, p["f0_held"], p["labels_held"]),
        batches=batches,
    )
    for step, displacement in enumerate(path):
        outputs = p["f0"] + (p["J"] @ displacement).view(5, 3)
        held = p["f0_held"] + (p["J_held"] @ displacement).view(4, 3)
        assert_close(curve.train_loss[step], function(outputs, p["labels"]).double(), **EXACT)
        assert_close(curve.held_out_loss[step], function(held, p["labels_held"]).double(), **EXACT)
        assert_close(curve.distance[step], displacement.norm(), **EXACT)
        assert curve.train_accuracy[step] == pytest.approx(float((outputs.argmax(1) == p["labels"]).double().mean()))
        assert curve.held_out_accuracy[step] == pytest.approx(
            float((held.argmax(1) == p["labels_held"]).double().mean())
        )
    assert_close(curve.outputs, outputs, **EXACT)
    assert_close(curve.held_out_outputs, held, **EXACT)
    assert_close(p["J"].T @ curve.coefficients, path[-1], **EXACT)
    assert curve.learning_rates.tolist() == rates
    assert "6 steps" in repr(curve)


@given(problems, st.sampled_from(["cross_entropy", "squared"]), st.floats(0, 10))
@settings(max_examples=30, deadline=None)
def test_default_learning_rate_never_raises_the_objective(p, loss, ridge):
    curve = simulate_training(p["J"] @ p["J"].T, p["f0"], p["labels"], steps=30, loss=loss, ridge=ridge)
    objective = curve.train_loss + 0.5 * ridge * curve.distance.square()
    assert (objective.diff() <= 1e-12 * objective[0]).all()


def test_squared_loss_converges_to_ridge_regression_with_n_times_the_ridge():
    p = problem(5, parameters=40)
    gram = p["J"] @ p["J"].T
    alpha = solve_ridge(gram, residual_of(p), 5 * 0.2)
    curve = simulate_training(gram, p["f0"], p["labels"], steps=3000, loss="squared", ridge=0.2)
    assert_close(curve.coefficients, alpha, **EXACT)
    assert curve.distance[-1] == pytest.approx(dual_distance(gram, alpha), rel=1e-9)


def test_learning_rate_as_number_function_and_tensor():
    p = problem(6)
    gram = p["J"] @ p["J"].T
    runs = [
        simulate_training(gram, p["f0"], p["labels"], steps=3, learning_rate=rate)
        for rate in (0.05, lambda step: 0.05, torch.full((3,), 0.05, dtype=torch.float64), [0.05] * 3)
    ]
    for run in runs[1:]:
        assert_close(run.train_loss, runs[0].train_loss, rtol=0, atol=0)


def test_float_targets_and_a_single_output():
    p = problem(7, outputs=2)
    gram = p["J"] @ p["J"].T
    one_hot = F.one_hot(p["labels"], 2).double()
    for loss in ("squared", "cross_entropy"):
        hard = simulate_training(gram, p["f0"], p["labels"], steps=4, loss=loss)
        soft = simulate_training(gram, p["f0"], one_hot, steps=4, loss=loss)
        assert_close(hard.train_loss, soft.train_loss, **EXACT)
        assert_close(hard.train_accuracy, soft.train_accuracy, **EXACT)
    single = simulate_training(gram[::2, ::2], p["f0"][:, :1], one_hot[:, 0], steps=4, loss="squared")
    assert single.train_accuracy.isnan().all() and single.train_loss.isfinite().all()


def test_no_steps_and_a_zero_kernel_stay_at_the_start():
    p = problem(8)
    curve = simulate_training(torch.zeros(15, 15), p["f0"], p["labels"], steps=2)
    assert_close(curve.outputs, p["f0"], rtol=0, atol=0)
    assert simulate_training(torch.zeros(15, 15), p["f0"], p["labels"], steps=0).steps == 0


def bad_calls():
    p = problem(9)
    gram, residual = p["J"] @ p["J"].T, residual_of(p)
    asymmetric = gram.clone()
    asymmetric[0, 1] += 1
    broken = gram.clone()
    broken[0, 0] = torch.nan

    def simulate(**changes):
        start = {"gram": gram, "outputs0": p["f0"], "labels": p["labels"], "steps": 3} | changes
        return simulate_training(start.pop("gram"), start.pop("outputs0"), start.pop("labels"), **start)

    cross = p["J_held"] @ p["J"].T
    return {
        "square matrix": lambda: solve_ridge(gram[:3], residual, 1.0),
        "needs .n,. or .n, k. values": lambda: solve_ridge(gram, residual[:3], 1.0),
        "NaN or infinite": lambda: solve_ridge(broken, residual, 1.0),
        "not symmetric": lambda: solve_ridge(asymmetric, residual, 1.0),
        "ridge must be a number >= 0, got -1": lambda: solve_ridge(gram, residual, -1.0),
        "ridge must be a number >= 0, got nan": lambda: solve_ridge(gram, residual, float("nan")),
        "not positive definite": lambda: solve_ridge(-gram, residual, 1.0),
        "divide the 15 rows, got 4": lambda: leave_one_out_residuals(gram, residual, 1.0, 4),
        "must be above 0": lambda: leave_one_out_path(gram, residual, [1.0, 0.0]),
        "mean eigenvalue is 0": lambda: select_ridge(0 * gram, residual),
        "cross_gram has shape": lambda: predict_ridge(cross[:2], residual, p["f0_held"]),
        "outputs0 must be": lambda: simulate(outputs0=residual),
        "must not be negative": lambda: simulate(steps=-1),
        "must not be negative, got steps=3 and ridge=-1": lambda: simulate(ridge=-1),
        "1 batches for 3 steps": lambda: simulate(batches=[torch.tensor([0])]),
        "unknown loss 'hinge'": lambda: simulate(loss="hinge"),
        "float labels must be targets": lambda: simulate(labels=p["f0"][:, 0]),
        "integer labels must have shape": lambda: simulate(labels=p["labels"][:2]),
        "no classes of 3 outputs": lambda: simulate(labels=p["labels"] + 3),
        "known curvature": lambda: simulate(loss=F.cross_entropy),
        "2 learning rates for 3 steps": lambda: simulate(learning_rate=[0.1, 0.1]),
        "diverged at step": lambda: simulate(learning_rate=1e80, steps=20, loss="squared"),
        "against 15 rows": lambda: simulate(held_out=(cross[:2], p["f0_held"], p["labels_held"])),
    }


@pytest.mark.parametrize("message", bad_calls())
def test_bad_input_is_named(message):
    with pytest.raises(KernelError, match=message):
        bad_calls()[message]()
