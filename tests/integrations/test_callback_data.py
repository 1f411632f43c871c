# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Data of the callback: streams, rows that only the Trainer prepares, and the Trainer's own."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import IterableDataset as TorchStream
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_linear.errors import PeftLinearError
from peft_linear.integrations.calibration import calibration_batches
from peft_linear.integrations.recommendation_callback import NtkRecommendationCallback
from tests.helpers.callback_runs import base_model, peft_bert, rows, trainer_for
from tests.helpers.tiny import save_model


class Stream(TorchStream):
    def __iter__(self):
        while True:
            yield from rows()


@pytest.mark.parametrize("kind", ["datasets", "torch", "generator"])
def test_of_a_stream_the_first_examples_are_taken(kind):
    streams = {
        "datasets": lambda: IterableDataset.from_generator(lambda: iter(rows())),
        "torch": Stream,
        "generator": lambda: iter(rows()),
    }
    batches = calibration_batches(streams[kind](), base_model(), examples=10, batch_size=4)
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 2]
    found = torch.cat([batch["input_ids"] for batch in batches]).tolist()
    assert found == [row["input_ids"] for row in rows()[:10]]


def texts(count=12):
    return Dataset.from_list(
        [{"text": " ".join(f"{'abc'[i % 3]}{(i * k) % 8}" for k in range(1, 5))} for i in range(count)]
    )


def test_rows_that_are_not_prepared_are_refused_where_there_is_no_trainer():
    with pytest.raises(PeftLinearError, match="have the columns text, none of which the model takes; tokenise them"):
        calibration_batches(texts(), base_model())
    with pytest.raises(PeftLinearError, match="no Trainer with a train_dataset calls this; pass batches"):
        calibration_batches(None, base_model())
    with pytest.raises(PeftLinearError, match="the data to choose modules by is empty"):
        calibration_batches(IterableDataset.from_generator(lambda: iter([]), features=None), base_model())


def chooser(data, action="restrict", **options):
    return NtkRecommendationCallback(
        data, 3, action, **{"criterion": "gradient_energy", "progress": False, "examples": 8, **options}
    )


@pytest.mark.parametrize("data", [None, texts()])
def test_the_trainers_own_data_and_collator_make_the_batches(data, tmp_path):
    calls = []

    def collate(features):
        calls.append(sorted(features[0]))
        return {key: torch.tensor([row[key] for row in features]) for key in features[0]}

    callback = chooser(data)
    trainer = trainer_for(peft_bert(), tmp_path / "without", max_steps=1)
    expected = calibration_batches(rows(), base_model(), examples=8)
    trainer.data_collator = collate
    found = calibration_batches(data, base_model(), examples=8, trainer=trainer)
    assert calls and calls[0] == ["attention_mask", "input_ids", "labels"]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(found, expected, strict=True))
    trainer_for(peft_bert(), tmp_path / "with", [callback], max_steps=1).train()
    assert len(callback.modules) == 3


def test_columns_stay_where_the_trainer_leaves_them_to_its_collator(tmp_path):
    trainer = trainer_for(peft_bert(), tmp_path, max_steps=1, remove_unused_columns=False)
    trainer.data_collator = lambda features: {"columns": sorted(features[0])}
    assert calibration_batches(texts(), base_model(), examples=4, trainer=trainer) == [{"columns": ["text"]}]


@pytest.mark.parametrize("kind", ["text", "messages", "prompt", "stream"])
def test_an_sft_trainer_takes_the_dataset_that_the_callback_gets(kind, tmp_path):
    trl = pytest.importorskip("trl")
    from peft import LoraConfig

    folder = save_model(tmp_path / "model", causal=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "[UNK]"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    data = texts()
    if kind == "messages":
        data = Dataset.from_list([{"messages": [{"role": "user", "content": row["text"]}]} for row in data])
    elif kind == "prompt":
        data = Dataset.from_list([{"prompt": row["text"], "completion": " " + row["text"]} for row in data])
    elif kind == "stream":
        data = data.to_iterable_dataset()
    callback = chooser(data, criterion="default-by-evidence", draws=1)
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            max_length=16,
            disable_tqdm=True,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=True),
        callbacks=[callback],
    )
    trainer.train()
    assert len(callback.modules) == 3 and callback.recommendation.criterion == "leave_one_out"
