# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""A watch against training plain LoRA unawares: parameters that move although no optimizer hook ever saw them."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import PeftLinearError


if TYPE_CHECKING:
    from .tracked import TrackedAdapter


# One change between two backward passes without a step may be meant (a perturbation, as sharpness-aware methods do).
_CHANGES_ALLOWED = 2


class UnseenUpdateGuard:
    """Looks at one factor after each backward pass, until the first optimizer step that applies the term.

    Costs a comparison of one small tensor per backward pass until then, nothing afterwards. It finds optimizers that
    are not `torch.optim.Optimizer`s, hand-written updates, and optimizers that step flattened or sharded copies.
    """

    def __init__(self, adapter: TrackedAdapter, parameter: Tensor) -> None:
        self._adapter = weakref.ref(adapter)
        self._seen: Tensor | None = None
        self._changes = 0
        trained = parameter.requires_grad
        parameter.requires_grad_(True)  # torch registers the hook on tensors that take gradients only
        self._handle = parameter.register_post_accumulate_grad_hook(self)
        parameter.requires_grad_(trained)

    def remove(self) -> None:
        """Ends the watch."""
        self._handle.remove()

    @torch.no_grad()
    def __call__(self, parameter: Tensor) -> None:
        adapter = self._adapter()
        if adapter is None or adapter.seen:
            self.remove()
            return
        if not adapter.strengths.pulled():
            return
        value = parameter.detach()
        if self._seen is not None and self._seen.shape == value.shape and not torch.equal(self._seen, value):
            self._changes += 1
        if self._changes > _CHANGES_ALLOWED:
            raise PeftLinearError(
                f"adapter {adapter.name!r} has proximal_lambda={adapter.config.proximal_lambda}, but its parameters "
                f"were updated {self._changes} times and no optimizer step with them was seen, so plain LoRA is being "
                "trained. Either the optimizer is not a torch.optim.Optimizer: call "
                "peft_linear.attach_proximal(model, optimizer) before training. Or it steps flattened or sharded "
                "copies of the parameters (DeepSpeed ZeRO, FSDP1), which is not supported: train with DDP, or with "
                "proximal_lambda=0"
            )
        self._seen = value.clone()
