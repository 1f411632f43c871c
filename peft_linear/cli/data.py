# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Text data from a file, a folder or the Hub, as batches that a model takes. Shared by the CLI and the examples."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from ..errors import FileError, PeftLinearError
from .language import infer_task, language_columns
from .sources import LABEL_COLUMNS, SUFFIXES, Rows, Source, read_file, read_folder, read_hub


TASKS = ("auto", "classification", "causal-lm")
MOST_CLASSES = 1000  # more distinct labels are ids or texts
CHAT_COLUMNS = ("messages", "conversations", "conversation", "chosen", "rejected")
_CLASS = re.compile(r"[+-]?[0-9]{1,18}")

# What text columns are called, in the order in which they are looked for; pairs first, as their halves are names too.
TEXT_COLUMNS: tuple[tuple[str, ...], ...] = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("text",),
    ("sentence",),
    ("content",),
    ("review",),
    ("document",),
)


@dataclass(frozen=True)
class TextData:
    """Rows of text by split, and which columns mean what.

    Args:
        splits: {"train": rows, …}; a row is a mapping from column to value.
        text_columns: One column, or two for pairs.
        label_column: None for language modelling.
        label_names: Of a classification, in the order of the class numbers; None for regression and language models.
        source: Where they are from.
        task: "classification" or "causal-lm".
    """

    splits: Mapping[str, Rows]
    text_columns: tuple[str, ...]
    label_column: str | None = None
    label_names: tuple[str, ...] | None = None
    source: str = ""
    task: str = "classification"

    @property
    def num_labels(self) -> int:
        """Outputs of a classifier of these labels; 1 for regression."""
        return len(self.label_names) if self.label_names else 1

    def rows(self, split: str = "train") -> Rows:
        """The rows of one split.

        Raises:
            FileError: there is no such split.
        """
        if split not in self.splits:
            raise FileError(f"{self.source} has no split {split!r}; there are: {', '.join(self.splits)}")
        return self.splits[split]

    def label_of(self, row: Mapping[str, Any]) -> int | float:
        """The class number of a row, or its target.

        Raises:
            FileError: the row has no label, or one that is not among the classes.
        """
        value = row.get(self.label_column or "")
        if value is None or (isinstance(value, str) and not value.strip()):
            raise FileError(f"{self.source}: a row has no {self.label_column!r}: {_excerpt(row)}")
        if self.label_names is None:
            if not _is_number(value):
                raise FileError(f"{self.source}: label {value!r} is no finite number in {_excerpt(row)}; fix the row")
            return float(value)
        if isinstance(value, str) and value in self.label_names:
            return self.label_names.index(value)
        number = _as_class(value)
        if number is None or not 0 <= number < len(self.label_names):
            raise FileError(
                f"{self.source}: label {value!r} is none of the {len(self.label_names)} classes "
                f"({', '.join(self.label_names[:12])}) in {_excerpt(row)}"
            )
        return number


def load_text_data(
    source: str | os.PathLike,
    task: str = "classification",
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
) -> TextData:
    """Reads a dataset and finds out what its columns mean.

    Args:
        source: A .jsonl, .json, .csv or .tsv file (one split, "train"); a folder with train.jsonl, validation.jsonl,
            test.jsonl or the like (and optionally labels.json with {"labels": [names]}), or one that
            `datasets.save_to_disk` wrote; or a name on the Hub, "glue/sst2" or "owner/name/config" for a
            configuration.
        task: "classification" (a number with a fraction as label makes it a regression), "causal-lm", or "auto": what
            the columns are for (`infer_task`).
        text_columns: One column, or two for pairs; default: found by the usual names.
        label_column: Default: found by the usual names; not used for "causal-lm".

    Raises:
        FileError: the source cannot be read, is empty, or has no columns of these names.
        PeftLinearError: an unknown task.
    """
    if task not in TASKS:
        raise PeftLinearError(f"unknown task {task!r}; there are: {', '.join(TASKS)}")
    splits, names = _read(source, label_column)
    rows = next(iter(splits.values()), [])
    if not len(rows):
        raise FileError(f"{os.fspath(source)} has no rows; pass a dataset with at least one example")
    source, row = os.fspath(source), rows[0]
    if task == "auto":
        task = infer_task(row, text_columns, label_column, source)
    if task == "causal-lm":
        texts = language_columns(row, text_columns, source)
        if not texts:
            texts = language_columns(row, _find_text_columns(row, None, None, source), source)
        return TextData(splits, texts, None, None, source, task)
    label = _find_label_column(list(row), label_column, source)
    texts = _find_text_columns(row, text_columns, label, source)
    looked_at = {"first": [row]} if names else splits  # with names there is no need to read all rows
    values = _label_values(looked_at, label, source)
    return TextData(splits, texts, label, names or _label_names(values, label, source), source, task)


