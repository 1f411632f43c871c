# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Every criterion against its formula written out by other means, and on kernels whose right answer is planted."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from peft_linear.errors import CriterionError, KernelError, OutputError
from peft_linear.functional.outputs import OUTPUTS
from peft_linear.functional.simulation import simulate_training
from peft_linear.selection.criteria import (
    CRITERIA,
    DEFAULT_CRITERION,
    DEFAULT_NAME,
    View,
    applicable_criteria,
    resolve_criterion,
    score_modules,
)
from peft_linear.selection.cross_validation import cross_validate, fold_indices
from peft_linear.selection.problem import Problem
from tests.helpers.planted import planted_kernels


RIDGE = 0.3
LABELLED = ("gradient_energy", "alignment", "leave_one_out", "risk_reduction", "predicted_loss")


@pytest.fixture(scope="module")
def kernels():
    return planted_kernels()


@pytest.fixture(scope="module")
def problem(kernels):
    return Problem.of(kernels, RIDGE, learning_rate=0.5, steps=30)


def twins(gram, problem):
    """The formulas again, with numpy and loops."""
    k = gram.numpy()
    n = len(k)
    shifted = k + problem.ridge * np.eye(n)
    values = np.linalg.eigvalsh(k)
    r0, f0 = problem.residual.numpy(), problem.outputs.numpy()
    y = np.eye(f0.shape[1])[problem.labels.numpy()]
    p = np.exp(f0) / np.exp(f0).sum(1, keepdims=True)
    e = ((p - y) / len(y)).reshape(-1)
    left_out = 0.0
    for i in range(len(y)):
        rows = np.arange(i * y.shape[1], (i + 1) * y.shape[1])
        rest = np.setdiff1d(np.arange(n), rows)
        fitted = k[np.ix_(rows, rest)] @ np.linalg.solve(shifted[np.ix_(rest, rest)], r0[rest])
        left_out += ((r0[rows] - fitted) ** 2).sum() / len(y)
    return {
        "condition_number": (values[-1] + problem.ridge) / (max(values[0], 0) + problem.ridge),
        "trace": np.trace(k),
        "gradient_energy": e @ k @ e,
        "effective_dimension": np.trace(np.linalg.solve(shifted, k)),
        "effective_rank": np.trace(k) ** 2 / (k**2).sum(),
        "alignment": r0 @ k @ r0 / (np.linalg.norm(k) * (r0 @ r0)),
        "leave_one_out": left_out,
        "risk_reduction": 1 - problem.ridge * (r0 @ np.linalg.solve(shifted, r0)) / (r0 @ r0),
    }


@pytest.mark.parametrize("names", [[2], [0], [1, 2, 5]])
def test_formulas(kernels, problem, names):
    gram = kernels.subset([kernels.names[i] for i in names])
    for name, expected in twins(gram, problem).items():
        assert CRITERIA[name](gram, problem) == pytest.approx(expected, rel=1e-9), name
    assert set(twins(gram, problem)) | {"predicted_loss"} == set(CRITERIA)


@pytest.mark.parametrize("name", LABELLED)
def test_planted_modules_come_first_and_the_reversed_ranking_is_wrong(kernels, problem, name):
    criterion = CRITERIA[name]
    scores = score_modules(View(kernels, problem), criterion)
    ranked = sorted(scores, key=lambda module: -criterion.utility(scores[module]))
    planted = {kernels.names[2], kernels.names[5]}
    assert set(ranked[:2]) == planted
    assert not set(ranked[::-1][:2]) & planted


@pytest.mark.parametrize("name", ["trace", "gradient_energy"])
def test_additive_criteria_add(kernels, problem, name):
    criterion = CRITERIA[name]
    assert criterion.additive
    start = criterion(kernels.base, problem)
    singles = score_modules(View(kernels, problem), criterion)
    chosen = kernels.names[1:4]
    total = start + sum(singles[module] - start for module in chosen)
    assert criterion(kernels.subset(chosen), problem) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("name", [name for name, c in CRITERIA.items() if not c.additive])
def test_the_others_do_not_add(kernels, problem, name):
    criterion = CRITERIA[name]
    start = criterion(kernels.base, problem)
    singles = score_modules(View(kernels, problem), criterion)
    chosen = kernels.names[1:4]
    total = start + sum(singles[module] - start for module in chosen)
    assert criterion(kernels.subset(chosen), problem) != pytest.approx(total, rel=1e-3)


