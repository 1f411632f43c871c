# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What a Trainer knows: which one calls a callback, the columns of its rows, its adapter, and the run it plans."""

from __future__ import annotations

import math
import sys
from typing import Any

from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..errors import TargetError
from ..recommendation.ranks import plain_alpha
from ..selection.criteria import DEFAULT_NAME
from ..selection.request import default_outputs
from ..selection.training import Training
from .restrict import adapted_modules


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


def adapter_candidates(model: PeftModel, adapter: str) -> dict[str, Any]:
    """The modules that carry the adapter, and what `compute_ntk` has to know of it.

    Raises:
        TargetError: it is on no linear layer, or not LoRA.
    """
    config: Any = model.peft_config[adapter]
    modules = list(adapted_modules(model, adapter))
    if not modules:
        raise TargetError(
            f"adapter {adapter!r} ({config.peft_type}) is not LoRA on any linear layer: there is nothing to choose; "
            "use a LoraConfig or a ProximalLoraConfig"
        )
    return {"targets": modules, "rank": config.r, "lora_alpha": plain_alpha(config)}


def planned_training(args: TrainingArguments, criterion: str, trainer: Trainer | None = None) -> Training:
    """The training that the arguments describe; every optimizer but SGD normalises its steps as Adam does.

    With a Trainer also its steps and, unless the model is a language model, whose rate is recommended, its rate.
    """
    sgd = criterion == DEFAULT_NAME and str(getattr(args.optim, "value", args.optim)).startswith("sgd")
    batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    plan = {"optimizer": "sgd" if sgd else None, "batch_size": batch_size}
    if trainer is not None and args.learning_rate > 0:
        plan["steps"] = _steps(args, trainer.train_dataset, batch_size)
        if trainer.model is None or default_outputs(trainer.model) != "log_likelihood":
            plan["learning_rate"] = args.learning_rate
    return Training(**plan)


def _steps(args: TrainingArguments, rows: Any, batch_size: int) -> int:
    """Optimizer steps of the run, as the Trainer counts them up to a last batch that is not full."""
    if args.max_steps > 0 or not hasattr(rows, "__len__"):
        return max(1, args.max_steps)
    return max(1, math.ceil(args.num_train_epochs * max(1, math.ceil(len(rows) / batch_size))))
