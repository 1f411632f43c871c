# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Held-out loss of training simulated in kernel space, K-fold over examples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import KernelError, OutputError
from .problem import Problem


@dataclass(frozen=True)
class CrossValidation:
    """Means over all examples, each scored by the model that was not trained on it."""

    loss: float  # cross-entropy, nats
    accuracy: float


def fold_indices(labels: Tensor, folds: int, seed: int, order: Tensor | None = None) -> list[Tensor]:
    """Examples of each fold: random by `seed`, with every class spread over the folds as evenly as counts allow.

    Args:
        order: (N,) the examples as they are drawn from (`Problem.order`); default: as they are.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = shuffled if order is None else order[shuffled]
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    return [by_class[start::folds].sort().values for start in range(folds)]


def cross_validate(gram: Tensor, problem: Problem) -> CrossValidation:
    """Trains on each fold's complement in kernel space and scores the fold after the last step.

    Full-batch gradient descent on the mean cross-entropy of the linearised model, as `functional.simulate_training`
    runs it, for all folds in one matrix product a step: with coefficients `c` (folds, n) that stay 0 in the rows a
    fold holds out, `f = f_θ0 + c K` are the outputs of that fold's model on the examples it saw *and* on those it did
    not, and a step is `c ← c − (η/N_fold)·(softmax(f) − onehot(y))` in the rows it saw. O(steps·folds·n²).

    Args:
        gram: (n, n) float64, K_S.
        problem: With class labels; its `steps`, `learning_rate`, `folds` (at most N), `seed` and `key` are used.

    Raises:
        OutputError: the outputs are not labelled logits, or there is a single example.
        KernelError: the training diverges.
    """
    if "logits" not in problem.provides or problem.labels is None:
        raise OutputError("simulated training needs logits with class labels; pass batches that have labels")
    if problem.num_examples < 2:
        raise OutputError("cross-validation needs at least 2 examples, got 1; pass more batches")
    held_out = fold_indices(problem.labels, min(problem.folds, problem.num_examples), problem.seed, problem.order)
    examples, classes = problem.outputs.shape
    seen = torch.ones(len(held_out), examples, 1, dtype=torch.float64)
    for fold, held in enumerate(held_out):
        seen[fold, held] = 0.0
    rate = problem.learning_rate * seen / seen.sum(dim=1, keepdim=True)
    start, targets = problem.outputs.expand(len(held_out), -1, -1), problem.targets

    # Few rows times Kᵀ = K: times K, or K times few columns, takes up to three times as long on a CPU.
    coefficients = torch.zeros(len(held_out), examples, classes, dtype=torch.float64)
    rows, outputs = coefficients.view(len(held_out), -1), start.reshape(len(held_out), -1)
    constant = outputs.clone()
    for _ in range(problem.steps):
        coefficients -= (outputs.view_as(coefficients).softmax(dim=2) - targets).mul_(rate)
        outputs = torch.addmm(constant, rows, gram.mT)
    outputs = outputs.view_as(coefficients)
    if not bool(outputs.isfinite().all()):
        raise KernelError(f"the simulated training diverged (learning rate {problem.learning_rate:.3g}); lower it")
    fold_of = (1.0 - seen).squeeze(2).argmax(dim=0)
    unseen = outputs[fold_of, torch.arange(examples)]  # (N, C), each example by the fold that held it out
    return CrossValidation(
        loss=float(F.cross_entropy(unseen, problem.targets)),
        accuracy=float((unseen.argmax(dim=1) == problem.targets.argmax(dim=1)).double().mean()),
    )
