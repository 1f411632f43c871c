# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""ProximalLoRA as a method of peft: importing this package registers the adapter type `PROXIMAL_LORA`."""

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import register_peft_method

from . import peft_compat
from .config import ProximalLoraConfig
from .export import export_lora
from .model import ProximalLoraModel
from .peft_type import PROXIMAL_LORA
from .reference import ProximalReference
from .state import reset_proximal_anchor, set_proximal_reference, set_proximal_schedule


__all__ = [
    "PROXIMAL_LORA",
    "ProximalLoraConfig",
    "ProximalLoraModel",
    "ProximalReference",
    "export_lora",
    "reset_proximal_anchor",
    "set_proximal_reference",
    "set_proximal_schedule",
]


def _register() -> None:
    """Registers the adapter type. Importing the package again (a reload, a second copy) replaces the entry."""
    for mapping in (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
    ):
        mapping.pop(PROXIMAL_LORA, None)
    register_peft_method(
        name="proximal_lora",
        config_cls=ProximalLoraConfig,
        model_cls=ProximalLoraModel,
        prefix=ProximalLoraModel.prefix,  # LoRA's: tensor names stay lora_A and lora_B
        is_mixed_compatible=True,
    )
    peft_compat.apply_all()


_register()