def test_risk_reduction_never_falls_when_a_module_is_added(kernels, problem):
    values = [CRITERIA["risk_reduction"](kernels.subset(kernels.names[:i]), problem) for i in range(9)]
    assert values == sorted(values)
    assert 0 <= values[0] < values[-1] < 1


def test_gradient_energy_is_the_slope_of_the_loss_in_kernel_space(kernels, problem):
    gram = kernels.subset()
    rate = 1e-6
    curve = simulate_training(gram, kernels.outputs, kernels.labels, learning_rate=rate, steps=1)
    slope = float(curve.train_loss[0] - curve.train_loss[1]) / rate
    assert CRITERIA["gradient_energy"](gram, problem) == pytest.approx(slope, rel=1e-4)


def test_cross_validation_is_training_without_the_fold(kernels, problem):
    gram = kernels.subset(kernels.names[:3])
    loss = accuracy = 0.0
    everyone = torch.arange(kernels.num_examples)
    for held in fold_indices(kernels.labels, problem.folds, problem.seed, problem.order):
        part = kernels.select_examples(torch.tensor([i for i in everyone.tolist() if i not in held.tolist()]))
        both = kernels.select_examples([*held.tolist(), *[i for i in everyone.tolist() if i not in held.tolist()]])
        rows = len(held) * kernels.num_outputs
        curve = simulate_training(
            part.subset(kernels.names[:3]),
            part.outputs,
            part.labels,
            learning_rate=problem.learning_rate,
            steps=problem.steps,
            held_out=(
                both.subset(kernels.names[:3])[:rows, rows:],
                kernels.outputs[held],
                kernels.labels[held],
            ),
        )
        loss += float(curve.held_out_loss[-1]) * len(held) / kernels.num_examples
        accuracy += float(curve.held_out_accuracy[-1]) * len(held) / kernels.num_examples
    found = cross_validate(gram, problem)
    assert found.loss == pytest.approx(loss, rel=1e-10)
    assert found.accuracy == pytest.approx(accuracy, abs=1e-12)
    assert CRITERIA["predicted_loss"](gram, problem) == found.loss


def test_folds_part_the_examples_and_spread_the_classes():
    labels = torch.tensor([0] * 8 + [1] * 4 + [2] * 5)
    folds = fold_indices(labels, 4, seed=3)
    assert sorted(i for fold in folds for i in fold.tolist()) == list(range(17))
    for fold in folds:
        assert [(labels[fold] == c).sum().item() for c in (0, 1)] == [2, 1]
    assert [f.tolist() for f in folds] == [f.tolist() for f in fold_indices(labels, 4, seed=3)]
    assert [f.tolist() for f in folds] != [f.tolist() for f in fold_indices(labels, 4, seed=4)]


def test_more_folds_than_examples_leave_one_out(kernels):
    few = kernels.select_examples([0, 1, 2])
    many = Problem.of(few, RIDGE, folds=50)
    assert math.isfinite(cross_validate(few.subset(), many).loss)


def test_cross_validation_refuses(kernels):
    one = kernels.select_examples([0])
    with pytest.raises(OutputError, match="needs at least 2 examples, got 1"):
        cross_validate(one.subset(), Problem.of(one, RIDGE))
    with pytest.raises(OutputError, match="needs logits with class labels"):
        cross_validate(kernels.subset(), Problem.of(replace(kernels, labels=None), RIDGE))
    with pytest.raises(KernelError, match=r"training diverged \(learning rate inf\)"):
        cross_validate(kernels.subset(), Problem.of(kernels, RIDGE, learning_rate=math.inf))


def test_zero_kernel_and_zero_residual(kernels, problem):
    zero = torch.zeros_like(kernels.base)
    assert CRITERIA["effective_rank"](zero, problem) == 0
    assert CRITERIA["alignment"](zero, problem) == 0
    assert CRITERIA["risk_reduction"](zero, problem) == pytest.approx(0)
    solved = Problem(torch.eye(3, dtype=torch.float64), torch.arange(3), "logits", RIDGE)
    assert CRITERIA["risk_reduction"](torch.eye(9, dtype=torch.float64), solved) == 0


@pytest.mark.parametrize(
    ("kind", "value", "residual", "error"),
    [
        ("log_likelihood", -2.0, 2.0, -0.5),
        ("loss", 2.0, -2.0, 0.5),
        ("margin", 0.0, 1.0, -0.25),
    ],
)
def test_targets_and_errors_of_single_outputs(kind, value, residual, error):
    problem = Problem(torch.full((2, 1), value, dtype=torch.float64), torch.tensor([0, 1]), kind, RIDGE)
    assert problem.residual.tolist() == [residual] * 2
    assert problem.error.tolist() == [error] * 2


