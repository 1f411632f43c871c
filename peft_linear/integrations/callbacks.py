# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Callbacks of the Hugging Face Trainer for ProximalLoRA; they log and compute nothing themselves."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..proximal import proximal_summary


class ProximalCallback(TrainerCallback):
    """Adds the adapter's distance from the pretrained model, and how often the term acted, to every log of a Trainer.

    The keys are `proximal_distance` (‖θ−θ0‖ of the factors), `proximal_distance_delta` (of the weights),
    `proximal_lambda` (λ of the last step, with its schedule; `proximal_lambda_<adapter>` where several adapters
    differ) and `proximal_firing_rate` (fraction of the optimizer steps so far; omitted before the first step and for
    λ = 0). The term itself acts with or without this callback.

    The values are added to the log and to `trainer.state.log_history`. Trackers receive them if their callback comes
    later: `TrainingArguments(report_to="none")` with `callbacks=[ProximalCallback(), TensorBoardCallback()]`.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises `PeftLinearError` before the first step if the model has no active ProximalLoRA adapter."""
        proximal_summary(kwargs["model"])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the values to `logs` and to the Trainer's last entry of the log history, which is made from them."""
        values = proximal_summary(kwargs["model"])
        for entry in ([] if logs is None else [logs]) + state.log_history[-1:]:
            entry.update(values)
