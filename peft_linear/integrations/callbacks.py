# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Callbacks of the Hugging Face Trainer for ProximalLoRA: logs, a budget of KL, KL as a term of the loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import PeftLinearError
from ..proximal import proximal_summary
from ..proximal.collect import collect_reference
from ..proximal.kl import checked_model, mean_kl, read_reference
from ..proximal.kl_budget import MEASUREMENTS, KlBudget, check_steerable, check_target
from ..tuners.proximal_lora.state import find_adapters
from .logs import know_handler, log_to_all


class ProximalCallback(TrainerCallback):
    """Logs how far an adapter is from the pretrained model, and steers λ to a budget of forgetting.

    Without arguments it adds to every log of a Trainer `proximal_distance` (‖θ−θ0‖ of the factors),
    `proximal_distance_delta` (of the weights), `proximal_lambda` (of the last step; `proximal_lambda_<adapter>` where
    several adapters differ), `proximal_exponent` and `proximal_removed_share` (Σ λ·η so far, and the share of an
    unopposed displacement that it removes). The term itself acts with or without this callback.

    With `reference=`, it also logs `kl_to_base`, KL(pretrained ‖ tuned) in nats a token on that data, twelve times a
    run; and with `target_kl=`, λ is steered so that the run ends there. An adapter with `proximal_space="function"`
    that has no reference yet gets one: it is collected from every other text or batch of the data. In function space
    the KL is measured on the rest of them alone.

    All values are in `trainer.state.log_history` and go to all trackers.

    Args:
        reference: What must not be forgotten: texts, for the tokenizer of the Trainer, or dict batches of tensors; not
            in the training data. 64 texts of what the model is used for are a good start.
        target_kl: The budget in nats a token, such as 0.05; see `KlBudget`.

    Raises:
        PeftLinearError: `target_kl` without a reference, or not a number > 0; when training begins, no active
            ProximalLoRA adapter, or what `KlBudget` and `collect_reference` raise.
    """

    def __init__(
        self,
        reference: Iterable[str] | Iterable[Mapping[str, Any]] | None = None,
        target_kl: float | None = None,
    ) -> None:
        if target_kl is not None:
            check_target(target_kl)
            if reference is None:
                raise PeftLinearError(
                    "target_kl needs reference=, texts or batches on which the KL is measured: a sample of what the "
                    "model must not forget"
                )
        self._reference = None if reference is None else parts_of(reference)
        self._target = target_kl
        self._budget: KlBudget | None = None
        self._held_out: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks the adapter and the reference, and collects statistics where they are needed."""
        model = kwargs["model"]
        proximal_summary(model)
        if self._reference is None:
            return
        if self._target is not None:
            check_steerable(model)
        tokenizer = kwargs.get("processing_class") if isinstance(self._reference[0], str) else None
        held_out = _give_reference(model, self._reference, tokenizer)
        if self._target is None:
            self._held_out = read_reference(checked_model(model), held_out, tokenizer)
            return
        self._budget = KlBudget(
            model,
            kwargs["optimizer"],
            held_out,
            self._target,
            num_steps=state.max_steps,
            scheduler=kwargs.get("lr_scheduler"),
            tokenizer=tokenizer,
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures the KL when it is due, and logs it."""
        if self._budget is not None:
            measured = self._budget.step()
            values = {} if measured is None else {"kl_to_base": measured.kl}
        elif self._held_out and _is_due(state):
            values = {"kl_to_base": mean_kl(checked_model(kwargs["model"]), self._held_out)}
        else:
            values = {}
        if values:
            log_to_all(self, args, state, control, values)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures a run that stopped early once more, and says if it missed its budget."""
        measured = None if self._budget is None else self._budget.finish()
        if measured is not None:
            log_to_all(self, args, state, control, {"kl_to_base": measured.kl})

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


know_handler(ProximalCallback, first=True)


def _is_due(state: TrainerState) -> bool:
    return state.global_step % max(1, state.max_steps // MEASUREMENTS) == 0 or state.global_step == state.max_steps


def parts_of(reference: Any) -> list[Any]:
    """A reference as a list of texts or of batches, not empty."""
    if isinstance(reference, str):
        raise PeftLinearError("the reference is one text; pass a list of texts, or batches of tensors")
    found = [reference] if isinstance(reference, Mapping) else list(reference)
    if not found:
        raise PeftLinearError("the reference is empty; pass texts or batches of what the model must not forget")
    return found


def _give_reference(model: nn.Module, parts: list[Any], tokenizer: Any) -> list[Any]:
    """Statistics to the adapters that need them, of every other part; returns the parts to measure on."""
    adapters = [each for each in find_adapters(model) if each.config.proximal_space == "function"]
    if not adapters:
        return parts
    if len(parts) < 2:
        raise PeftLinearError(
            "proximal_space='function' needs a reference of at least two texts or batches: one half for its "
            "statistics, the other to measure the KL on; or call set_proximal_reference before"
        )
    needing = [adapter for adapter in adapters if not adapter.has_reference()]
    names = list(dict.fromkeys(name for adapter in needing for name, *_ in adapter.layers()))
    if needing:
        statistics = collect_reference(model, parts[::2], targets=names, tokenizer=tokenizer, progress=False)
        for adapter in needing:
            adapter.set_reference(statistics)
    return parts[1::2]
