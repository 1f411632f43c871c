# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The Trainer knows its run before the first step: it sets λ of `proximal_lambda="auto"`, without a callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerState
from transformers.trainer_callback import CallbackHandler

from ..proximal.plan import plan_adapters, planned_sums
from ..tuners.proximal_lora.peft_compat import wrap
from ..tuners.proximal_lora.state import find_records


def plan_trainer_runs() -> None:
    """Wraps `CallbackHandler.on_train_begin`, for all Trainers and their subclasses, to set λ before any callback.

    Every run calls it once, also one that is resumed or begins again with a smaller batch, when the handler has the
    optimizer and the scheduler that will be used, whoever made them, with their states loaded.
    """

    def on_train_begin(original: Callable, self: CallbackHandler, args: Any, state: Any, *rest: Any, **more: Any):
        _plan(self, state)
        return original(self, args, state, *rest, **more)

    wrap(CallbackHandler, "on_train_begin", on_train_begin)


def _plan(handler: CallbackHandler, state: TrainerState) -> None:
    model: Any = getattr(handler, "model", None)
    optimizer: Any = getattr(handler, "optimizer", None)
    if model is None or not getattr(optimizer, "param_groups", None) or state.max_steps <= 0:
        return
    adapters = [adapter for record in find_records(model) for adapter in record.adapters.values()]
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    adapters = [t for t in adapters if any(id(a) in held or id(b) in held for _, _, a, b in t.layers())]
    if adapters:
        plan_adapters(adapters, optimizer, planned_sums(optimizer, handler.lr_scheduler, state.max_steps))
