# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The tuner: LoRA's own, which also records each adapter when it is made and drops the record when it is deleted."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from torch import nn

from .config import ProximalLoraConfig, is_auto
from .peft_compat import as_lora
from .state import find_adapters, forget_adapter, track_adapter
from .strength import check_patterns


class ProximalLoraModel(LoraModel):
    """LoRA with a proximal term; made by `get_peft_model(model, ProximalLoraConfig(...))`.

    The layers are LoRA's layers, quantised back ends included, and the forward pass is LoRA's. The term acts in the
    optimizer's step (see `peft_linear.attach_proximal`), on the adapters that this class records.

    Args:
        model (`torch.nn.Module`): the model to adapt.
        config (`ProximalLoraConfig`): the configuration of the adapter, or a dict of them by adapter name.
        adapter_name (`str`): the name of the adapter.
        low_cpu_mem_usage (`bool`): make the adapter on the meta device, to be loaded later.
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Makes the adapter's layers as LoRA does, then records the initial factors."""
        config = self.peft_config[adapter_name]
        if is_auto(getattr(config, "proximal_lambda", None)):  # which becomes a number for this model alone
            config = self.peft_config[adapter_name] = copy.copy(config)
        if isinstance(config, ProximalLoraConfig):
            check_patterns(config, adapter_name, model)
        with as_lora(config):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        if isinstance(config, ProximalLoraConfig):
            track_adapter(model, adapter_name, config)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes the adapter and its record."""
        super().delete_adapter(adapter_name)
        forget_adapter(self.model, adapter_name)

    def add_weighted_adapter(  # type: ignore[override]
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """As LoRA's; the combined weights are anchored as loaded weights without an anchor are: at a zero product."""
        exists = adapter_name in self.peft_config
        super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        if not exists:
            with torch.no_grad():
                for adapter in find_adapters(self.model, adapter_name):
                    adapter.capture_continuing()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        forget_adapter(self.model)
        return model

    @classmethod
    def _convert_state_dict_for_initial_model(cls, peft_model, peft_config, path, output_state_dict, kwargs):
        # peft resets the initialisation of the adapter at `path` for LORA by name only; without that, loading it would
        # subtract the decomposition from the base weights a second time.
        peft_config.init_lora_weights = True
        peft_config.save_pretrained(path)
        return super()._convert_state_dict_for_initial_model(peft_model, peft_config, path, output_state_dict, kwargs)
