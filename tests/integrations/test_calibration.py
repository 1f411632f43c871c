# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The data that a callback brings itself: batches as they are, examples sampled and collated."""

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from peft_linear.errors import PeftLinearError
from peft_linear.integrations.calibration import calibration_batches
from tests.helpers.callback_runs import BATCHES, base_model, rows


class Tokenizer:
    """Pads as a tokenizer does, for the default collator."""

    padding_side = "right"

    def pad(self, features, **kwargs):
        length = max(len(f["input_ids"]) for f in features)
        padded = {
            key: [f[key] + [0] * (length - len(f[key])) for f in features] for key in ("input_ids", "attention_mask")
        }
        padded["labels"] = [f["labels"] for f in features]
        return {key: torch.tensor(value) for key, value in padded.items()}


def ragged(count=5):
    return [
        {"input_ids": [3] * (i + 1), "attention_mask": [1] * (i + 1), "labels": 0, "text": "x"} for i in range(count)
    ]


@pytest.mark.parametrize("kind", ["list", "dataset"])
def test_examples_are_sampled_cleaned_and_collated(kind):
    data = ragged() if kind == "list" else Dataset.from_list(ragged())
    batches = calibration_batches(data, base_model(), processing_class=Tokenizer(), examples=4, batch_size=3)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 1]
    assert set(batches[0]) == {"input_ids", "attention_mask", "labels"}
    lengths = [int(mask.sum()) for batch in batches for mask in batch["attention_mask"]]
    assert len(set(lengths)) == 4 and set(lengths) <= {1, 2, 3, 4, 5}
    again = calibration_batches(data, base_model(), processing_class=Tokenizer(), examples=4, batch_size=3)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    own = calibration_batches(data, base_model(), data_collator=lambda features: {"n": len(features)}, batch_size=2)
    assert own == [{"n": 2}, {"n": 2}, {"n": 1}]


def test_batches_pass_as_they_are_and_loaders_are_cut():
    assert calibration_batches(BATCHES, base_model()) == BATCHES
    assert len(calibration_batches(BATCHES, base_model(), examples=5)) == 2
    assert calibration_batches(iter(BATCHES), base_model()) == BATCHES
    assert calibration_batches(BATCHES[0], base_model()) == [BATCHES[0]]
    loader = DataLoader(rows(100), batch_size=10, collate_fn=Tokenizer().pad)
    assert len(calibration_batches(loader, base_model())) == 7
    plain = calibration_batches(rows(4), base_model())
    assert plain[0]["input_ids"].shape == (4, 6)


def test_data_that_is_none():
    with pytest.raises(PeftLinearError, match="expected batches or a dataset to choose modules by, got int"):
        calibration_batches(3, base_model())
    with pytest.raises(PeftLinearError, match="the data to choose modules by is empty"):
        calibration_batches([], base_model(), data_collator=len)
    with pytest.raises(PeftLinearError, match="examples and batch_size must be at least 1, got 0 and 16"):
        calibration_batches(BATCHES, base_model(), examples=0)
