# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Batches as a model takes them: on its device, without the labels (kept beside), checked before long work starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import OutputError, PeftLinearError, TargetError
from .batch_keys import accepted_keys, copied, nothing_taken
from .outputs import OutputFunction
from .targets import base_model


LABEL_KEYS = ("labels", "label", "label_ids")
NOT_LABEL_KEYS = ("target", "targets", "y", "class", "classes")  # called so elsewhere; the Trainer drops them
BY_EXAMPLE = ("input_ids", "attention_mask", "inputs_embeds", "decoder_input_ids", "input_values", "input_features")


@dataclass(frozen=True)
class Batch:
    """The keyword arguments of one forward pass, and the labels of its examples (None where it has none)."""

    inputs: dict[str, Any]
    labels: Tensor | None

    @property
    def size(self) -> int:
        """Of examples: the length of what has one entry an example in every model (`BY_EXAMPLE`), or of all tensors.

        Raises:
            PeftLinearError: there is no such tensor, and the lengths of the others differ.
        """
        lengths = {key: len(value) for key, value in self._tensors().items()}
        known = next((lengths[key] for key in BY_EXAMPLE if key in lengths), None)
        if known is None and len(set(lengths.values())) > 1:
            if self.labels is not None and self.labels.ndim:
                return len(self.labels)
            found = ", ".join(f"{key} {tuple(value.shape)}" for key, value in self._tensors().items())
            raise PeftLinearError(
                f"a batch's tensors have different lengths ({found}), so its number of examples is not known; pass "
                "labels, or batches of one example in which every tensor has length 1"
            )
        return next(iter(lengths.values())) if known is None else known

    @property
    def uniform(self) -> bool:
        """Whether every tensor has one entry an example, as far as lengths tell, so that a batch can be cut."""
        size = self.size
        inputs = [value for value in self.inputs.values() if isinstance(value, Tensor) and value.ndim]
        floats = [value for value in inputs if value.is_floating_point() and value.ndim > 1]
        mixed = "input_ids" in self.inputs and bool(floats)  # such as images, of which an example may have several
        others = any(isinstance(value, (list, tuple, dict)) for value in self.inputs.values())
        labels = self.labels is None or not self.labels.ndim or len(self.labels) == size
        return not mixed and not others and labels and all(len(value) == size for value in inputs)

    def _tensors(self) -> dict[str, Tensor]:
        return {key: value for key, value in self.inputs.items() if isinstance(value, Tensor) and value.ndim}

    def head(self, count: int) -> Batch:
        """The first `count` examples."""
        return self._part(slice(count))

    def tail(self, count: int) -> Batch:
        """The last `count` examples."""
        return self._part(slice(-count, None))

    def _part(self, part: slice) -> Batch:
        size = self.size
        inputs = {
            key: value[part] if isinstance(value, Tensor) and value.ndim and len(value) == size else value
            for key, value in self.inputs.items()
        }
        return Batch(inputs, None if self.labels is None else self.labels[part])

    def to(self, device: torch.device) -> Batch:
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        return Batch(inputs, None if self.labels is None else self.labels.to(device))


def read_batches(batches: Iterable[Any], model: nn.Module, needs_labels: bool, what: str) -> list[Batch]:
    """All batches, checked: mappings of tensors, not empty, with labels where `needs_labels`.

    Keys that the model's `forward` does not take (ids, texts) are left out, as the Trainer does; labels are passed to
    the model only where it makes its decoder's inputs from them. Tensors of a generator are copied: it may refill
    them.

    Raises:
        PeftLinearError: no batches, an empty one, or one that is not a mapping of tensors.
        OutputError: labels are needed and a batch has none.
    """
    if isinstance(batches, Mapping):
        batches = [batches]
    takes = accepted_keys(model)
    kept = type(batches) in (list, tuple)  # a subclass may make its batches anew, in the same memory
    feeds_labels = _feeds_labels(model)
    read = []
    for number, raw in enumerate(batches):
        if not isinstance(raw, Mapping):
            raise PeftLinearError(
                f"batch {number} is a {type(raw).__name__}, expected a dict of tensors as a DataLoader with a "
                "data collator gives; tokenise and collate the data first"
            )
        labels = copied(_labels_of(raw, number, model), kept)
        inputs = {
            key: copied(value, kept) for key, value in raw.items() if key not in LABEL_KEYS and takes(key, value)
        }
        if labels is None and (wrong := [key for key in NOT_LABEL_KEYS if key in raw and key not in inputs]):
            raise OutputError(
                f"batch {number} has {wrong[0]!r}, which {type(base_model(model)).__name__} does not take and which "
                "is not known as labels; rename it to 'labels', or leave it out"
            )
        if empty := [key for key, value in inputs.items() if isinstance(value, Tensor) and value.is_meta]:
            raise PeftLinearError(f"{empty[0]!r} of batch {number} has no values (it is on the meta device); fill it")
        if not any(isinstance(value, Tensor) and value.ndim for value in inputs.values()):
            raise nothing_taken(model, raw, number)
        if feeds_labels and labels is not None and "decoder_input_ids" not in inputs:
            inputs["labels"] = labels
        batch = Batch(inputs, labels)
        if not batch.size:
            raise PeftLinearError(f"batch {number} is empty; pass batches of at least one example")
        if needs_labels and labels is None:
            raise OutputError(
                f"batch {number} has no labels, which {what} needs; its keys are {', '.join(map(str, raw))}. "
                f"Add them under one of {', '.join(map(repr, LABEL_KEYS))}"
            )
        if labels is not None:
            _check_labels(batch, number)
        read.append(batch)
    if not read:
        raise PeftLinearError("`batches` is empty; pass at least one batch (an exhausted generator gives none)")
    return read


