# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A new kind of output is one class: kernels, files, criteria and recommendations then take its name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.testing import assert_close

from peft_linear import ModuleKernels, recommend, recommend_modules
from peft_linear.capture.features import jacobian_features
from peft_linear.errors import FileError, OutputError
from peft_linear.functional.outputs import LOSS, OUTPUTS, Output, label_columns, register_output
from peft_linear.selection.criteria import applicable_criteria
from peft_linear.selection.problem import Problem
from tests import reference
from tests.helpers import small_models as small
from tests.helpers.kernels import ntk


EXACT = {"rtol": 1e-10, "atol": 1e-12}
VALUE = "bert.encoder.layer.0.attention.self.value"


@dataclass(frozen=True)
class Power(Output):
    """The label's probability to some power, f = p_y^power. Its loss is 1 − f."""

    name = "power"
    with_labels = LOSS
    target = 1.0

    power: float = 1.0

    def of_classes(self, logits, labels):
        return logits.softmax(1).gather(1, label_columns(self.name, logits, labels)) ** self.power

    def error(self, outputs, labels):
        return torch.full_like(outputs, -1.0)


@pytest.fixture(autouse=True)
def registered():
    register_output(Power)
    yield
    del OUTPUTS["power"]


def reference_kernel(model, power, batches):
    def output(model, batch):
        scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0]
        return scores.softmax(0)[batch["labels"][0]][None] ** power

    weight = model.get_submodule(VALUE).weight
    return reference.kernel(model, [weight], batches, output)


@pytest.mark.parametrize("outputs, power", [("power", 1.0), (Power(2.0), 2.0)])
def test_its_kernels_are_exact_by_name_and_as_an_object(outputs, power):
    model, batches = small.seeded(small.bert), small.text_batches()
    kernels = ntk(model, batches, targets=["value"], space="weight", outputs=outputs)
    assert kernels.output_kind == "power"
    assert_close(kernels[VALUE], reference_kernel(model, power, batches), **EXACT)


def test_its_features_have_the_same_gram_matrix():
    model, batches = small.seeded(small.bert), small.text_batches()
    features = jacobian_features(model, batches, ["value"], outputs="power", progress=False)
    kernels = ntk(model, batches, targets=["value"], outputs="power")
    assert_close(features.subset(VALUE).gram(), kernels.base + kernels[VALUE], **EXACT)


def test_it_is_saved_and_its_settings_identify_a_run(tmp_path):
    model, batches = small.seeded(small.bert), small.text_batches()
    ntk(model, batches, targets=["value"], outputs=Power(2.0), folder=tmp_path / "run")
    assert ModuleKernels.load(tmp_path / "run").output_kind == "power"
    with pytest.raises(FileError, match="differs in argument power .2.0 there, 3.0 here."):
        ntk(model, batches, targets=["value"], outputs=Power(3.0), folder=tmp_path / "run")


def test_criteria_ask_it_what_it_provides():
    model, batches = small.seeded(small.bert), small.text_batches()
    kernels = ntk(model, batches, outputs="power")
    problem = Problem.of(kernels, ridge=0.1)
    assert {"gradient_energy", "leave_one_out"} <= set(applicable_criteria(problem))
    assert "predicted_loss" not in applicable_criteria(problem)
    assert_close(problem.residual, 1 - kernels.outputs[:, 0])
    assert_close(problem.error, torch.full((5,), -1 / 5, dtype=torch.float64))


def test_modules_are_recommended_with_it():
    model, batches = small.seeded(small.bert), small.text_batches()
    rec = recommend_modules(model, batches, 2, outputs="power", progress=False)
    kernels = ntk(model, batches, outputs="power")
    assert rec.modules == recommend(kernels, 2).modules
    assert rec.settings.output_kind == "power"


def test_batches_without_the_labels_that_it_needs_are_refused():
    batches = [{key: value for key, value in batch.items() if key != "labels"} for batch in small.text_batches()]
    with pytest.raises(OutputError, match="batch 0 has no labels, which outputs='power' needs"):
        ntk(small.seeded(small.bert), batches, outputs="power")
