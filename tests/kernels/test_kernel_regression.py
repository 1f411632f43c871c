# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

from peft_linear.errors import KernelError, OutputError, TargetError
from peft_linear.functional.regression import select_ridge
from peft_linear.kernels.module_kernels import ModuleKernels
from peft_linear.kernels.regression import fit_kernel_regression
from tests.helpers.reference_linear import refit_without_each_example, ridge_solution


N, C = 6, 3


def planted(seed=0, base=True, **changes):
    generator = torch.Generator().manual_seed(seed)
    jacobians = {
        name: scale * torch.randn(N * C, 4, generator=generator, dtype=torch.float64)
        for name, scale in (("first", 1.0), ("second", 0.3), ("third", 2.0))
    }
    head = torch.randn(N * C, 2, generator=generator, dtype=torch.float64) * base
    values = {
        "blocks": {name: J @ J.T for name, J in jacobians.items()},
        "base": head @ head.T,
        "outputs": torch.randn(N, C, generator=generator, dtype=torch.float64),
        "labels": torch.arange(N) % C,
        "num_parameters": dict.fromkeys(jacobians, 4),
        "shapes": dict.fromkeys(jacobians, (2, 2)),
    }
    return ModuleKernels(**(values | changes)), jacobians | {"base": head}


@pytest.mark.parametrize("names", [None, ("third", "first")])
def test_the_solution_is_that_of_explicit_features(names):
    kernels, jacobians = planted()
    fit = fit_kernel_regression(kernels, ridge=0.7, names=names)
    chosen = [*(names or kernels.names), "base"]
    features = torch.cat([jacobians[name] for name in chosen], dim=1)
    targets = torch.eye(C, dtype=torch.float64)[kernels.labels]
    residual = (targets - kernels.outputs).reshape(-1)
    displacement = ridge_solution(features, residual, 0.7)
    assert_close(fit.predictions, kernels.outputs + (features @ displacement).view(N, C))
    assert_close(fit.residual, targets - fit.predictions)
    assert fit.distance == pytest.approx(float(displacement.norm()))
    left_out = refit_without_each_example(features, residual, 0.7, C).view(N, C)
    assert_close(fit.leave_one_out, targets - left_out)
    assert fit.leave_one_out_loss == pytest.approx(float(left_out.square().sum()) / (2 * N))
    assert fit.loss == pytest.approx(float((targets - fit.predictions).square().sum()) / (2 * N))
    assert fit.accuracy == pytest.approx(float((fit.predictions.argmax(1) == kernels.labels).double().mean()))
    correct = (fit.leave_one_out.argmax(1) == kernels.labels).double().mean()
    assert fit.leave_one_out_accuracy == pytest.approx(float(correct))
    assert fit.names == tuple(names or kernels.names)
    widths = [jacobians[name].shape[1] for name in chosen]
    for name, part in zip(chosen, displacement.split(widths), strict=True):
        assert fit.distances[name] == pytest.approx(float(part.norm()))
    assert math.hypot(*fit.distances.values()) == pytest.approx(fit.distance)


def test_predicting_the_training_examples_gives_the_predictions():
    kernels, _ = planted()
    fit = fit_kernel_regression(kernels, ridge=0.5)
    assert_close(fit.predict(kernels.subset(), kernels.outputs), fit.predictions)


def test_large_ridge_predicts_the_start_and_small_ridge_the_targets():
    kernels, _ = planted()
    assert_close(fit_kernel_regression(kernels, ridge=1e12).predictions, kernels.outputs, rtol=1e-8, atol=1e-8)
    full = {name: block + torch.eye(N * C, dtype=torch.float64) for name, block in kernels.blocks.items()}
    fit = fit_kernel_regression(dataclasses.replace(kernels, blocks=full), ridge=1e-12)
    assert_close(fit.predictions, fit.targets, rtol=1e-8, atol=1e-8)
    assert fit.accuracy == 1.0


def test_default_ridge_is_the_one_that_leaves_the_least_error():
    kernels, jacobians = planted()
    generator = torch.Generator().manual_seed(1)
    learnable = jacobians["third"].sum(dim=1) + torch.randn(N * C, generator=generator, dtype=torch.float64)
    targets = kernels.outputs + learnable.view(N, C)
    fit = fit_kernel_regression(kernels, targets)
    assert fit.ridge == select_ridge(kernels.subset(), learnable, C)
    for factor in (1e-3, 1e3):
        worse = fit_kernel_regression(kernels, targets, ridge=fit.ridge * factor)
        assert fit.leave_one_out_loss < worse.leave_one_out_loss


def test_explicit_targets_and_other_labels():
    kernels, _ = planted()
    one_hot = torch.eye(C, dtype=torch.float64)[kernels.labels]
    by_targets = fit_kernel_regression(kernels, one_hot, ridge=1.0)
    assert_close(by_targets.alpha, fit_kernel_regression(kernels, ridge=1.0).alpha)
    assert by_targets.accuracy is None and by_targets.leave_one_out_accuracy is None
    other = fit_kernel_regression(kernels, [2, 1, 0, 2, 1, 0], ridge=1.0)
    assert other.labels.tolist() == [2, 1, 0, 2, 1, 0]
    assert not torch.allclose(other.alpha, by_targets.alpha)
    margins = dataclasses.replace(kernels, output_kind="margin")
    assert_close(fit_kernel_regression(margins, one_hot, ridge=1.0).alpha, by_targets.alpha)


def test_without_a_head_there_is_no_base_distance_and_a_name_may_be_a_string():
    kernels, _ = planted(base=False)
    fit = fit_kernel_regression(kernels, ridge=1.0, names="third")
    assert dict(fit.distances) == {"third": pytest.approx(fit.distance)}


def test_it_says_what_it_is_and_cannot_be_changed():
    fit = fit_kernel_regression(planted()[0], ridge=0.25)
    for text in ("3 modules", "6 examples", "ridge=0.25", "leave-one-out", "accuracy", "distance"):
        assert text in repr(fit)
    with pytest.raises(dataclasses.FrozenInstanceError):
        fit.ridge = 1.0
    with pytest.raises(TypeError):
        fit.distances["first"] = 1.0


@pytest.mark.parametrize(
    ("error", "message", "changes", "arguments"),
    [
        (OutputError, "hold no labels", {"labels": None}, {}),
        (OutputError, "targets of logits only", {"output_kind": "margin"}, {}),
        (OutputError, "no classes of 3 outputs", {"labels": torch.arange(N)}, {}),
        (OutputError, "float labels must be targets", {}, {"labels": torch.ones(N, 2)}),
        (KernelError, "ridge must be a number >= 0", {}, {"ridge": -1.0}),
        (KernelError, "not positive definite", {}, {"ridge": 0.0, "names": ("first",)}),
        (TargetError, "no kernel of a module 'fourth'", {}, {"names": ("fourth",)}),
    ],
)
def test_bad_input_is_named(error, message, changes, arguments):
    with pytest.raises(error, match=message):
        fit_kernel_regression(planted(**changes)[0], **arguments)