def _read(source: str | os.PathLike, label_column: str | None) -> Source:
    path = Path(source)
    if path.is_dir():
        return read_folder(path)
    if path.is_file():
        return {"train": read_file(path)}, None
    if path.suffix.lower() in SUFFIXES or path.is_absolute() or str(source).startswith("."):
        raise FileError(f"there is no file or folder {os.fspath(source)!r}; check the path of the dataset")
    return read_hub(str(source), label_column)


def sample_rows(data: TextData, count: int, split: str = "train", seed: int = 0) -> list[Mapping[str, Any]]:
    """At most `count` rows of a split, random by `seed`; every class keeps its share, as evenly as counts allow.

    Raises:
        PeftLinearError: count < 1.
        FileError: there is no such split, or a label that is not one.
    """
    if count < 1:
        raise PeftLinearError(f"the number of examples must be at least 1, got {count}")
    rows = data.rows(split)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    if data.label_names is not None and count < len(rows):
        labels = torch.tensor([data.label_of(rows[i]) for i in order.tolist()])
        order = order[labels.argsort(stable=True)]  # by class, random within: equal steps then take equal shares
        order = order[torch.linspace(0, len(rows) - 1, count).round().long()]
        order = order[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
    return [rows[i] for i in order[:count].tolist()]


def tokenize(
    data: TextData,
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 128,
) -> list[dict[str, Any]]:
    """Features as a data collator takes them, {"input_ids", "attention_mask", …} and "labels" of a classification."""
    features = []
    for row in rows:
        texts = [row.get(column) for column in data.text_columns]
        if any(not isinstance(text, str) for text in texts):
            raise FileError(f"{data.source}: {' and '.join(data.text_columns)} must be text in {_excerpt(row)}")
        try:
            encoded = dict(tokenizer(*texts, truncation=True, max_length=max_length))
        except (TypeError, UnicodeError) as error:  # half of a surrogate pair, for example
            raise FileError(f"{data.source}: the tokenizer cannot read {_excerpt(row)!r}: {error}") from error
        if data.label_column is not None:
            encoded["labels"] = data.label_of(row)
        features.append(encoded)
    return features


def collator(data: TextData, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The data collator of a classification: padding. Language models' batches are `cli.language`'s."""
    return DataCollatorWithPadding(tokenizer)


def batches_of(features: Sequence[dict[str, Any]], collate: Any, batch_size: int = 16) -> list[dict[str, Any]]:
    """The features in order, collated `batch_size` at a time.

    Raises:
        PeftLinearError: batch_size < 1.
    """
    if batch_size < 1:
        raise PeftLinearError(f"batch_size must be at least 1, got {batch_size}")
    parts = [features[start : start + batch_size] for start in range(0, len(features), batch_size)]
    return [dict(collate(part)) for part in parts]


def _find_label_column(columns: Sequence[str], wanted: str | None, source: str) -> str:
    candidates = [wanted] if wanted else LABEL_COLUMNS
    found = next((name for name in candidates if name in columns), None)
    if found is None:
        looked = repr(wanted) if wanted else f"of {', '.join(LABEL_COLUMNS)}"
        raise FileError(f"{source} has no label column {looked}; its columns are {', '.join(columns)}")
    return found


def _find_text_columns(
    row: Mapping[str, Any], wanted: Sequence[str] | None, label: str | None, source: str
) -> tuple[str, ...]:
    chat = [name for name in (wanted or row) if _is_chat(name, row.get(name))]
    pair = () if wanted else tuple(name for name in ("prompt", "completion") if name in row)
    if chat or len(pair) == 2:
        raise FileError(
            f"{source} holds chats ({', '.join(chat or pair)}), which are not classified; pass --task causal-lm for a "
            "language model, or name a column of texts with --text-column"
        )
    if wanted:
        missing = [name for name in wanted if name not in row]
        if missing or len(wanted) > 2:
            what = f"no column {', '.join(missing)}" if missing else f"at most 2 text columns, got {len(wanted)}"
            raise FileError(f"{source} takes {what}; its columns are {', '.join(row)}")
        return tuple(wanted)
    for names in TEXT_COLUMNS:
        if all(isinstance(row.get(name), str) for name in names):
            return names
    texts = [name for name, value in row.items() if isinstance(value, str) and name != label]
    if len(texts) != 1:
        raise FileError(f"{source}: which columns hold the text? There are {', '.join(row)}; name one or two of them")
    return (texts[0],)


def _is_chat(name: str, value: Any) -> bool:
    messages = isinstance(value, (list, tuple)) and all(isinstance(message, Mapping) for message in value)
    return messages and (name in CHAT_COLUMNS or bool(value))


def _label_values(splits: Mapping[str, Rows], label: str, source: str) -> list[Any]:
    """The labels of all rows that have one.

    Raises:
        FileError: a row has several.
    """
    values = [row.get(label) for rows in splits.values() for row in rows]
    for value in values:
        if value is not None and not isinstance(value, (str, int, float)):
            raise FileError(
                f"{source}: the column {label!r} holds {type(value).__name__} values, such as {_short(value)}: "
                "several labels an example, which the command line does not read; name a column of one label with "
                "--label-column, or pass batches with float labels (examples, classes) of 0 and 1 to "
                "peft_linear.recommend_modules"
            )
    return [value for value in values if value is not None and value != ""]


def _label_names(values: Sequence[Any], label: str, source: str) -> tuple[str, ...] | None:
    """Names of classes from the values: sorted words, or the numbers 0…max; None for targets with a fraction.

    Raises:
        FileError: there are too many for classes.
    """
    numbers = [_as_class(value) for value in values]
    known = [number for number in numbers if number is not None]
    distinct = {str(value) for value in values}
    classes = len(known) == len(numbers)
    if not classes and all(_is_number(value) for value in values):
        return None
    largest = max(known, default=0) + 1 if classes else len(distinct)
    alone = len(distinct) > 20 and 2 * len(distinct) > len(values)
    if largest > MOST_CLASSES or alone:
        raise FileError(
            f"{source}: the column {label!r} has {len(distinct)} distinct values in {len(values)} rows"
            f"{f' and numbers up to {largest - 1}' if classes else ''}, such as {_short(values[0])}: ids or texts, "
            f"not up to {MOST_CLASSES} classes. Name another column with --label-column, number the classes from 0, "
            "or write targets of a regression with a fraction (3.0)"
        )
    return tuple(str(i) for i in range(largest)) if classes else tuple(sorted(distinct))


def _as_class(value: Any) -> int | None:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return value
    if isinstance(value, str):
        return int(value) if _CLASS.fullmatch(value.strip()) else None
    return int(value) if isinstance(value, float) and value.is_integer() else None


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "…"


def _excerpt(row: Mapping[str, Any]) -> str:
    text = str(dict(row))
    return text if len(text) <= 120 else text[:117] + "…"
