# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Small data sets in the columns, splits and features of those that the paper uses, as the Hub has them."""

import datasets


def words(i):
    """A text whose class, i modulo 2, shows in its words."""
    return " ".join(f"{'ab'[i % 2]}{(i * k + k) % 8}" for k in range(1, 5))


GLUE_COLUMNS = {  # text columns, splits, classes: as on the Hub
    "cola": (("sentence",), ("train", "validation", "test"), ("unacceptable", "acceptable")),
    "sst2": (("sentence",), ("train", "validation", "test"), ("negative", "positive")),
    "mrpc": (("sentence1", "sentence2"), ("train", "validation", "test"), ("not_equivalent", "equivalent")),
    "qqp": (("question1", "question2"), ("train", "validation", "test"), ("not_duplicate", "duplicate")),
    "qnli": (("question", "sentence"), ("train", "validation", "test"), ("entailment", "not_entailment")),
    "mnli": (
        ("premise", "hypothesis"),
        ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"),
        ("entailment", "neutral", "contradiction"),
    ),
}
REVIEWS = {
    "imdb": (("train", "test", "unsupervised"), ("neg", "pos")),
    "yelp": (("train", "test"), ("1 star", "2 star", "3 stars", "4 stars", "5 stars")),
    "yelp_polarity": (("train", "test"), ("1", "2")),
}
HUB = {
    **{name: ("nyu-mll/glue", name) for name in GLUE_COLUMNS},
    "imdb": ("stanfordnlp/imdb",),
    "yelp": ("Yelp/yelp_review_full",),
    "yelp_polarity": ("fancyzhx/yelp_polarity",),
}


def as_on_the_hub(name):
    """A small data set with the columns, splits, features and hidden labels of the one on the Hub."""
    columns, splits, names = GLUE_COLUMNS.get(name) or (("text",), *REVIEWS[name])
    features = {column: datasets.Value("string") for column in columns}
    features["label"] = datasets.ClassLabel(names=list(names))
    if name in GLUE_COLUMNS:
        features["idx"] = datasets.Value("int32")
    parts = {}
    for split in splits:
        count = 60 if split == "train" else 20
        hidden = split == "unsupervised" or (split.startswith("test") and name in GLUE_COLUMNS)
        rows = {
            column: [f"{split.split('_')[-1]} {i} {words(i)} {column}" for i in range(count)] for column in columns
        }
        rows["label"] = [-1 if hidden else i % len(names) for i in range(count)]
        if "idx" in features:
            rows["idx"] = list(range(count))
        parts[split] = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    return datasets.DatasetDict(parts)
