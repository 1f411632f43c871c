# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`KlToBaseCallback`: KL(pretrained ‖ tuned) on reference data as a term of the loss, for any Trainer."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..capture.batches import Batch
from ..capture.conditions import device_of
from ..errors import OutputError, PeftLinearError
from ..proximal.kl import checked_model, read_reference, summed_kl
from .callbacks import parts_of


class KlToBaseCallback(TrainerCallback):
    """Adds `weight`·KL(pretrained ‖ tuned) on reference data to the loss, once an optimizer step.

    For any adapter of peft and any Trainer. The gradient is added when a step begins, before the first of its
    micro-batches: so it is there once whatever the accumulation, label smoothing, packing or loss, and is clipped
    together with the loss's. The batches are taken in turn, in an order that depends on the step alone, so that a
    resumed run is the uninterrupted one. In a run of several processes each must get the same reference.

    Logs `kl_to_base_loss`, the mean of the KL over the steps since the last log.

    Args:
        reference: Texts, for the tokenizer of the Trainer, or dict batches of tensors; not in the training data.
        weight: Of the term, > 0; 1 weighs a nat on the reference as a nat on the data.
        batch_size: Texts a step; of batches, one is taken a step as it is.

    Raises:
        PeftLinearError: an invalid argument; when training begins: no adapter, fp16 (its gradients are scaled), or
            DeepSpeed.

    Cost: a step takes a forward pass without and one with gradients and a backward pass of these texts more.
    """

    def __init__(
        self, reference: Iterable[str] | Iterable[Mapping[str, Any]], weight: float = 1.0, batch_size: int = 2
    ) -> None:
        proper = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
        if not proper or not 0 < weight < math.inf:
            raise PeftLinearError(f"weight must be a finite number > 0, got {weight!r}")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise PeftLinearError(f"batch_size must be a positive number of texts, got {batch_size!r}")
        self._reference, self._weight, self._size = parts_of(reference), float(weight), batch_size
        self._batches: list[Batch] = []
        self._sum: torch.Tensor | float = 0.0
        self._count = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks the model and tokenises the reference."""
        if args.fp16 or args.deepspeed:
            raise PeftLinearError(
                "KlToBaseCallback adds gradients of its own, which "
                + ("fp16 training would scale down; train with bf16=True" if args.fp16 else "DeepSpeed does not take")
            )
        model = checked_model(kwargs["model"])
        parts: list[Any] = self._reference
        tokenizer = None
        if isinstance(parts[0], str):
            tokenizer = kwargs.get("processing_class")
            groups = [parts[start : start + self._size] for start in range(0, len(parts), self._size)]
            self._batches = [batch for group in groups for batch in read_reference(model, group, tokenizer)]
        else:
            self._batches = read_reference(model, parts, None)
        self._sum, self._count = 0.0, 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Adds the gradient of the term."""
        model = checked_model(kwargs["model"])
        number = self._turn(state.global_step)
        with torch.autocast(device_of(model).type, torch.bfloat16, enabled=bool(args.bf16)):
            total, count = summed_kl(model, self._batches[number], number)
        if not count:
            raise OutputError(f"batch {number} of the reference predicts nothing: pass texts of two tokens or more")
        loss = total / count
        (self._weight * loss).backward()
        self._sum, self._count = self._sum + loss.detach(), self._count + 1

    def _turn(self, step: int) -> int:
        """The batch of a step: a permutation of all, another in every pass."""
        passes, place = divmod(step, len(self._batches))
        generator = torch.Generator().manual_seed(passes)
        return int(torch.randperm(len(self._batches), generator=generator)[place])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the mean of the KL to `logs` and to the Trainer's last entry of the log history."""
        if not self._count:
            return
        value = float(self._sum) / self._count
        self._sum, self._count = 0.0, 0
        for entry in ([] if logs is None else [logs]) + state.log_history[-1:]:
            entry["kl_to_base_loss"] = value
