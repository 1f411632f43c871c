# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Predictions of the linear theory, before training, for a set of modules."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from ..functional.labels import several_labels
from ..functional.regression import dual_distance, leave_one_out_residuals, solve_ridge
from ..functional.simulation import simulate_training
from .criteria import View
from .cross_validation import cross_validate
from .problem import Problem


def predict(plain: View, names: Iterable[str], optimizer: View | None = None) -> dict[str, float]:
    """Predictions of linearised fine-tuning for `names` (and the always-trained parameters).

    Args:
        plain: Kernels and ridge of the regression.
        names: The set.
        optimizer: Kernels preconditioned by the optimizer, and the learning rate of the simulated training; default:
            `plain`.

    Returns:
        `parameters`: adapter parameters. With a target to regress to (kernel ridge regression with λ from θ0, the
        paper's linearised model, arXiv 2602.08239, section 4):
        `distance` = ‖θ̄*−θ0‖ = sqrt(αᵀKα) over all trained parameters, `adapter_distance` the same over the adapters
        alone, `training_squared_loss` = mean ‖y_i − f̄*(x_i)‖² and `leave_one_out_squared_loss` = mean
        ‖y_i − f̄_{−i}(x_i)‖². With class labels also `leave_one_out_accuracy`, and of gradient descent on the
        cross-entropy simulated in kernel space `loss` and `accuracy` (held out, cross-validated), `training_loss` and
        `training_accuracy` (trained on all examples).
    """
    names = tuple(names)
    kernels, problem = plain.kernels, plain.problem
    predicted: dict[str, float] = {"parameters": float(sum(kernels.num_parameters[name] for name in names))}
    if "logits" in problem.provides:
        assert problem.labels is not None
        optimizer = optimizer or plain
        training, gram = optimizer.problem, optimizer.kernels.subset(names)
        if problem.num_examples > 1:
            held_out = cross_validate(gram, training)
            predicted |= {"loss": held_out.loss, "accuracy": held_out.accuracy}
        curve = simulate_training(
            gram, problem.outputs, problem.labels, learning_rate=training.learning_rate, steps=training.steps
        )
        predicted["training_loss"] = float(curve.train_loss[-1])
        predicted["training_accuracy"] = float(curve.train_accuracy[-1])
    if "residual" in problem.provides:
        gram = kernels.subset(names)
        alpha = solve_ridge(gram, problem.residual, problem.ridge)
        left_out = leave_one_out_residuals(gram, problem.residual, problem.ridge, block_size=problem.num_outputs)
        predicted |= {
            "leave_one_out_squared_loss": float(left_out.square().sum()) / problem.num_examples,
            "training_squared_loss": float((problem.ridge * alpha).square().sum()) / problem.num_examples,
            "distance": dual_distance(gram, alpha),
            "adapter_distance": dual_distance(gram - kernels.base, alpha),
        }
        if "logits" in problem.provides:
            outputs = problem.targets - left_out.view_as(problem.targets)
            predicted["leave_one_out_accuracy"] = _accuracy(outputs, problem)
    return predicted


def before_training(problem: Problem) -> dict[str, float]:
    """Loss and accuracy of the model as it is, where the outputs determine them."""
    if "logits" in problem.provides:
        cross_entropy = float(F.cross_entropy(problem.outputs, problem.targets))
        return {"loss": cross_entropy, "accuracy": _accuracy(problem.outputs, problem)}
    if problem.labels is not None and several_labels(problem.labels):
        return {"loss": float(F.binary_cross_entropy_with_logits(problem.outputs, problem.targets))}
    loss = problem.output.mean_loss(problem.outputs, problem.labels)
    return {} if loss is None else {"loss": loss}


def _accuracy(outputs: torch.Tensor, problem: Problem) -> float:
    return float((outputs.argmax(dim=1) == problem.targets.argmax(dim=1)).double().mean())
