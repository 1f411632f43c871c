# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

from peft_linear.capture.linearize import LinearizedModel, linearize
from peft_linear.capture.ntk import compute_ntk
from peft_linear.errors import OutputError, TargetError
from peft_linear.functional.regression import dual_distance, solve_ridge
from peft_linear.kernels.regression import fit_kernel_regression
from tests.helpers.linear_models import (
    assert_same,
    build,
    dense_jacobian,
    flat,
    moved,
    plain,
    snapshot,
    with_adapter,
)
from tests.helpers.small_models import bert, text_batches


def test_training_the_linear_model_trains_only_its_own_parameters():
    model, linearized, batch = build("bert")
    names = [name.replace("/", ".").removeprefix("theta.") for name, _ in linearized.named_parameters()]
    assert tuple(names) == linearized.names == tuple(n for n, p in model.named_parameters() if p.requires_grad)
    assert any("modules_to_save" in name for name in names)
    before = snapshot(model)
    optimizer = torch.optim.SGD(linearized.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = linearized(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert_same(before, snapshot(model))


def test_the_start_is_kept_when_the_wrapped_model_is_fine_tuned():
    model, linearized, batch = build("bert")
    before = linearized(**batch).logits.detach()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3
    assert_close(linearized(**batch).logits, before, rtol=0, atol=0)


def test_gradients_of_gradients_are_refused():
    _, linearized, batch = build("custom")
    (gradient, *_) = torch.autograd.grad(
        linearized(**batch).square().sum(), list(linearized.parameters()), create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_frozen_parameter_gets_no_gradient_and_single_precision_works():
    model = with_adapter(bert).float()
    linearized = moved(linearize(model))
    frozen, *rest = linearized.parameters()
    frozen.requires_grad_(False)
    linearized(**text_batches()[0]).loss.backward()
    assert frozen.grad is None and all(parameter.grad is not None for parameter in rest)
    assert linearized(**text_batches()[0]).logits.dtype == torch.float32


def test_parameters_go_to_a_file_a_real_model_and_back(tmp_path):
    model, linearized, batch = build("bert")
    other = linearize(model)
    assert other.distance() == 0 and linearized.distance() > 0
    other.load_state_dict(linearized.state_dict())
    assert_close(other(**batch).logits, linearized(**batch).logits, rtol=0, atol=0)

    twin = with_adapter(bert)
    assert linearized.to_adapter(twin) is twin
    for name, value in linearized.adapter_state_dict().items():
        assert torch.equal(twin.get_parameter(name), value)
    again = linearize(model).load_parameters_from(twin)
    assert again.distance() == linearized.distance()
    expected = functional_call(model, linearized.adapter_state_dict(), (), batch).logits
    assert linearized.to_adapter() is model
    assert_close(model(**batch).logits, expected, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_a_copy_is_independent():
    _, linearized, batch = build("bert")
    before = linearized(**batch).logits.detach()
    copied = copy.deepcopy(linearized)
    moved(copied, 1.0)
    assert_close(linearized(**batch).logits, before, rtol=0, atol=0)
    assert not torch.allclose(copied(**batch).logits, before)
    assert copied.wrapped is not linearized.wrapped


def test_it_says_what_it_is_and_moves_with_its_model():
    model, linearized, batch = build("bert")
    assert float(linearized.squared_distance()) == pytest.approx(linearized.distance() ** 2)
    assert linearized.distance() == pytest.approx(float(flat(linearized.displacement()).norm()))
    assert repr(linearized).startswith("LinearizedModel(BertForSequenceClassification, ")
    assert linearized.config is model.config
    linearized.float()
    assert linearized(**batch).logits.dtype == torch.float32
    assert all(not key.startswith("wrapped") for key in linearized.state_dict())


def dense_problem(ridge_over_largest=0.2):
    """A model, its whole batch, the Jacobian, the residual of one-hot targets and a ridge that converges quickly."""
    model = with_adapter(bert)
    linearized = linearize(model)
    batch = text_batches(sizes=(4,))[0]
    jacobian = dense_jacobian(model, linearized, plain([batch])[0])
    targets = F.one_hot(batch["labels"], 3).double()
    residual = (targets - model(**batch).logits.detach()).reshape(-1)
    gram = jacobian @ jacobian.T
    largest = float(torch.linalg.eigvalsh(gram)[-1])
    return model, linearized, batch, jacobian, targets, residual, gram, largest, ridge_over_largest * largest


def test_gradient_descent_with_the_proximal_term_converges_to_the_closed_form():
    # Σ_i ½‖f̄(x_i) − y_i‖² + (λ/2)‖θ−θ0‖², the loss scale of solve_ridge.
    _, linearized, batch, jacobian, targets, residual, gram, largest, ridge = dense_problem()
    alpha = solve_ridge(gram, residual, ridge)
    optimizer = torch.optim.SGD(linearized.parameters(), lr=2 / (largest + 2 * ridge))
    for _ in range(60):
        optimizer.zero_grad()
        outputs = linearized(**plain([batch])[0]).logits
        (0.5 * (outputs - targets).square().sum() + 0.5 * ridge * linearized.squared_distance()).backward()
        optimizer.step()
    outputs = linearized(**plain([batch])[0]).logits.detach()
    assert_close(outputs, targets - ridge * alpha.view_as(targets), rtol=1e-6, atol=1e-7)
    expected = jacobian.T @ alpha
    error = (flat(linearized.displacement()) - expected).norm() / expected.norm()
    assert error < 1e-6
    assert linearized.distance() == pytest.approx(dual_distance(gram, alpha), rel=1e-6)


def test_dual_coefficients_become_an_adapter():
    model, linearized, batch, jacobian, targets, residual, gram, _, ridge = dense_problem()
    alpha = solve_ridge(gram, residual, ridge).view_as(targets)
    halves = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 3), slice(3, 4))]
    assert linearized.load_dual_coefficients(alpha, halves) is linearized
    assert_close(flat(linearized.displacement()), jacobian.T @ alpha.reshape(-1), rtol=1e-9, atol=1e-10)
    assert_close(linearized(**batch).logits, targets - ridge * alpha, rtol=1e-9, atol=1e-10)

    # The real model at θ0 + tJᵀα is the linear one up to O(t²).
    origin = model(**batch).logits.detach()
    gaps = []
    for t in (1e-2, 5e-3):
        real = linearize(model).load_dual_coefficients(t * alpha, [batch]).to_adapter(with_adapter(bert))
        gaps.append((real(**batch).logits - origin - t * (gram @ alpha.reshape(-1)).view_as(origin)).norm().item())
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.1)


