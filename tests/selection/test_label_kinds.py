# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Labels of every kind reach the criterion, or are refused; a criterion that falls back says so."""

import pytest
import torch
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification

from peft_linear import compute_ntk, fit_kernel_regression, recommend_modules
from peft_linear.errors import OutputError
from peft_linear.selection.problem import Problem
from tests.helpers.architectures import TOKENS, WIDTH


MULTI_HOT = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]])


def bert(num_labels=3, problem_type=None):
    torch.manual_seed(0)
    config = BertConfig(**{**TOKENS, **WIDTH, "num_labels": num_labels, "problem_type": problem_type})
    return BertForSequenceClassification(config).double().eval()


def batches(labels, count=2, **more):
    """`count` batches of four examples with the same labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (4 * count, 6), generator=generator)
    return [{"input_ids": part, **({} if labels is None else {"labels": labels}), **more} for part in ids.split(4)]


def choose(labels, model=None, **options):
    return recommend_modules(model or bert(), batches(labels), 2, progress=False, **options)


@pytest.mark.parametrize(
    ("labels", "num_labels", "problem_type", "factor"),
    [
        (torch.tensor([0, 2, 1, 1]), 3, None, 1.0),
        (MULTI_HOT.double(), 3, None, 1.0),
        (MULTI_HOT.double() * 0.5, 3, "regression", 2 / 3),  # transformers has the mean over outputs of (f − y)²
        (torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64), 1, None, 2.0),
    ],
)
def test_the_error_at_the_start_is_the_gradient_of_the_models_own_loss(labels, num_labels, problem_type, factor):
    model = bert(num_labels, problem_type)
    kernels = compute_ntk(model, batches(labels, 1), targets=["query"], progress=False)
    problem = Problem.of(kernels, ridge=1.0)
    batch = batches(labels, 1)[0]
    output = model(**batch)
    (expected,) = torch.autograd.grad(output.loss, output.logits)
    assert_close(factor * problem.error.view(4, num_labels), expected, rtol=1e-9, atol=1e-12)


def test_labels_in_a_column_are_the_same_as_in_a_row():
    labels = torch.tensor([0, 2, 1, 1])
    row, column = choose(labels), choose(labels[:, None])
    assert (row.modules, row.criterion) == (column.modules, column.criterion)
    assert row.criterion == "gradient_energy"


def test_integer_labels_of_one_output_are_a_regression():
    integers = choose(torch.tensor([0, 2, 1, 1]), bert(1))
    floats = choose(torch.tensor([0.0, 2.0, 1.0, 1.0]), bert(1))
    assert integers.scores == floats.scores and integers.criterion == "leave_one_out"


def test_a_model_with_several_labels_is_recommended_for_by_its_labels_and_a_note_names_the_criterion():
    rec = choose(MULTI_HOT.double())
    assert rec.criterion == "leave_one_out"
    assert any("logits with several labels an example the default criterion is leave-one-out" in n for n in rec.notes)
    other = choose(1 - MULTI_HOT.double())
    assert [row.score for row in rec.scores] != [row.score for row in other.scores]
    assert rec.predicted["before_training"]["loss"] == pytest.approx(0.693, abs=0.2)
    energy = choose(MULTI_HOT.double(), criterion="gradient_energy")
    assert energy.criterion == "gradient_energy" and not any("default criterion" in n for n in energy.notes)


def test_without_labels_a_note_says_that_the_criterion_does_not_know_the_task():
    rec = choose(None)
    assert rec.criterion == "trace"
    assert any("Logits without labels say nothing of a loss, so the criterion is the trace" in n for n in rec.notes)


def test_class_labels_have_no_note_on_the_criterion():
    notes = choose(torch.tensor([0, 2, 1, 1])).notes
    assert not any("criterion is" in note for note in notes)


def test_kernel_regression_aims_at_several_labels():
    kernels = compute_ntk(bert(), batches(MULTI_HOT.double(), 1), targets=["query"], progress=False)
    fit = fit_kernel_regression(kernels)
    assert_close(fit.targets, MULTI_HOT.double())
    assert fit.accuracy is None


def test_one_batch_without_labels_is_refused():
    given = batches(torch.tensor([0, 2, 1, 1]), 4)
    del given[2]["labels"]
    with pytest.raises(OutputError, match="batch 2 has no labels, and batch 0 has; label all examples"):
        recommend_modules(bert(), given, 2, progress=False)


def test_labels_that_only_add_up_to_the_examples_are_refused():
    given = batches(torch.tensor([0, 2, 1, 1]))
    given[0]["labels"], given[1]["labels"] = torch.tensor([0, 2, 1]), torch.tensor([0, 2, 1, 1, 0])
    with pytest.raises(OutputError, match=r"batch 0 has labels of shape \(3,\) for 4 examples"):
        recommend_modules(bert(), given, 2, progress=False)


def test_labels_of_different_kinds_are_refused():
    given = batches(torch.tensor([0, 2, 1, 1]))
    given[1]["labels"] = MULTI_HOT
    with pytest.raises(OutputError, match=r"labels are not alike in all batches: \(4, 3\).*; \(4,\)"):
        recommend_modules(bert(), given, 2, progress=False)


@pytest.mark.parametrize("key", ["target", "targets", "y"])
def test_labels_under_another_name_are_refused(key):
    with pytest.raises(OutputError, match=f"batch 0 has '{key}', which BertFor.* rename it to 'labels'"):
        recommend_modules(bert(), batches(None, **{key: torch.arange(4) % 3}), 2, progress=False)


def test_label_ids_are_labels():
    given = batches(None, label_ids=torch.tensor([0, 2, 1, 1]))
    assert recommend_modules(bert(), given, 2, progress=False).criterion == "gradient_energy"


@pytest.mark.parametrize("labels", [["good", "bad", "good", "bad"], [[0], [1, 2], [0], []]])
def test_labels_that_are_no_numbers_are_refused(labels):
    with pytest.raises(OutputError, match="the labels of batch 0 are no numbers .*label2id"):
        choose(labels)


def test_steps_of_the_head_are_refused_without_class_labels():
    with pytest.raises(OutputError, match="head_steps=3 trains the head on class labels, and these are logits with "):
        choose(MULTI_HOT.double(), head_steps=3, criterion="gradient_energy")


def test_a_single_label_for_a_batch_is_refused_before_any_pass():
    with pytest.raises(OutputError, match=r"batch 0 has labels of shape \(\) for 4 examples; pass one label"):
        choose(torch.tensor(1))


def test_labels_in_a_sparse_tensor_are_the_same():
    assert choose(MULTI_HOT.double().to_sparse()).modules == choose(MULTI_HOT.double()).modules


def test_examples_that_training_ignores_are_to_be_left_out():
    with pytest.raises(OutputError, match="got values from -100 to 2; leave out the examples that have none"):
        choose(torch.tensor([-100, 0, 1, 2]))
