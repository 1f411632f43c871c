# Copyright 2026 The peft-linear authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""`NtkRecommendationCallback`: recommends, and if asked restricts to, the modules to adapt when a Trainer is made."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..errors import FileError, PeftLinearError
from ..report.writer import write_report
from ..selection.recommendation import JSON_NAME, Recommendation
from .calibration import calibration_batches
from .restrict import adapted_modules, adapter_name_of, checkpoint_modules, require_modules, restrict_adapter
from .workflow import recommend_modules


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
    - "restrict": also takes the adapter off the modules that were not chosen (their base layers come back and
      `target_modules` is rewritten), so that they do not train and are not saved.

    **Resuming.** The choice is read from the checkpoint's adapter_config.json, not made again. Which checkpoint will
    be resumed is not known when the Trainer is made, so it is looked up in this order: `resume_from_checkpoint` here,
    `args.resume_from_checkpoint`, the last checkpoint in `args.output_dir`. A new run into an old `output_dir`
    therefore repeats the old choice (a warning says so): pass `resume_from_checkpoint=False`, or another folder, to
    choose anew. When training begins the modules are compared with the choice again, and with the checkpoint.

    **Logging.** At the start of training the summary (`ntk_modules`, `ntk_parameters`, `ntk_condition_number`,
    `ntk_predicted_loss`, …) is entered into the Trainer's log history, and added to the first logs for callbacks that
    come after this one.

    **Several processes.** The main process computes and sends the others its choice; all restrict to it.

    Args:
        data: Batches (an iterable of dicts, a DataLoader), or examples (a dataset or a list of features) that
            `data_collator` makes into batches.
        budget: As for `recommend`.
        action: "report" or "restrict".
        criterion, ridge, strategy, seed: As for `recommend`.
        data_collator, examples, batch_size: As for `training.calibration.calibration_batches`.
        adapter_name: Default: the active adapter.
        resume_from_checkpoint: A checkpoint's folder; True: the last one in `output_dir`; False: none.
        **options: Other arguments of `recommend_modules` and `compute_ntk` (`space`, `rank`, `outputs`, `steps`, …).

    Raises:
        PeftLinearError: when the Trainer is made: whatever `recommend_modules` refuses; "restrict" with a model that
            has no LoRA adapter or with an optimizer that exists already. When training begins: "restrict" in a
            callback that was added later (`trainer.add_callback`), or a model that is not the restricted one
            (`model_init`).
    """

    def __init__(
        self,
        data: Any,
        budget: int | float | str,
        action: str = "report",
        *,
        criterion: str = "default-by-evidence",
        ridge: float | None = None,
        strategy: str = "greedy",
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
        self.data = data
        self.budget = budget
        self.action = action
        self.adapter_name = adapter_name
        self.resume_from_checkpoint = resume_from_checkpoint
        self.recommendation: Recommendation | None = None  # None before, and after a resume without a saved one
        self.modules: tuple[str, ...] = ()  # the choice, from the kernels or from the checkpoint
        self._choosing = {"criterion": criterion, "ridge": ridge, "strategy": strategy, "seed": seed, **options}
        self._sampling = {
            "data_collator": data_collator,
            "examples": examples,
            "batch_size": batch_size,
            "seed": seed,
        }
        self._ready = False
        self._pending: dict[str, float] = {}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Chooses, and restricts if asked."""
        model = kwargs["model"]
        if self.action == "restrict":
            adapter = adapter_name_of(model, self.adapter_name)
            if kwargs.get("optimizer") is not None:
                raise PeftLinearError(
                    "an optimizer was passed to the Trainer; it would go on training the modules that are not chosen. "
                    "Restrict before it is made, with recommend_modules(...).to_config(), or let the Trainer make it"
                )
            self._choose(args, state, model, kwargs.get("processing_class"))
            restrict_adapter(model, self.modules, adapter)
        else:
            self._choose(args, state, model, kwargs.get("processing_class"))
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
        if self.recommendation is not None:
            self._pending = summary(self.recommendation)
            state.log_history.append({**self._pending, "step": state.global_step})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the summary to the first logs."""
        if logs is not None:
            logs.update(self._pending)
            self._pending = {}

    def _choose(self, args: TrainingArguments, state: TrainerState, model: torch.nn.Module, processing: Any) -> None:
        checkpoint = self._checkpoint(args)
        output = Path(args.output_dir or ".")
        if checkpoint is not None and self._recall(output, model, checkpoint):
            return
        candidates: dict[str, Any] = {}
        if isinstance(model, PeftModel):
            adapter = adapter_name_of(model, self.adapter_name)
            config: Any = model.peft_config[adapter]
            candidates["targets"] = list(adapted_modules(model, adapter))
            candidates |= {key: getattr(config, f) for key, f in (("rank", "r"), ("lora_alpha", "lora_alpha"))}
        candidates["distributed"] = False  # the main process decides alone; the others wait for its answer

        def compute() -> Recommendation:
            batches = calibration_batches(self.data, model, processing_class=processing, **self._sampling)
            found = recommend_modules(model, batches, self.budget, **{**candidates, **self._choosing})
            write_report(found, output)
            return found

        self.recommendation = on_main_process(compute, state.is_world_process_zero)
        self.modules = self.recommendation.modules

    def _require_checkpoint(self, model: PeftModel, checkpoint: Path, adapter: str) -> None:
        saved = checkpoint_modules(model, checkpoint, adapter)
        if set(saved) != set(self.modules):
            raise PeftLinearError(
                f"{checkpoint} holds an adapter on {', '.join(saved)}, but {', '.join(self.modules)} were chosen; "
                f"pass resume_from_checkpoint={os.fspath(checkpoint)!r} to NtkRecommendationCallback"
            )

    def _recall(self, output: Path, model: torch.nn.Module, checkpoint: str) -> bool:
        """Takes the choice of an earlier run; false where there is none to take."""
        earlier = Recommendation.load(output) if (output / JSON_NAME).is_file() else None
        if self.action == "report":
            self.recommendation, self.modules = earlier, earlier.modules if earlier else ()
            return earlier is not None
        assert isinstance(model, PeftModel)
        self.modules = checkpoint_modules(model, checkpoint, self.adapter_name)
        if earlier is not None and set(earlier.modules) == set(self.modules):
            self.recommendation = earlier
        return True

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
                "resumed. To choose anew pass resume_from_checkpoint=False to NtkRecommendationCallback."
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
        "ntk_score": float(rec.settings.get("set_score", float("nan"))),
    }
    if chosen is not None:
        values["ntk_condition_number"] = chosen.condition_number(rec.ridge)
        values["ntk_effective_dimension"] = chosen.effective_dimension(rec.ridge)
    for key in ("loss", "accuracy", "distance", "leave_one_out_accuracy", "leave_one_out_squared_loss"):
        if key in rec.predicted:
            values[f"ntk_predicted_{key}"] = float(rec.predicted[key])
    return values


def on_main_process(compute: Callable[[], Recommendation], is_main: bool) -> Recommendation:
    """What `compute` returns on the main process, on every process; an error there is raised on all of them."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return compute()
    message: list[Any] = [None]
    if is_main:
        try:
            message = [compute()]
        except Exception as error:
            message = [error]
    torch.distributed.broadcast_object_list(message, src=0)
    if isinstance(message[0], Exception):
        raise message[0]
    return message[0]
