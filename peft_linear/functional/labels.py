# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What the labels of a classifier's logits (N, C) mean, by transformers' rules.

| meaning | labels as kept | loss of one example |
|---|---|---|
| one class | (N,) int64 | cross-entropy |
| several labels | (N, C) int64 of 0 and 1 | binary cross-entropy, mean over the C outputs |
| regression | (N,) float64, or (N, C) | ½‖f − y‖² |
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import OutputError


AUTO = "auto"  # one of transformers' models without a problem_type takes all float labels (N, C) as several
SINGLE, SEVERAL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


def several_labels(labels: Tensor) -> bool:
    """Whether labels, as kept, say of every output whether it applies."""
    return labels.ndim == 2 and not labels.is_floating_point()


def labels_of_logits(labels: Tensor, num_outputs: int, problem_type: str | None = None) -> Tensor:
    """The labels of all examples as kernels keep them.

    Args:
        labels: (N,), (N, 1) or (N, C), as batches have them.
        num_outputs: C.
        problem_type: Of the model's config. None: one output is a regression; else integers (N,) are classes, and
            (N, C) of 0 and 1 are several labels, if they are floats or some row has not exactly one 1; other floats
            are targets. "auto": the same, but those are refused.

    Raises:
        OutputError: the labels are none of these, or may mean two of them.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    shape = tuple(labels.shape)
    if labels.is_floating_point() and not bool(labels.isfinite().all()):
        raise OutputError(f"labels must be finite, got NaN or inf in shape {shape}; leave those examples out")
    if labels.is_complex() or labels.ndim not in (1, 2) or (labels.ndim == 2 and shape[1] != num_outputs):
        raise OutputError(
            f"labels of shape {shape} and dtype {labels.dtype} do not fit {num_outputs} logits an example; pass class "
            f"numbers ({shape[0]},), or ({shape[0]}, {num_outputs}) of 0 and 1 or of targets"
        )
    meaning = _meaning(labels, num_outputs) if problem_type in (None, AUTO) else problem_type
    if problem_type == AUTO and meaning == REGRESSION and num_outputs > 1:
        raise OutputError(
            f"float labels of shape {shape} are not all 0 or 1, and transformers' models would take them as several "
            f"labels an example; set model.config.problem_type = {REGRESSION!r} for targets, or round them"
        )
    if meaning == REGRESSION:
        if labels.ndim == 1 and num_outputs > 1:
            raise OutputError(
                f"a regression with {num_outputs} outputs needs targets ({shape[0]}, {num_outputs}), got {shape}; "
                "load the model with num_labels=1, or without problem_type='regression' if these are classes"
            )
        return labels.double()
    if meaning == SEVERAL:
        labels = labels[:, None] if labels.ndim == 1 and num_outputs == 1 else labels
        if labels.ndim != 2 or not bool(((labels == 0) | (labels == 1)).all()):
            raise OutputError(
                f"several labels an example must be ({shape[0]}, {num_outputs}) of 0 and 1, got shape {shape} with "
                f"values from {float(labels.min()):g} to {float(labels.max()):g}; round them, or set "
                "problem_type='regression' for targets"
            )
        return labels.long()
    return _classes(labels, num_outputs)


def _meaning(labels: Tensor, num_outputs: int) -> str:
    if num_outputs == 1:
        return REGRESSION
    if labels.ndim == 1:
        return SINGLE
    binary = bool(((labels == 0) | (labels == 1)).all())
    if labels.is_floating_point():
        return SEVERAL if binary else REGRESSION
    if binary and bool((labels.long().sum(1) == 1).all()):
        raise OutputError(
            f"integer labels of shape {tuple(labels.shape)} with a single 1 in every row are either one class an "
            "example or several labels; pass labels.argmax(1), or set model.config.problem_type = "
            f"{SEVERAL!r}"
        )
    return SEVERAL


def _classes(labels: Tensor, num_outputs: int) -> Tensor:
    if labels.ndim != 1 or labels.is_floating_point():
        raise OutputError(
            f"one label an example must be integers ({labels.shape[0]},), got shape {tuple(labels.shape)} and dtype "
            f"{labels.dtype}; set model.config.problem_type to {SEVERAL!r} or {REGRESSION!r} if that is meant, and "
            "num_labels=1 for a regression to one number"
        )
    if num_outputs == 1:
        raise OutputError(
            "one logit has no classes to choose between, so its cross-entropy is 0; load the model with num_labels=2 "
            f"or with problem_type={REGRESSION!r}"
        )
    return labels.to(torch.long)
