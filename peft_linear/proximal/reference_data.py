# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Reference data: texts as batches, which of their positions are predictions, and the pretrained model on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..capture.batches import Batch
from ..errors import PeftLinearError


IGNORED = -100
ROWS = 8  # texts in a batch, at most
LONGEST = 512  # tokens of a text
_LOGITS = 2**27  # numbers in the logits of a batch of texts, about


def counted_predictions(logits: Tensor, batch: Batch, shift: int) -> Tensor:  # bool, logits.shape[:-1] less the shift
    """Which logits are predictions: of label tokens where there are any, else of all but padding."""
    shape = logits.shape[:-1]
    if len(shape) < 2:
        return torch.ones(shape, dtype=torch.bool, device=logits.device)
    if batch.labels is not None and batch.labels.shape == shape:
        known = batch.labels != IGNORED
    else:
        mask = batch.inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == shape:
            known = mask.bool()
            if shift:  # the first token of a text is predicted from padding where that is on the left
                return (known[:, 1:] & known[:, :-1]).to(logits.device)
        else:
            known = torch.ones(shape, dtype=torch.bool, device=logits.device)
    return known[:, shift:].to(logits.device)


def tokenised(batches: Iterable[Any], tokenizer: Any) -> Iterable[Any]:
    """Batches as they are; texts in padded batches."""
    if isinstance(batches, str):
        raise PeftLinearError("the reference is one text; pass a list of texts, or batches of tensors")
    if isinstance(batches, Mapping) or tokenizer is None:
        if isinstance(batches, (list, tuple)) and batches and isinstance(batches[0], str):
            raise PeftLinearError("the reference is a list of texts; pass tokenizer=..., or batches of tensors")
        return batches
    texts = list(batches)
    wrong = next((text for text in texts if not isinstance(text, str) or not text.strip()), None)
    if wrong is not None or not texts:
        raise PeftLinearError(
            f"with a tokenizer the reference must be a list of texts that are not empty, got {wrong!r}"
            if texts
            else "the reference is empty; pass at least one text"
        )
    if getattr(tokenizer, "pad_token", None) is None:
        return [dict(tokenizer([text], truncation=True, max_length=LONGEST, return_tensors="pt")) for text in texts]
    rows = max(1, min(ROWS, _LOGITS // (LONGEST * len(tokenizer))))
    parts = [texts[start : start + rows] for start in range(0, len(texts), rows)]
    return [
        dict(tokenizer(part, truncation=True, max_length=LONGEST, padding=True, return_tensors="pt")) for part in parts
    ]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the pretrained one: adapters and trained copies of modules are off, unless merged.

    Raises:
        PeftLinearError: an adapter is merged into the weights.
    """
    layers = [each for each in model.modules() if isinstance(each, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    if merged := [each for each in layers if getattr(each, "merged", False)]:
        raise PeftLinearError(
            f"an adapter is merged into {len(merged)} modules, so the pretrained weights are not there; call "
            "unmerge_adapter() first"
        )
    before = [(each, each._disable_adapters) for each in layers]
    try:
        for each in layers:
            each._disable_adapters = True
        yield
    finally:
        for each, disabled in before:
            each._disable_adapters = disabled
