# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The reference in a Hugging Face Trainer's events: after clipping and before the step; after the step."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from tests.helpers.reference_proximal import ReferenceProximal


class ByHand(TrainerCallback):
    """Trains plain LoRA and does the proximal term itself; `options` are those of `ReferenceProximal`.

    The reference is made at the first step: a trainer that is given a `peft_config` makes the adapter itself.
    `start`: parameter name -> θ0, where that is not where this training begins.
    """

    def __init__(self, *, lam: float, start: dict | None = None, **options: Any) -> None:
        self.lam, self.start, self.options = lam, start, options
        self.reference: ReferenceProximal | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.reference = ReferenceProximal(model, lam=self.lam, **self.options)
        if self.start is not None:
            assert self.start.keys() == self.reference.start.keys()
            self.reference.start = self.start

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates = self.reference.rates(optimizer)
        self.reference.before_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.reference.after_step(self.rates)

    @property
    def fired(self) -> list[bool]:
        """Whether the term acted, for every optimizer step."""
        return self.reference.fired
