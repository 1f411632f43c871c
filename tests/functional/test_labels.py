# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What labels of logits mean: understood as transformers does, or refused."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from peft_linear.errors import KernelError, OutputError
from peft_linear.functional.labels import labels_of_logits, several_labels
from peft_linear.functional.outputs import Logits
from peft_linear.functional.simulation import one_hot_targets, simulate_training


CLASSES = torch.tensor([0, 2, 1, 1])
MULTI_HOT = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]])
ONE_HOT = F.one_hot(CLASSES, 3)
SEVERAL, REGRESSION = "multi_label_classification", "regression"


@pytest.mark.parametrize(
    ("labels", "outputs", "problem_type", "kept"),
    [
        (CLASSES, 3, None, CLASSES),
        (CLASSES[:, None], 3, None, CLASSES),
        (CLASSES.to(torch.int32), 3, "auto", CLASSES),
        (MULTI_HOT, 3, None, MULTI_HOT),
        (MULTI_HOT.float(), 3, "auto", MULTI_HOT),
        (ONE_HOT.float(), 3, "auto", ONE_HOT),
        (ONE_HOT, 3, SEVERAL, ONE_HOT),
        (CLASSES, 1, None, CLASSES.double()),
        (CLASSES[:, None], 1, "auto", CLASSES.double()),
        (CLASSES.float(), 1, REGRESSION, CLASSES.double()),
        (CLASSES % 2, 1, SEVERAL, (CLASSES % 2)[:, None]),
        (MULTI_HOT, 3, REGRESSION, MULTI_HOT.double()),
        (MULTI_HOT + 0.5, 3, None, MULTI_HOT + 0.5),
    ],
)
def test_labels_are_kept_as_classes_several_labels_or_targets(labels, outputs, problem_type, kept):
    found = labels_of_logits(labels, outputs, problem_type)
    assert found.dtype == (torch.float64 if kept.is_floating_point() else torch.int64)
    assert_close(found, kept.to(found.dtype))


@pytest.mark.parametrize(
    ("labels", "outputs", "problem_type", "message"),
    [
        (ONE_HOT, 3, None, r"either one class .* or several labels; pass labels.argmax\(1\)"),
        (MULTI_HOT, 2, None, r"labels of shape \(4, 3\) .* do not fit 2 logits"),
        (torch.zeros(4, 3, 3), 3, None, r"labels of shape \(4, 3, 3\) .* do not fit 3 logits"),
        (torch.tensor([0.0, torch.nan]), 1, None, "labels must be finite, got NaN or inf"),
        (CLASSES.float(), 3, None, r"one label an example must be integers \(4,\), got shape \(4,\)"),
        (MULTI_HOT, 3, "single_label_classification", "one label an example must be integers"),
        (CLASSES, 1, "single_label_classification", "one logit has no classes to choose between"),
        (CLASSES, 3, REGRESSION, "a regression with 3 outputs needs targets"),
        (CLASSES, 3, SEVERAL, r"several labels an example must be \(4, 3\) of 0 and 1"),
        (MULTI_HOT * 2, 3, SEVERAL, "of 0 and 1, got shape .* values from 0 to 2"),
        (
            MULTI_HOT * 0.3,
            3,
            "auto",
            "transformers' models would take them as several labels .*set .*'regression' for",
        ),
    ],
)
def test_labels_that_are_not_understood_are_refused(labels, outputs, problem_type, message):
    with pytest.raises(OutputError, match=message):
        labels_of_logits(labels, outputs, problem_type)


def test_the_error_of_several_labels_is_the_gradient_of_binary_cross_entropy():
    logits = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = F.binary_cross_entropy_with_logits(logits, MULTI_HOT.double())
    (expected,) = torch.autograd.grad(loss, logits)
    found = Logits().error(logits.detach(), MULTI_HOT) / len(MULTI_HOT)
    assert_close(found, expected, rtol=1e-12, atol=1e-15)
    assert_close(Logits().targets(logits.detach(), MULTI_HOT), MULTI_HOT.double())
    assert Logits().provides(MULTI_HOT) == {"residual", "error"}


def test_several_labels_are_not_trained_with_cross_entropy_of_one_class():
    assert several_labels(MULTI_HOT) and not several_labels(CLASSES) and not several_labels(MULTI_HOT.double())
    assert_close(one_hot_targets(MULTI_HOT, (4, 3)), MULTI_HOT.double())
    with pytest.raises(KernelError, match="cross-entropy takes one class an example; pass loss='squared'"):
        simulate_training(torch.eye(12).double(), torch.zeros(4, 3), MULTI_HOT, steps=2)
    curve = simulate_training(torch.eye(12).double(), torch.zeros(4, 3), MULTI_HOT, steps=2, loss="squared")
    assert curve.train_loss[-1] < curve.train_loss[0]