def test_kernels_of_an_adapter_are_solved_into_that_adapter():
    model = with_adapter(bert)
    batches = text_batches(sizes=(3, 2))
    kernels = compute_ntk(model, batches, progress=False)
    fit = fit_kernel_regression(kernels, ridge=float(kernels.spectrum().eigenvalues[0]) / 10)
    solved = linearize(model).load_dual_coefficients(fit.alpha, batches)
    with torch.no_grad():
        outputs = torch.cat([solved(**batch).logits for batch in batches])
    assert_close(outputs, fit.predictions, rtol=1e-8, atol=1e-8)
    assert solved.distance() == pytest.approx(fit.distance, rel=1e-8)


def test_a_model_without_trainable_parameters_is_refused():
    model, _, _ = build("bert")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(TargetError, match="no parameter of PeftModel requires a gradient"):
        linearize(model)


BAD_INPUT = [
    (lambda m, _: m.load_parameters_from({}), TargetError, "parameters are missing, first 'base_model"),
    (lambda m, _: m.to_adapter(nn.Linear(2, 2)), TargetError, "parameters are missing"),
    (
        lambda m, _: m.load_parameters_from(with_adapter(bert, rank=4)),
        TargetError,
        r"has shape \(4, 16\), expected \(2, 16\)",
    ),
    (
        lambda m, batch: m.load_dual_coefficients(torch.ones(4, 3), [batch]),
        OutputError,
        "N=3 examples, got shape .4, 3.",
    ),
    (
        lambda m, batch: m.load_dual_coefficients(torch.ones(3, 2), [batch]),
        OutputError,
        "alpha has 2 columns for 3 outputs",
    ),
]


@pytest.mark.parametrize("call, error, message", BAD_INPUT)
def test_bad_input_is_named(call, error, message):
    _, linearized, batch = build("bert")
    with pytest.raises(error, match=message):
        call(linearized, batch)


def test_linearize_is_the_class():
    assert isinstance(linearize(with_adapter(bert)), LinearizedModel)
