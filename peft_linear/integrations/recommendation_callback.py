# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`NtkRecommendationCallback`: recommends, and if asked restricts to, the modules to adapt when a Trainer is made."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..capture.resources import Resources
from ..errors import FileError, PeftLinearError
from ..files import write_text
from ..recommendation.budget import BudgetLike
from ..recommendation.data import JSON_NAME
from ..report.recommendation import Recommendation
from ..report.writer import HTML_NAME, write_report
from ..selection.criteria import DEFAULT_NAME
from ..selection.request import ModuleRequest
from .calibration import calibration_batches
from .logs import know_handler, log_to_all
from .main_process import on_main_process
from .model_cards import keep_in_model_cards
from .restrict import adapter_name_of, checkpoint_modules, require_modules, restrict_adapter
from .trainers import adapter_candidates, planned_training, trainer_of


logger = logging.get_logger(__name__)

ACTIONS = ("report", "restrict")


class NtkRecommendationCallback(TrainerCallback):
    """Chooses modules by their neural tangent kernels before the first step of a Trainer.

    Pass it to the constructor, `Trainer(..., callbacks=[NtkRecommendationCallback(...)])`: it works when the Trainer
    is made (`on_init_end`), on the training device, before an optimizer exists. The function `recommend_modules`
    before `get_peft_model` is the more direct way; use this one where a script makes the model and the Trainer for
    you.

    - "report": writes the recommendation into `args.output_dir` and changes nothing. Candidates are the modules that
      carry the active adapter, or every linear module of a model without one.
    - "restrict": also removes the adapter from the modules that were not chosen (their base layers are restored and
      `target_modules` is rewritten), so that they do not train and are not saved.

    **Resuming.** The choice is read from the checkpoint's adapter_config.json, not made again. Which checkpoint will
    be resumed is not known when the Trainer is made, so it is looked up in this order: `resume_from_checkpoint` here,
    `args.resume_from_checkpoint`, the last checkpoint in `args.output_dir`. A new run into an old `output_dir`
    therefore repeats the old choice (a warning says so): pass `resume_from_checkpoint=False`, or another folder, to
    choose anew. When training begins the modules are compared with the choice again, and with the checkpoint.

    **Logging.** When training begins the summary (`ntk_modules`, `ntk_parameters`, `ntk_condition_number`,
    `ntk_predicted_loss`, …) is logged as by `Trainer.log`: in the log history, and seen by every other callback of the
    Trainer, trackers (`report_to`) included. A resumed run has it in its log history already and does not repeat it.

    **Report and model card.** recommendation.json, recommendation.md, report.html and a figure are written into
    `args.output_dir`; after training report.html also has the measured losses, if any were logged. Every model card
    written for a PeftModel from then on (`save_pretrained`, `push_to_hub`, `Trainer.create_model_card`,
    `Trainer.push_to_hub`) has a section with the choice and its predictions.

    **Several processes.** The main process chooses, or reads the checkpoint's choice, and sends it to the others; all
    restrict to it.

    Ranks are those of the adapter that exists: for `r="adaptive"` use `recommend_modules(...).to_config` before
    `get_peft_model`.

    Args:
        data: Batches (an iterable of dicts, a DataLoader), or examples (a dataset, a stream or a list of features)
            that `data_collator`, by default the Trainer's, makes into batches. None (the default), or rows of text as
            TRL's trainers take them: the Trainer's own training data, as it has prepared them.
        budget: As for `recommend`; there is no default.
        action: "report" or "restrict".
        criterion, seed: As for `recommend`.
        data_collator, examples, batch_size: As for `integrations.calibration.calibration_batches`.
        adapter_name: Default: the active adapter.
        resume_from_checkpoint: A checkpoint's folder; True: the last one in `output_dir`; False: none.
        **options: Other arguments of `recommend_modules`, those of `compute_ntk` among them (`exclude`, `space`,
            `outputs`, …). `training` is read from the Trainer's arguments unless it is passed.

    Raises:
        PeftLinearError: when the Trainer is made: whatever `recommend_modules` refuses; "restrict" with a model that
            has no LoRA adapter on a linear layer, or with an optimizer that exists already. When training begins:
            "restrict" in a callback that was added later (`trainer.add_callback`), or a model that is not the
            restricted one (`model_init`).
    """

    def __init__(
        self,
        data: Any = None,
        budget: BudgetLike | None = None,
        action: str = "report",
        *,
        criterion: str = DEFAULT_NAME,
        seed: int = 0,
        data_collator: Any = None,
        examples: int | None = None,
        batch_size: int = 16,
        adapter_name: str | None = None,
        resume_from_checkpoint: str | os.PathLike | bool | None = None,
        **options: Any,
    ) -> None:
        if action not in ACTIONS:
            raise PeftLinearError(f"unknown action {action!r}; there are: {', '.join(ACTIONS)}")
        if budget is None:
            raise PeftLinearError("there is no budget; pass one, for example budget=8 (modules) or budget=0.125")
        self.data = data
        self.budget: BudgetLike = budget
        self.action = action
        self.adapter_name = adapter_name
        self.resume_from_checkpoint = resume_from_checkpoint
        self.recommendation: Recommendation | None = None  # None before, and after a resume without a saved one
        self.modules: tuple[str, ...] = ()  # the choice, from the kernels or from the checkpoint
        self._choosing = {"criterion": criterion, "seed": seed, **options}
        self._sampling = {
            "data_collator": data_collator,
            "examples": examples,
            "batch_size": batch_size,
            "seed": seed,
        }
        self._ready = False

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Chooses, and restricts if asked."""
        model = kwargs["model"]
        restrict = self.action == "restrict"
        adapter = adapter_name_of(model, self.adapter_name) if restrict else None
        if restrict and kwargs.get("optimizer") is not None:
            raise PeftLinearError(
                "an optimizer was passed to the Trainer; it would go on training the modules that are not chosen. "
                "Restrict before it is made, with recommend_modules(...).to_config(), or let the Trainer make it"
            )
        self._choose(args, state, model, kwargs.get("processing_class"))
        if restrict:
            restrict_adapter(model, self.modules, adapter)
        self._ready = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks that what trains is what was chosen, and logs the summary."""
        model = kwargs["model"]
        if not self._ready:
            if self.action == "restrict":
                raise PeftLinearError(
                    'NtkRecommendationCallback(action="restrict") was added after the Trainer was made, when the '
                    "optimizer already holds all modules; pass it as Trainer(..., callbacks=[...])"
                )
            self._choose(args, state, model, kwargs.get("processing_class"))
            self._ready = True
        if self.action == "restrict":
            adapter = adapter_name_of(model, self.adapter_name)
            require_modules(model, self.modules, adapter)
            checkpoint = Path(args.output_dir or "", f"checkpoint-{state.global_step}")
            if state.global_step and checkpoint.is_dir():
                self._require_checkpoint(model, checkpoint, adapter)
        if self.recommendation is not None and not any("ntk_modules" in entry for entry in state.log_history):
            log_to_all(self, args, state, control, summary(self.recommendation))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Adds the measured values to report.html."""
        history = [
            e for e in state.log_history if any(math.isfinite(e.get(k, math.nan)) for k in ("loss", "eval_loss"))
        ]
        if self.recommendation is not None and state.is_world_process_zero and history:
            page = self.recommendation.to_html(history=history)
            write_text(Path(args.output_dir or ".") / HTML_NAME, page)

    def _choose(self, args: TrainingArguments, state: TrainerState, model: torch.nn.Module, processing: Any) -> None:
        output = Path(args.output_dir or ".")
        candidates: dict[str, Any] = {}
        trainer = trainer_of(self)
        if isinstance(model, PeftModel):
            candidates |= adapter_candidates(model, adapter_name_of(model, self.adapter_name))

        def decide() -> tuple[Recommendation | None, tuple[str, ...]]:
            checkpoint = self._checkpoint(args)
            earlier = None if checkpoint is None else self._recall(output, model, checkpoint)
            if earlier is not None:
                return earlier
            batches = calibration_batches(
                self.data, model, processing_class=processing, trainer=trainer, **self._sampling
            )
            training = planned_training(args, self._choosing["criterion"], trainer)
            found = self._request({"training": training, **candidates}).recommend(model, batches)
            write_report(found, output)
            return found, found.modules

        self.recommendation, self.modules = on_main_process(decide, state.is_world_process_zero)
        if self.recommendation is not None and isinstance(model, PeftModel):
            keep_in_model_cards(model, self.recommendation, self.adapter_name)

    def _request(self, defaults: dict[str, Any]) -> ModuleRequest:
        options = {**defaults, **self._choosing}
        resources = options.pop("resources", Resources(progress=options.pop("progress", True)))
        own = {name: options.pop(name) for name in list(options) if name in ModuleRequest.__dataclass_fields__}
        # the main process computes alone; the others wait for it
        return ModuleRequest(
            budget=self.budget, **own, kernels=options, resources=replace(resources, distributed=False)
        )

    def _require_checkpoint(self, model: PeftModel, checkpoint: Path, adapter: str) -> None:
        saved = checkpoint_modules(model, checkpoint, adapter)
        if set(saved) != set(self.modules):
            raise PeftLinearError(
                f"{checkpoint} holds an adapter on {', '.join(saved)}, but {', '.join(self.modules)} were chosen; "
                f"pass resume_from_checkpoint={os.fspath(checkpoint)!r} to NtkRecommendationCallback"
            )

    def _recall(
        self, output: Path, model: torch.nn.Module, checkpoint: str
    ) -> tuple[Recommendation | None, tuple[str, ...]] | None:
        """The choice of an earlier run; None where there is none to take."""
        earlier = Recommendation.load(output) if (output / JSON_NAME).is_file() else None
        if self.action == "report":
            return None if earlier is None else (earlier, earlier.modules)
        assert isinstance(model, PeftModel)
        modules = checkpoint_modules(model, checkpoint, self.adapter_name)
        return (earlier if earlier is not None and set(earlier.modules) == set(modules) else None), modules

    def _checkpoint(self, args: TrainingArguments) -> str | None:
        wanted = self.resume_from_checkpoint
        if wanted is None:
            wanted = args.resume_from_checkpoint
        if wanted is False:
            return None
        if wanted is not None and wanted is not True:
            if not os.path.isdir(wanted):
                raise FileError(f"there is no checkpoint folder {os.fspath(wanted)!r} to read the choice from")
            return os.fspath(wanted)
        output = args.output_dir
        last = get_last_checkpoint(output) if output and os.path.isdir(output) else None
        if last is None and wanted is True:
            raise FileError(f"there is no checkpoint in {output!r} to resume from; train once without resuming first")
        if last is not None and wanted is None:
            logger.warning(
                f"{output} holds {os.path.basename(last)}: the modules of its adapter are kept, so that it can be "
                "resumed. To choose again, pass resume_from_checkpoint=False to NtkRecommendationCallback."
            )
        return last


def summary(recommendation: Recommendation) -> dict[str, float]:
    """The recommendation as scalars for logs."""
    rec = recommendation
    chosen = rec.spectra.get("chosen")
    values = {
        "ntk_modules": float(len(rec.modules)),
        "ntk_candidates": float(len(rec.scores)),
        "ntk_parameters": float(rec.parameters),
        "ntk_score": float(math.nan if rec.settings.set_score is None else rec.settings.set_score),
    }
    if chosen is not None and rec.ridge is not None:
        values["ntk_condition_number"] = chosen.condition_number(rec.ridge)
        values["ntk_effective_dimension"] = chosen.effective_dimension(rec.ridge)
    for key in ("loss", "accuracy", "distance", "leave_one_out_accuracy", "leave_one_out_squared_loss"):
        if key in rec.predicted:
            values[f"ntk_predicted_{key}"] = float(rec.predicted[key])
    return values


know_handler(NtkRecommendationCallback)
