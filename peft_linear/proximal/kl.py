# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""KL(pretrained ‖ tuned) of an adapted model, in nats a prediction: what forgetting follows.

The pretrained model is the same model with its adapters off, so it takes no memory of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

from ..capture.batches import Batch, read_batches
from ..capture.conditions import check_present, device_of, unwrapped
from ..capture.outputs import label_shift, logits_of
from ..capture.targets import base_model
from ..errors import OutputError, PeftLinearError
from .reference_data import adapters_off, counted_predictions, tokenised


POSITIONS = 256  # whose probabilities are in memory at once


def kl_to_base(
    model: nn.Module, batches: Iterable[Mapping[str, Any]] | Iterable[str], *, tokenizer: Any = None
) -> float:
    """KL(pretrained ‖ tuned), the mean over the predictions of reference data, in nats.

    Of a language model, a prediction is the next token at every position that is not padding, or, where batches have
    token labels, that of a label other than -100. Of a classifier it is an example. The model computes without
    dropout, and is left as it was found.

    Args:
        model: A model with an adapter of peft, which is not merged.
        batches: Dict batches of tensors, as a DataLoader gives them; or texts, with `tokenizer`.
        tokenizer: Of texts, which are cut off after 512 tokens.

    Returns:
        Nats a prediction. In a run of several processes, in which all must call it, the mean of theirs.

    Raises:
        PeftLinearError: no adapter, a merged one, no batches, or texts without a tokenizer.
        OutputError: the model has no logits, they are not finite, or nothing is predicted.

    Cost: two forward passes a batch. Logits of one batch twice, and the probabilities of 256 positions.
    """
    model = checked_model(model)
    return mean_kl(model, read_reference(model, batches, tokenizer))


def kl_to_base_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """KL(pretrained ‖ tuned) on one batch, in nats a prediction, as a term of a loss: a scalar with a gradient.

    As `kl_to_base` in all else; dropout is off in both passes.

    Cost: a forward pass without and one with gradients.
    """
    model = checked_model(model)
    total, count = summed_kl(model, read_reference(model, [batch], None)[0], 0)
    if not count:
        raise OutputError("the batch predicts nothing: every text is one token, or every label is -100")
    return total / count


def checked_model(model: nn.Module) -> nn.Module:
    """The model without wrappers, if it has weights and an adapter."""
    model = unwrapped(model)
    check_present(model)
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise PeftLinearError(
            "the model has no adapter, so it is its own pretrained model; pass the model that get_peft_model returned"
        )
    return model


def read_reference(model: nn.Module, batches: Any, tokenizer: Any) -> list[Batch]:
    """Batches or texts, checked."""
    return read_batches(tokenised(batches, tokenizer), model, False, "a reference")


@torch.no_grad()
def mean_kl(model: nn.Module, batches: list[Batch]) -> float:
    """`kl_to_base` of what was checked before."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for number, batch in enumerate(batches):
        part, predictions = summed_kl(model, batch, number)
        total, count = total + part.cpu().double(), count + predictions
    if not count:
        raise OutputError("the reference predicts nothing: every text is one token, or every label is -100")
    return max(0.0, float(_shared(total / count, device_of(model))))  # a sum that is 0 may round below it


def summed_kl(model: nn.Module, batch: Batch, number: int) -> tuple[Tensor, int]:
    """Σ KL over the predictions of a batch, and their number."""
    batch = batch.to(device_of(model))
    shift = label_shift(base_model(model))
    with evaluating(model):
        with torch.no_grad(), adapters_off(model):
            base = logits_of(model(**batch.inputs))
        tuned = logits_of(model(**batch.inputs))
    counts = counted_predictions(tuned, batch, shift)
    base, tuned = ((each[:, :-1] if shift else each)[counts] for each in (base, tuned))
    total = tuned.sum() * 0.0 if not len(tuned) else _divergences(base, tuned)
    if not bool(torch.isfinite(total.detach())):
        raise OutputError(f"the model's outputs in batch {number} of the reference are NaN or inf")
    return total, len(tuned)


def _divergences(base: Tensor, tuned: Tensor) -> Tensor:
    """Σ KL over rows of logits; with gradients, the probabilities are computed again in the backward pass."""
    sums = []
    for before, now in zip(base.split(POSITIONS), tuned.split(POSITIONS), strict=True):
        sums.append(checkpoint(_divergence, before, now, use_reentrant=False) if now.requires_grad else
                    _divergence(before, now))  # fmt: skip
    return torch.stack(sums).sum()


def _divergence(base: Tensor, tuned: Tensor) -> Tensor:
    dtype = torch.float64 if tuned.dtype == torch.float64 else torch.float32
    before, now = base.to(dtype).log_softmax(-1), tuned.to(dtype).log_softmax(-1)
    return (before.exp() * (before - now)).sum(-1).sum()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout inside; every module's mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _shared(value: Tensor, device: torch.device) -> Tensor:
    """The mean over the processes of a run, the same to the bit in all."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return value
    gloo = distributed.get_backend() == "gloo"
    value = value.to("cpu" if gloo else device, torch.float64 if device.type != "mps" else torch.float32)
    distributed.all_reduce(value)
    return value / distributed.get_world_size()
