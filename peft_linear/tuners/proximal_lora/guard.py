# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Detects training that bypasses the proximal term: factors that change although no optimizer hook was called."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from ...errors import PeftLinearError
from .strength import Strengths


# One change between two backward passes without a step may be meant (a perturbation, as sharpness-aware methods do).
_CHANGES_ALLOWED = 2


class UnhookedUpdateGuard:
    """Compares one factor with its last value after each backward pass, until the adapter's first optimizer step.

    The adapter removes it then; it costs one comparison of a small tensor per backward pass before, nothing after. It
    detects optimizers that are not `torch.optim.Optimizer`s, updates written by hand, and optimizers that step
    flattened or sharded copies. It holds no reference to the adapter, only a weak one to its `strengths`, which are
    deleted with the adapter.
    """

    def __init__(self, parameter: Tensor, adapter_name: str, strengths: Strengths) -> None:
        self._adapter_name = adapter_name
        self._strengths = weakref.ref(strengths)
        self._last: Tensor | None = None
        self._changes = 0
        trained = parameter.requires_grad
        parameter.requires_grad_(True)  # torch registers the hook only on tensors that take gradients
        self._handle = parameter.register_post_accumulate_grad_hook(self)
        parameter.requires_grad_(trained)

    def remove(self) -> None:
        """Removes the hook from the factor."""
        self._handle.remove()

    @torch.no_grad()
    def __call__(self, parameter: Tensor) -> None:
        strengths = self._strengths()
        if strengths is None:
            self.remove()
            return
        if not strengths.active():
            return
        value = parameter.detach()
        if self._last is not None and self._last.shape == value.shape and not torch.equal(self._last, value):
            self._changes += 1
        if self._changes > _CHANGES_ALLOWED:
            raise PeftLinearError(
                f"adapter {self._adapter_name!r} has proximal_lambda={strengths.config.proximal_lambda}, but its "
                f"parameters were updated {self._changes} times without an optimizer step that peft_linear could "
                "intercept, so plain LoRA is being trained. Either the optimizer is not a torch.optim.Optimizer: call "
                "peft_linear.attach_proximal(model, optimizer) before training. Or it steps flattened or sharded "
                "copies of the parameters (DeepSpeed ZeRO, FSDP1), which is not supported: train with DDP, or with "
                "proximal_lambda=0"
            )
        self._last = value.clone()
