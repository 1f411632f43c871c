# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The data that a callback brings itself: batches as they are, or examples with a collator."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import DataCollatorWithFlattening, DataCollatorWithPadding, Trainer, default_data_collator
from transformers.utils import logging

from ..capture.batches import LABEL_KEYS
from ..capture.targets import base_model
from ..errors import PeftLinearError
from .trainers import columns_of
from .trl_data import DEFAULT_EXAMPLES, single_examples, with_label_tokens


logger = logging.get_logger(__name__)


def calibration_batches(
    data: Any,
    model: nn.Module,
    *,
    data_collator: Any = None,
    processing_class: Any = None,
    examples: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    trainer: Trainer | None = None,
) -> list[Mapping[str, Any]]:
    """Dict batches of at most `examples` examples (the last batch is not cut).

    Args:
        data: A DataLoader or another iterable of dict batches; or examples: a `datasets.Dataset`, a torch Dataset, a
            list of feature dicts, or a stream of them. None: the training data of `trainer`.
        model: Keys that its `forward` does not take are left out of examples, as the Trainer does.
        data_collator: For examples. Default: that of `trainer`; without one, padding by `processing_class` where it is
            a tokenizer, else `default_data_collator`, as in the Trainer.
        examples: Default: all batches of an iterable; 64 of a DataLoader or of examples.
        batch_size: For examples.
        seed: Of the sample of examples; of a stream they are the first.
        trainer: Makes batches of its rows in its own way. Where `data` holds rows that are not prepared (texts,
            chats), as TRL's trainers get them, its own training data are taken.

    Raises:
        PeftLinearError: there are no examples, they are not prepared or have no label tokens, the collator puts
            several into one row, or `examples` or `batch_size` is below 1.
    """
    if batch_size < 1 or (examples is not None and examples < 1):
        raise PeftLinearError(f"examples and batch_size must be at least 1, got {examples} and {batch_size}")
    if data is None:
        data = _training_data(trainer)
    data, are_examples = _recognise(data, data_collator)
    if not are_examples:
        limit = examples or (DEFAULT_EXAMPLES if isinstance(data, DataLoader) else None)
        return _first_batches(data, limit)
    own = data_collator is None and trainer is not None
    collate = trainer.data_collator if own and trainer is not None else data_collator
    keys = columns_of(trainer) if own and trainer is not None else _accepted_keys(model)
    rows = _sample(data, examples or DEFAULT_EXAMPLES, seed)
    by_trl = hasattr(collate, "padding_free")  # a row or a batch of TRL's collator may hold several examples
    if not _prepared(rows[0], keys, by_trl):
        rows = _prepared_by(trainer, data, rows[0], keys, examples or DEFAULT_EXAMPLES, seed)
    features = [_only(row, keys) for row in rows]
    collate = collate or _default_collator(processing_class)
    if by_trl:
        features, collate = single_examples(features, collate)
        features = with_label_tokens(features[: examples or DEFAULT_EXAMPLES], collate)
    elif isinstance(collate, DataCollatorWithFlattening):
        raise PeftLinearError(
            "DataCollatorWithFlattening puts the examples of a batch into one row, and kernels are between examples; "
            "pass data_collator=DataCollatorForSeq2Seq(tokenizer), which pads them: the loss is the same"
        )
    return [collate(features[start : start + batch_size]) for start in range(0, len(features), batch_size)]


def _training_data(trainer: Trainer | None) -> Any:
    if trainer is None or trainer.train_dataset is None:
        raise PeftLinearError(
            "there are no data to choose modules by: no Trainer with a train_dataset calls this; pass batches or a "
            "dataset as `data`"
        )
    return trainer.train_dataset


def _sample(data: Any, count: int, seed: int) -> list[Any]:
    """Random rows; the first of a stream."""
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count].tolist()
        rows = [data[i] for i in order]
    else:
        rows = list(islice(iter(data), count))
    if not rows:
        raise PeftLinearError("the data to choose modules by is empty; pass at least one example")
    return rows


def _prepared(row: Any, keys: set[str] | None, by_trl: bool = False) -> bool:
    """Whether a row has something that the model, or the Trainer's collator, takes."""
    if not isinstance(row, Mapping):
        return True
    if keys is None:
        return not by_trl or "input_ids" in row
    return any(key in keys and key not in LABEL_KEYS for key in row)


def _prepared_by(
    trainer: Trainer | None, data: Any, row: Mapping[str, Any], keys: set[str] | None, count: int, seed: int
) -> list[Any]:
    """Rows of the Trainer's own training data, where those passed are not prepared.

    Raises:
        PeftLinearError: there is no Trainer, or its rows are not prepared either.
    """
    if trainer is not None and trainer.train_dataset is not None and trainer.train_dataset is not data:
        rows = _sample(trainer.train_dataset, count, seed)
        if _prepared(rows[0], keys):
            logger.warning(
                f"The rows to choose modules by have only {', '.join(map(str, row))}, which are not prepared for the "
                "model: the Trainer's own training data are taken in their place."
            )
            return rows
    raise PeftLinearError(
        f"the rows to choose modules by have the columns {', '.join(map(str, row))}, none of which the model takes; "
        "tokenise them as the training data are (tokenizer(row['text'])), or pass batches of the training DataLoader"
    )


def _recognise(data: Any, data_collator: Any) -> tuple[Any, bool]:
    """The data, and whether they are single examples; an iterator is looked into and put together again."""
    if isinstance(data, (DataLoader, Mapping)):
        return data, False
    if data_collator is not None or isinstance(data, Dataset) or hasattr(data, "column_names"):
        return data, True
    if not isinstance(data, Iterable):
        return data, False
    iterator = iter(data)
    first = next(iterator, None)
    if iterator is data:
        data = chain([] if first is None else [first], iterator)
    example = isinstance(first, Mapping) and not any(isinstance(v, Tensor) and v.ndim for v in first.values())
    return data, example


def _first_batches(data: Any, limit: int | None) -> list[Mapping[str, Any]]:
    batches: list[Mapping[str, Any]] = []
    seen = 0
    for batch in _iterate(data):
        batches.append(batch)
        seen += _size(batch)
        if limit is not None and seen >= limit:
            break
    return batches


def _iterate(data: Any) -> Iterable[Any]:
    if isinstance(data, Mapping):
        return [data]
    if not isinstance(data, Iterable):
        raise PeftLinearError(f"expected batches or a dataset to choose modules by, got {type(data).__name__}")
    return data


def _size(batch: Any) -> int:
    values = batch.values() if isinstance(batch, Mapping) else ()
    return next((len(value) for value in values if isinstance(value, Tensor) and value.ndim), 0)


def _accepted_keys(model: nn.Module) -> set[str]:
    return {*inspect.signature(base_model(model).forward).parameters, *LABEL_KEYS}


def _only(example: Any, keys: set[str] | None) -> Any:
    if keys is None or not isinstance(example, Mapping):
        return example
    return {key: value for key, value in example.items() if key in keys}


def _default_collator(processing_class: Any) -> Any:
    return DataCollatorWithPadding(processing_class) if hasattr(processing_class, "pad") else default_data_collator
