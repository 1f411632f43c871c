# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Model cards that say which modules are adapted: written wherever peft, transformers or TRL write a card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from peft import PeftModel
from transformers import Trainer

from ..report.model_card import update_model_card
from ..report.recommendation import Recommendation
from ..tuners.proximal_lora.peft_compat import wrap
from .restrict import adapted_modules, adapter_name_of


# Kept here and not on the models: what a model's cards say, and of which of its adapters.
_SECTIONS: WeakKeyDictionary[PeftModel, tuple[Recommendation, str]] = WeakKeyDictionary()


def keep_in_model_cards(model: PeftModel, recommendation: Recommendation, adapter_name: str | None = None) -> None:
    """From now on every model card written for `model` has a section on the recommendation, once.

    That is: `save_pretrained` and `push_to_hub` of the model, and `create_model_card` and `push_to_hub` of every
    Trainer that is loaded by now, TRL's included. What else the card says is left as it is. There is no hook for this
    in peft or transformers: the methods that write cards are wrapped, and do as before for every other model.
    `NtkRecommendationCallback` calls this; call it yourself where you made the model with `Recommendation.to_config`.

    Raises:
        TargetError: the model is no PeftModel, has no such adapter, or several are active.
    """
    _SECTIONS[model] = (recommendation, adapter_name_of(model, adapter_name))
    wrap(PeftModel, "create_or_update_model_card", _after_card)
    wrap(PeftModel, "_upload_modified_files", _before_upload)
    for trainer in _and_subclasses(Trainer):
        if "create_model_card" in vars(trainer):
            wrap(trainer, "create_model_card", _after_trainer_card)


def _after_card(original: Callable, self: PeftModel, output_dir: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, output_dir, *args, **kwargs)
    _write_section(self, output_dir)
    return result


def _before_upload(original: Callable, self: PeftModel, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
    # push_to_hub puts a card of transformers' in the place of the one that save_pretrained wrote
    _write_section(self, working_dir)
    return original(self, working_dir, *args, **kwargs)


def _after_trainer_card(original: Callable, self: Trainer, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    if self.is_world_process_zero() and self.args.output_dir:
        _write_section(self.accelerator.unwrap_model(self.model), self.args.output_dir)
    return result


def _write_section(model: Any, folder: Any) -> None:
    card = Path(folder) / "README.md"
    if isinstance(model, PeftModel) and model in _SECTIONS and card.is_file():
        recommendation, adapter_name = _SECTIONS[model]
        if adapter_name in model.peft_config:
            update_model_card(card, recommendation, adapted_modules(model, adapter_name))


def _and_subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _and_subclasses(child)