@pytest.mark.parametrize("kind", ["log_likelihood", "loss", "margin", "logits"])
def test_the_error_is_the_gradient_of_the_mean_loss(kind):
    generator = torch.Generator().manual_seed(0)
    shape = (4, 3) if kind == "logits" else (4, 1)
    outputs = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.tensor([0, 2, 1, 1])
    losses = {
        "log_likelihood": lambda f: -f.mean(),
        "loss": lambda f: f.mean(),
        "margin": lambda f: torch.nn.functional.softplus(-f).mean(),
        "logits": lambda f: torch.nn.functional.cross_entropy(f, labels),
    }
    (expected,) = torch.autograd.grad(losses[kind](outputs), outputs)
    problem = Problem(outputs.detach(), labels, kind, RIDGE)
    torch.testing.assert_close(problem.error, expected.reshape(-1))


def test_float_labels_are_a_regression():
    problem = Problem(torch.zeros(3, 1, dtype=torch.float64), torch.tensor([1.0, 2.0, 4.0]), "logits", RIDGE)
    assert problem.residual.tolist() == [1.0, 2.0, 4.0]
    torch.testing.assert_close(problem.error, -torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64) / 3)
    assert "predicted_loss" not in applicable_criteria(problem)
    assert "leave_one_out" in applicable_criteria(problem)


def test_labels_that_are_no_classes(kernels):
    problem = Problem.of(replace(kernels, labels=kernels.labels + 7), RIDGE)
    with pytest.raises(OutputError, match="labels do not belong to their logits"):
        _ = problem.residual


def test_outputs_without_target_or_loss(kernels):
    problem = Problem.of(replace(kernels, output_kind="random_projection"), RIDGE)
    with pytest.raises(OutputError, match="outputs of kind 'random_projection' have no target"):
        _ = problem.targets
    with pytest.raises(OutputError, match="outputs of kind 'random_projection' do not determine a loss"):
        _ = problem.error


def test_which_criteria_apply(kernels):
    blind = {"condition_number", "trace", "effective_dimension", "effective_rank"}
    assert set(applicable_criteria(Problem.of(kernels, RIDGE))) == set(CRITERIA)
    assert set(applicable_criteria(Problem.of(replace(kernels, labels=None), RIDGE))) == blind
    for kind in ("label_logit", "random_projection", "something new"):
        assert set(applicable_criteria(Problem.of(replace(kernels, output_kind=kind), RIDGE))) == blind
    likelihood = planted_kernels(output_kind="log_likelihood")
    assert set(applicable_criteria(Problem.of(likelihood, RIDGE))) == set(CRITERIA) - {"predicted_loss"}


def test_resolving_names(kernels):
    problem = Problem.of(kernels, RIDGE)
    assert resolve_criterion(DEFAULT_NAME, problem).name == DEFAULT_CRITERION
    likelihood = Problem.of(planted_kernels(output_kind="log_likelihood"), RIDGE)
    assert resolve_criterion(DEFAULT_NAME, likelihood).name == "leave_one_out"
    with pytest.raises(CriterionError, match="unknown criterion 'kappa'; there are: default-by-evidence, condition_n"):
        resolve_criterion("kappa", problem)
    unlabelled = Problem.of(replace(kernels, labels=None), RIDGE)
    assert resolve_criterion(DEFAULT_NAME, unlabelled).name == "trace"
    with pytest.raises(
        OutputError, match="'leave_one_out' cannot be computed from logits without labels.* allow: cond"
    ):
        resolve_criterion("leave_one_out", unlabelled)
    with pytest.raises(OutputError, match="'predicted_loss' cannot be computed from outputs of kind 'log_likelihood'"):
        resolve_criterion("predicted_loss", likelihood)


def test_every_criterion_says_what_it_is():
    kinds = {need for kind in OUTPUTS.values() for need in kind.with_labels} | {"kernel"}
    for name, criterion in CRITERIA.items():
        assert criterion.name == name
        assert criterion.needs in kinds
        assert criterion.formula
        assert criterion.function.__doc__ and "better" in criterion.function.__doc__
        assert ("higher is better" in criterion.function.__doc__) == criterion.higher_is_better
