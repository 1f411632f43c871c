# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The callback inside SFTTrainer without data of its own: TRL's prepared rows, packed or not, and TRL's adapter."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import DataCollatorWithFlattening

from peft_linear import NtkRecommendationCallback, PeftLinearError, Recommendation, recommend_modules
from peft_linear.integrations.calibration import calibration_batches
from tests.helpers.callback_runs import base_model
from tests.helpers.language import chat_tokenizer, language_model, rows_in, sft_arguments


pytest.importorskip("trl", reason="TRL is not installed: pip install 'peft-linear[trl]'")
from trl import SFTTrainer


ROWS = {
    "plain": {},
    "packing": {"packing": True, "max_length": 40},
    "padding_free": {"padding_free": True, "max_length": None},
    "all columns": {"remove_unused_columns": False},
}


def sft_trainer(folder, kind, callbacks=(), **settings):
    torch.manual_seed(7)  # early versions of TRL do not seed before they make the adapter
    return SFTTrainer(
        model=language_model(),
        args=sft_arguments(folder, **settings),
        train_dataset=Dataset.from_list(rows_in(kind)),
        processing_class=chat_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("settings", ROWS)
@pytest.mark.parametrize("kind", ["messages", "plain", "text"])
def test_restricts_to_what_the_function_recommends(kind, settings, tmp_path):
    callback = NtkRecommendationCallback(budget=3, action="restrict", batch_size=5, draws=1, progress=False)
    trainer = sft_trainer(tmp_path / "with", kind, [callback], **ROWS[settings])
    expected = recommend_modules(sft_trainer(tmp_path / "without", kind), budget=3, draws=1, progress=False)
    assert callback.recommendation.settings.examples == len(rows_in(kind))
    assert callback.modules == expected.modules
    found = [row.score for row in callback.recommendation.scores]
    assert found == pytest.approx([row.score for row in expected.scores], rel=1e-4)
    trainer.train()
    model = trainer.model
    assert isinstance(model, PeftModel) and set(model.peft_config["default"].target_modules) == set(callback.modules)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 3 and all(any(m in name for m in callback.modules) for name in trained)
    assert Recommendation.load(tmp_path / "with").modules == callback.modules


def test_a_report_changes_nothing(tmp_path):
    callback = NtkRecommendationCallback(budget=0.125, draws=1, progress=False)
    runs = [sft_trainer(tmp_path / name, "messages", each) for name, each in (("a", [callback]), ("b", []))]
    weights = []
    for run in runs:
        run.train()
        weights.append({name: p for name, p in run.model.named_parameters() if p.requires_grad})
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert runs[0].train_dataset[0] == runs[1].train_dataset[0] and callback.recommendation is not None


def test_there_is_no_default_budget():
    with pytest.raises(PeftLinearError, match="there is no budget; pass one"):
        NtkRecommendationCallback()


def test_a_collator_that_flattens_is_refused():
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}]
    with pytest.raises(PeftLinearError, match="DataCollatorWithFlattening puts the examples of a batch into one row"):
        calibration_batches(rows, base_model(), data_collator=DataCollatorWithFlattening())
