# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`recommend_modules` of a Trainer, of rows of text or chats, and of batches."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from ..capture.targets import base_model
from ..errors import BudgetError, PeftLinearError
from ..report.recommendation import Recommendation
from ..selection.criteria import DEFAULT_NAME
from ..selection.request import default_outputs
from ..selection.request import recommend_modules as recommend_from_batches
from .calibration import calibration_batches
from .language_rows import FIVE_FORMATS
from .restrict import adapter_name_of
from .trainers import adapter_candidates, planned_training
from .trl_data import language_batches, looks_like_rows


def recommend_modules(
    model: nn.Module | Trainer,
    batches: Any = None,
    budget: int | float | str | None = None,
    criterion: str = DEFAULT_NAME,
    ridge: float | None = None,
    strategy: str = "greedy",
    *,
    tokenizer: Any = None,
    args: Any = None,
    examples: int | None = None,
    batch_size: int | None = None,
    **options: Any,
) -> Recommendation:
    """The modules to adapt, before training; for a language model their ranks and the learning rate too.

    Three forms, of which the first two take language data as TRL trains on them:

        recommend_modules(trainer, budget=0.125)                                  # of a Trainer or SFTTrainer
        recommend_modules(model, dataset, tokenizer=tokenizer, budget=0.125)      # rows of text or chats
        recommend_modules(model, batches, budget=8)                               # batches of tensors

    - A Trainer gives its model, its prepared training data and collator, and the optimizer, batch size, learning rate
      and steps of its arguments (`training`). Where its model has a LoRA adapter, candidates are the modules that
      carry it, at its rank.
    - A dataset with a tokenizer is prepared by `language_batches`.
    - Batches are taken as `compute_ntk` takes them.

    Args:
        model: Left as it was found; or a Trainer.
        batches: Dict batches (a DataLoader); or rows, with `tokenizer`; nothing with a Trainer.
        budget: As for `recommend`; there is no default.
        criterion, ridge, strategy: As for `recommend`.
        tokenizer: Of rows of text or chats.
        args: Of rows: the `trl.SFTConfig` of the training that is planned, or a dict of its fields.
        examples: Of a Trainer's data or of rows: a random sample, the first of a stream. Default: 64.
        batch_size: Examples in a forward pass. Default: that of the Trainer, or of `args`.
        **options: `seed`, `exclude` and `training` as for `recommend`; `head_steps`, the steps for which a task head
            is trained, alone and for this computation only (default: 20 for gradient energy where there is a head,
            else 0; 0: the head as it is); the arguments of `compute_ntk` (`targets`, `space`, `rank`, `draws`,
            `outputs`, `resources`, …); and `ranks`. For a language model, if nothing of this but `targets`, `rank`,
            `lora_alpha`, `ranks`, `seed`, `training` and `resources` is passed, modules, ranks and learning rate are
            one decision without kernels (`selection.language`): `ranks` are those that a module may have, by default
            1 to 32, and `rank` alone where the budget counts modules or an adapter is there. Otherwise kernels
            decide: `outputs` defaults to "log_likelihood" for language models, then `draws` to 32, and to "logits"
            for others, with 8 draws for the kernels through heads; `draws` that are passed are taken everywhere.

    Raises:
        PeftLinearError: or a subclass, as `compute_ntk`, `recommend` and `language_batches`.
    """
    if isinstance(batches, PreTrainedTokenizerBase) or isinstance(budget, PreTrainedTokenizerBase):
        raise PeftLinearError(
            "pass the tokenizer by name: recommend_modules(model, dataset, tokenizer=tokenizer, ...)"
        )
    if budget is None:
        raise BudgetError("there is no budget; pass one, for example budget=8 (modules) or budget=0.125")
    sampling = {"examples": examples, "batch_size": batch_size}
    if isinstance(model, Trainer):
        if batches is not None or tokenizer is not None or args is not None:
            raise PeftLinearError(
                "a Trainer brings its data, tokenizer and arguments: pass recommend_modules(trainer, budget=...), or "
                "trainer.model with data of your own"
            )
        model, batches, defaults = _of_trainer(model, criterion, options, sampling)
        options = {**defaults, **options}
    elif tokenizer is not None:
        _require_language_model(model)
        batches = language_batches(batches, tokenizer, args, seed=options.get("seed", 0), **_given(sampling))
        _require_ids_of(model, batches)
        if isinstance(args, TrainingArguments):
            options.setdefault("training", planned_training(args, criterion))
    elif batches is None:
        raise PeftLinearError(
            "there are no data: pass a Trainer, or a model with batches, or a model with a dataset and its tokenizer"
        )
    elif looks_like_rows(batches):
        raise PeftLinearError(
            "rows need the model's tokenizer: recommend_modules(model, dataset, tokenizer=tokenizer, ...). Formats: "
            f"{FIVE_FORMATS}"
        )
    elif args is not None or any(value is not None for value in sampling.values()):
        raise PeftLinearError(
            "args, examples and batch_size are for rows with a tokenizer; batches are taken as they are"
        )
    return recommend_from_batches(model, batches, budget, criterion, ridge, strategy, **options)


def _of_trainer(
    trainer: Trainer, criterion: str, options: dict[str, Any], sampling: dict[str, Any]
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Its model, batches of its data, and the options that follow from its adapter and its arguments."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    defaults: dict[str, Any] = {"training": planned_training(trainer.args, criterion, trainer)}
    if isinstance(model, PeftModel):
        defaults |= adapter_candidates(model, adapter_name_of(model))
    batches = calibration_batches(
        None,
        model,
        processing_class=trainer.processing_class,
        trainer=trainer,
        seed=options.get("seed", 0),
        **{"batch_size": trainer.args.train_batch_size, **_given(sampling)},
    )
    return model, batches, defaults


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _require_language_model(model: nn.Module) -> None:
    config = getattr(base_model(model), "config", None)
    if default_outputs(model) != "log_likelihood" or getattr(config, "is_encoder_decoder", False):
        raise PeftLinearError(
            f"{type(base_model(model)).__name__} is no causal language model, for which rows are prepared; pass "
            "tokenised batches with labels"
        )


def _require_ids_of(model: nn.Module, batches: list[dict[str, Any]]) -> None:
    """The tokenizer is the model's, as far as the size of its vocabulary tells."""
    embeddings = getattr(base_model(model), "get_input_embeddings", lambda: None)()
    largest = max(int(batch["input_ids"].max()) for batch in batches)
    if isinstance(embeddings, nn.Embedding) and largest >= embeddings.num_embeddings:
        raise PeftLinearError(
            f"the tokenizer gives the token id {largest}, and {type(base_model(model)).__name__} has "
            f"{embeddings.num_embeddings} embeddings; pass the model's own tokenizer, or call "
            "model.resize_token_embeddings(len(tokenizer))"
        )
