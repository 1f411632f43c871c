# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The Trainer that calls a callback, and how it makes batches of its rows."""

from __future__ import annotations

import sys
from typing import Any

from transformers import Trainer, TrainerCallback


def trainer_of(callback: TrainerCallback) -> Trainer | None:
    """The Trainer that is calling this callback now; None where a callback is called by hand.

    No event passes the Trainer, and its data and collator are known to it alone (TRL's trainers prepare both), so it
    is looked for among the calls that led here.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and callback in getattr(owner.callback_handler, "callbacks", ()):
            return owner
        frame = frame.f_back
    return None


def columns_of(trainer: Trainer) -> set[str] | None:
    """The columns that the Trainer leaves in a row for its collator; None: all of them."""
    if not trainer.args.remove_unused_columns:
        return None
    trainer._set_signature_columns_if_needed()
    return {*(trainer._signature_columns or ()), *trainer.label_names, "label", "label_ids"}
