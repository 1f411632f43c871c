# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The data that a callback brings itself: batches as they are, or examples with a collator."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import DataCollatorWithPadding, default_data_collator

from ..capture.batches import LABEL_KEYS
from ..capture.targets import base_model
from ..errors import PeftLinearError


DEFAULT_EXAMPLES = 64


def calibration_batches(
    data: Any,
    model: nn.Module,
    *,
    data_collator: Any = None,
    processing_class: Any = None,
    examples: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> list[Mapping[str, Any]]:
    """Dict batches of at most `examples` examples (the last batch is not cut).

    Args:
        data: A DataLoader or another iterable of dict batches; or examples: a `datasets.Dataset`, a torch Dataset or
            a list of feature dicts, as the Trainer takes them.
        model: Keys that its `forward` does not take are left out of examples, as the Trainer does.
        data_collator: For examples. Default: padding by `processing_class` where it is a tokenizer, else
            `default_data_collator`, as in the Trainer.
        examples: Default: all batches of an iterable; 64 of a DataLoader or of examples.
        batch_size: For examples.
        seed: Of the sample of examples.

    Raises:
        PeftLinearError: there are no examples, or `examples` or `batch_size` is below 1.
    """
    if batch_size < 1 or (examples is not None and examples < 1):
        raise PeftLinearError(f"examples and batch_size must be at least 1, got {examples} and {batch_size}")
    if _are_examples(data, data_collator):
        count = min(len(data), examples or DEFAULT_EXAMPLES)
        if not count:
            raise PeftLinearError("the data to choose modules by is empty; pass at least one example")
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count].tolist()
        keys = _accepted_keys(model)
        features = [_only(data[i], keys) for i in order]
        collate = data_collator or _default_collator(processing_class)
        return [collate(features[start : start + batch_size]) for start in range(0, count, batch_size)]
    limit = examples or (DEFAULT_EXAMPLES if isinstance(data, DataLoader) else None)
    batches: list[Mapping[str, Any]] = []
    seen = 0
    for batch in _iterate(data):
        batches.append(batch)
        seen += _size(batch)
        if limit is not None and seen >= limit:
            break
    return batches


def _are_examples(data: Any, data_collator: Any) -> bool:
    if isinstance(data, DataLoader):
        return False
    if data_collator is not None or isinstance(data, Dataset) or hasattr(data, "column_names"):
        return True
    first = data[0] if isinstance(data, (list, tuple)) and data else None
    return isinstance(first, Mapping) and not any(isinstance(v, Tensor) and v.ndim for v in first.values())


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
    return {*inspect.signature(base_model(model).forward).parameters, *LABEL_KEYS, "label_ids"}


def _only(example: Any, keys: set[str]) -> Any:
    return {key: value for key, value in example.items() if key in keys} if isinstance(example, Mapping) else example


def _default_collator(processing_class: Any) -> Any:
    return DataCollatorWithPadding(processing_class) if hasattr(processing_class, "pad") else default_data_collator