def evaluate(model: nn.Module, batch: Batch, function: OutputFunction, number: int) -> Tensor:
    """f of one batch, (B, C), with its graph.

    Raises:
        OutputError: f has NaN or inf, or no row an example.
    """
    try:
        outputs = model(**batch.inputs)
    except TypeError as error:
        if "forward() missing" not in str(error):
            raise
        raise nothing_taken(model, batch.inputs, number, missing=str(error).partition("forward() ")[2]) from error
    except RuntimeError as error:
        if "Inference tensors cannot be" not in str(error):
            raise
        raise TargetError(
            f"{type(base_model(model)).__name__} uses a tensor that was made inside torch.inference_mode(), through "
            "which no gradient passes; load or copy the model outside of it"
        ) from error
    return check_outputs(function(outputs, batch.labels), batch, number)


def check_outputs(outputs: Tensor, batch: Batch, number: int) -> Tensor:
    """f of one batch, as it is.

    Raises:
        OutputError: as `evaluate`.
    """
    if outputs.shape[0] != batch.size:
        raise OutputError(
            f"the model gave {outputs.shape[0]} rows of outputs for the {batch.size} examples of batch {number}"
        )
    finite = torch.isfinite(outputs.detach()).all(1)
    if not bool(finite.all()):
        example = int((~finite).nonzero()[0])
        raise OutputError(
            f"the model's outputs of example {example} in batch {number} are NaN or inf; "
            "check the weights and the inputs, or compute in float32"
        )
    return outputs


def gather_labels(batches: list[Batch], outputs: Tensor, function: OutputFunction) -> Tensor | None:
    """The labels of all examples, as `functional.labels` describes; None where there are none, or one for each token.

    Raises:
        OutputError: a batch has none beside others that have, not one for each example, or ones that do not belong to
            the model's logits.
    """
    labelled = [number for number, batch in enumerate(batches) if batch.labels is not None]
    if not labelled:
        return None
    parts = []
    for number, batch in enumerate(batches):
        if batch.labels is None:
            raise OutputError(
                f"batch {number} has no labels, and batch {labelled[0]} has; label all examples, or none of them"
            )
        if function.output.takes_tokens and batch.labels.ndim > 1:
            return None
        _check_labels(batch, number)
        parts.append(batch.labels.cpu())
    if len({(part.shape[1:], part.is_floating_point()) for part in parts}) > 1:
        kinds = sorted({f"{tuple(part.shape)} of {part.dtype}" for part in parts})
        raise OutputError(f"labels are not alike in all batches: {'; '.join(kinds)}; label all examples in one way")
    return function.output.understand(torch.cat(parts), outputs.shape[1], function.problem_type)


def progress_bar(batches: list[Batch], progress: bool, description: str) -> Iterable[Batch]:
    return tqdm(batches, desc=description, unit="batch", disable=not progress)


def _check_labels(batch: Batch, number: int) -> None:
    labels = batch.labels
    if labels is not None and (labels.ndim == 0 or len(labels) != batch.size):
        raise OutputError(
            f"batch {number} has labels of shape {tuple(labels.shape)} for {batch.size} examples; pass one label an "
            "example"
        )


def _labels_of(raw: Mapping[str, Any], number: int, model: nn.Module) -> Tensor | None:
    """The labels of one batch, (B, 1) as (B,) where they cannot be those of tokens."""
    key = next((key for key in LABEL_KEYS if raw.get(key) is not None), None)
    if key is None:
        return None
    try:
        labels = torch.as_tensor(raw[key])
    except (TypeError, ValueError, RuntimeError) as error:
        raise OutputError(
            f"the {key} of batch {number} are no numbers ({error}); pass class numbers, such as those of "
            "model.config.label2id, or targets"
        ) from error
    labels = labels if labels.layout == torch.strided else labels.to_dense()
    labels = labels.long() if labels.dtype == torch.bool else labels
    generates = getattr(base_model(model), "get_output_embeddings", lambda: None)() is not None
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 and not generates else labels


def _feeds_labels(model: nn.Module) -> bool:
    root = base_model(model)
    config = getattr(root, "config", None)
    generates = getattr(root, "get_output_embeddings", lambda: None)() is not None
    return generates and bool(getattr(config, "is_encoder_decoder", False))
