# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Logs of a callback that reach the other callbacks of its Trainer, those before it in the list included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from ..tuners.proximal_lora.peft_compat import wrap


# Callback -> the handler that it was last added to. Kept here: a callback holds nothing that cannot be pickled.
_HANDLERS: WeakKeyDictionary[TrainerCallback, ref[CallbackHandler]] = WeakKeyDictionary()
_KINDS: dict[type[TrainerCallback], bool] = {}  # classes of which the handlers are known; whether they come first


def log_to_all(
    callback: TrainerCallback,
    args: TrainingArguments,
    state: TrainerState,
    control: TrainerControl,
    values: Mapping[str, float],
) -> None:
    """Logs as `Trainer.log` does: an entry in the log history, and `on_log` of every callback, trackers among them.

    No event passes the Trainer to a callback, and trackers (`report_to`) come before the user's callbacks in every
    event, so what a callback adds to the logs of an `on_log` they never see. The handler, which calls them all, is
    the one that `callback` was added to, if any.
    """
    logs = dict(values) if state.epoch is None else {**values, "epoch": state.epoch}
    state.log_history.append({**logs, "step": state.global_step})
    reference = _HANDLERS.get(callback)
    handler = reference() if reference is not None else None
    if handler is not None:
        handler.on_log(args, state, control, logs)


def know_handler(kind: type[TrainerCallback], first: bool = False) -> None:
    """Wraps `CallbackHandler.add_callback` to remember the handler of each callback of this class.

    `first`: the callback is put before all others, so that trackers get what it adds to the logs.
    """

    _KINDS[kind] = first

    def add_callback(original: Callable, self: CallbackHandler, callback: Any) -> None:
        original(self, callback)
        added: TrainerCallback = self.callbacks[-1]
        if isinstance(added, tuple(_KINDS)):
            _HANDLERS[added] = ref(self)
        if any(put_first and isinstance(added, each) for each, put_first in _KINDS.items()):
            self.callbacks.insert(0, self.callbacks.pop())

    wrap(CallbackHandler, "add_callback", add_callback)
