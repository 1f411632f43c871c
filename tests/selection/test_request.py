# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`recommend_modules`: both steps in one line, refused before the model runs where it must be."""

import pytest
from peft import get_peft_model

from peft_linear.errors import BudgetError, CriterionError, KernelError, OutputError, PeftLinearError, TargetError
from peft_linear.integrations.restrict import adapted_modules
from peft_linear.selection.request import ModuleRequest, default_outputs, recommend_modules
from tests.helpers.callback_runs import BATCHES, base_model
from tests.helpers.small_models import causal_batches, gpt2, seeded


def test_recommend_modules_is_both_steps_and_knows_language_models():
    model = seeded(gpt2, True)
    batches = causal_batches(sizes=(4, 3))
    rec = recommend_modules(model, batches, "300", progress=False, rank=2, outputs="log_likelihood")
    assert rec.settings.output_kind == default_outputs(model) == "log_likelihood"
    assert rec.criterion == "leave_one_out" and rec.settings.optimizer == "adamw"
    assert rec.parameters <= 300 and rec.settings.rank == 2
    classifier = recommend_modules(base_model(), BATCHES, 2, progress=False)
    assert classifier.settings.output_kind == "logits" and classifier.settings.always_trained
    config = classifier.to_config(task_type="SEQ_CLS")
    adapted = get_peft_model(base_model(), config)
    assert set(adapted_modules(adapted, "default")) == set(classifier.modules)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"budget": 0}, BudgetError, "a budget of 0 modules"),
        ({"budget": 3, "targets": ["nothing"]}, TargetError, "matches no module"),
        ({"budget": 3, "rank": 0}, PeftLinearError, "rank must be a positive integer, got 0"),
        ({"budget": 3, "ridge": 0.0}, KernelError, "ridge must be a finite number > 0"),
        ({"budget": 3, "criterion": "predicted_loss", "outputs": "loss"}, OutputError, "cannot be computed from"),
        ({"budget": 3, "strategy": "other"}, CriterionError, "unknown strategy 'other'"),
        ({"budget": "10", "space": "bias"}, BudgetError, "is 10 parameters, but the smallest candidate has 16"),
    ],
)
def test_requests_are_checked_before_the_model_runs(arguments, error, message, monkeypatch):
    model = base_model()
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(error, match=message):
        recommend_modules(model, BATCHES, **arguments)


def test_candidates_are_known_before_the_model_runs(monkeypatch):
    model = base_model()
    monkeypatch.setattr(type(model), "forward", None)
    sizes = ModuleRequest(budget=6, kernels={"rank": 2}).candidates(model)
    assert len(sizes) == 13 and set(sizes.values()) == {2 * (16 + 16), 2 * (16 + 24)}
