# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The callback with action="report": it changes nothing, writes the report and logs a summary that trackers see."""

import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from peft_linear.errors import TargetError
from peft_linear.integrations.recommendation_callback import summary
from peft_linear.integrations.restrict import adapted_modules
from peft_linear.selection import Recommendation, Training, recommend
from tests.helpers.callback_runs import base_model, callback, lora_parameters, peft_bert, trainer_for
from tests.helpers.planted import planted_kernels


def test_report_changes_nothing_and_writes_the_report(tmp_path, monkeypatch):
    monkeypatch.undo()  # with the figure
    model = peft_bert()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    ours = callback("report")
    trainer = trainer_for(model, tmp_path, [ours])
    assert model.training
    assert {name: p.shape for name, p in model.named_parameters()} == {n: p.shape for n, p in before.items()}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert Recommendation.load(tmp_path) == ours.recommendation
    assert (tmp_path / "recommendation.md").is_file() and (tmp_path / "recommendation.png").is_file()
    assert set(ours.modules) < {row.name for row in ours.recommendation.scores}
    assert {row.parameters for row in ours.recommendation.scores} == {2 * 32, 2 * 40}, "the adapter's own rank"
    trainer.train()
    assert len(lora_parameters(model)) == 2 * len(adapted_modules(model, "default"))


def test_after_training_the_report_has_what_was_measured(tmp_path):
    trainer = trainer_for(peft_bert(), tmp_path, [callback("report")], eval_strategy="no")
    before = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Measured by the Trainer" not in before and "measured by the Trainer" not in before
    trainer.train()
    after = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "measured by the Trainer" in after
    silent = trainer_for(peft_bert(), tmp_path / "silent", [callback("report")], logging_strategy="no")
    silent.train()  # without a loss in the history there is nothing to add
    assert "measured by the Trainer" not in (tmp_path / "silent" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "asked", "expected"),
    [
        ({}, {}, ("adamw", 8)),
        ({"optim": "sgd"}, {}, ("sgd", None)),
        ({"optim": "adafactor"}, {"training": Training("sgd")}, ("sgd", None)),
        ({}, {"training": Training(batch_size=3)}, ("adamw", 3)),
        ({"optim": "sgd"}, {"criterion": "leave_one_out", "training": Training("adamw")}, ("adamw", 8)),
    ],
)
def test_the_default_criterion_sees_how_the_trainer_trains(tmp_path, arguments, asked, expected):
    ours = callback("report", **{"criterion": "default-by-evidence", **asked})
    trainer_for(peft_bert(), tmp_path, [ours], gradient_accumulation_steps=2, **arguments)
    settings = ours.recommendation.settings
    assert (settings.optimizer, settings.train_batch_size) == expected


def test_report_on_a_model_without_adapters(tmp_path):
    ours = callback("report", budget=0.5)
    trainer_for(base_model(), tmp_path, [ours])
    assert len(ours.recommendation.scores) == 13
    with pytest.raises(TargetError, match="BertForSequenceClassification carries no adapter to restrict"):
        trainer_for(base_model(), tmp_path / "other", [callback()])


def test_training_with_a_report_is_training_without(tmp_path):
    plain, reported = peft_bert(), peft_bert()
    trainer_for(plain, tmp_path / "plain").train()
    trainer_for(reported, tmp_path / "reported", [callback("report")]).train()
    for (name, a), b in zip(plain.named_parameters(), reported.parameters(), strict=True):
        assert torch.equal(a, b), name


class Tracker(TrainerCallback):
    """Keeps what it is given, as TensorBoard's callback does; it comes before the user's where report_to names it."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append((state.global_step, dict(logs)))


@pytest.mark.parametrize("place", ["report_to", "before", "after"])
def test_every_tracker_sees_the_summary_once(place, tmp_path, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tracker", Tracker)
    ours, tracker = callback(), Tracker()
    callbacks = {"report_to": [ours], "before": [tracker, ours], "after": [ours, tracker]}[place]
    report_to = "tracker" if place == "report_to" else "none"
    trainer = trainer_for(peft_bert(), tmp_path, callbacks, report_to=report_to)
    tracker = next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, Tracker))
    trainer.train()
    assert tracker.seen[0] == (0, {**summary(ours.recommendation), "epoch": 0})
    assert "loss" in tracker.seen[1][1]
    assert not any(key.startswith("ntk_") for _, logs in tracker.seen[1:] for key in logs)


def test_the_summary_is_in_the_trainers_log(tmp_path):
    ours = callback()
    trainer = trainer_for(peft_bert(), tmp_path, [ours])
    trainer.train()
    entry = dict(trainer.state.log_history[0])
    assert (entry.pop("step"), entry.pop("epoch", 0)) == (0, 0)
    assert entry == summary(ours.recommendation)
    assert entry["ntk_modules"] == 3 and entry["ntk_candidates"] == 13
    assert entry["ntk_parameters"] == sum(p.numel() for n, p in trainer.model.named_parameters() if "lora_" in n)
    assert all(isinstance(value, float) for value in entry.values())


def test_without_a_handler_the_summary_is_in_the_history_alone(tmp_path):
    """Events that are called by hand, as other trainers than transformers' do."""
    ours, trainer = callback("report"), trainer_for(peft_bert(), tmp_path)
    ours.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert [entry["ntk_modules"] for entry in trainer.state.log_history] == [3]


def test_summary_without_predictions():
    unlabelled = recommend(planted_kernels(output_kind="log_likelihood"), 2)
    values = summary(unlabelled)
    assert "ntk_predicted_loss" not in values and values["ntk_modules"] == 2
