# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Setting (b) of the forgetting benchmark: a small causal language model that moves to one section of the archive.

`examples.common.language_model` pretrains it on every section but one. Adapters then learn the section that was left
out. What the model forgets is measured on held-out descriptions of all the others: their loss, and how far the
predictions moved (KL divergence from the base model).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.benchmarks.forgetting.training import Measure, Protocol
from examples.common.language_model import (
    LanguageModelOptions,
    PretrainedLanguageModel,
    endless,
    in_order_of_length,
    predictions,
)


class LanguageModelSetting(PretrainedLanguageModel):
    """A language model that is pretrained here, and a section that it has not been trained on."""

    key = "language_model"
    title = "A language model moves to a new section"
    target = "held-out loss on the new section (nats a token)"
    measures = (
        Measure("rest_loss", "held-out loss gained on the rest (nats a token)", +1),
        Measure("kl", "KL from the base model on the rest (nats a token)", +1),
    )
    lora = {"target_modules": r".*\.(c_attn|c_proj|c_fc)", "fan_in_fan_out": True}  # noqa: RUF012

    def __init__(self, options: LanguageModelOptions, protocol: Protocol, cache: Path) -> None:
        super().__init__(options, cache)
        self.protocol = protocol

    def new_model(self, seed: int) -> nn.Module:
        return copy.deepcopy(self.base)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of this seed's texts without end: tokens (n, t) and mask (n, t)."""
        texts, generator = self.split(seed)[0], random.Random(seed)
        return endless(texts, self.protocol.batch_size, generator)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        log_probabilities, targets = predictions(model, batch)
        return nn.functional.nll_loss(log_probabilities, targets)

    @cached_property
    def base_predictions(self) -> list[Tensor]:
        return [predictions(self.base, batch)[0] for batch in in_order_of_length(self.others)]

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, seed: int, split: str = "test") -> dict[str, float]:
        _, validation, test = self.split(seed)
        target, _ = self.mean_loss(model, validation if split == "validation" else test)
        rest, divergence = self.mean_loss(model, self.others, self.base_predictions)
        return {"target_loss": target, "rest_loss": rest, "kl": divergence}

    def mean_loss(
        self, model: nn.Module, texts: Sequence[list[int]], base: Sequence[Tensor] | None = None
    ) -> tuple[float, float]:
        """Mean over tokens of the loss, and of KL(base ‖ model)."""
        loss = divergence = 0.0
        count = 0
        for number, batch in enumerate(in_order_of_length(texts)):
            log_probabilities, targets = predictions(model, batch)
            count += len(targets)
            loss += float(nn.functional.nll_loss(log_probabilities, targets, reduction="sum"))
            if base is not None:
                divergence += float(
                    nn.functional.kl_div(log_probabilities, base[number], reduction="sum", log_target=True)
                )
        return loss / count, divergence / count
