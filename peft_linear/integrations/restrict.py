# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Takes the adapter off modules of a PeftModel that were not chosen, so that nothing of them trains or is saved."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ..capture.layers import layer_kind
from ..capture.targets import base_model
from ..errors import FileError, PeftLinearError, TargetError
from ..tuners.proximal_lora.state import find_records


def adapter_name_of(model: nn.Module, adapter_name: str | None = None) -> str:
    """The adapter meant: the named one, else the only active one.

    Raises:
        TargetError: the model is no PeftModel, has no such adapter, or several are active.
    """
    if not isinstance(model, PeftModel):
        raise TargetError(
            f"{type(model).__name__} carries no adapter to restrict; wrap it with get_peft_model(model, config) first"
        )
    if adapter_name is None:
        active = list(model.active_adapters)
        if len(active) != 1:
            raise TargetError(f"{len(active)} adapters are active ({', '.join(active)}); say which with adapter_name")
        return active[0]
    if adapter_name not in model.peft_config:
        raise TargetError(f"there is no adapter {adapter_name!r}; there are: {', '.join(model.peft_config)}")
    return adapter_name


def adapted_modules(model: PeftModel, adapter_name: str) -> dict[str, LoraLayer]:
    """The layers with a LoRA adapter of this name, by their name in the base model, in model order."""
    return {
        name: module
        for name, module in base_model(model).named_modules()
        if layer_kind(module) is not None and isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }


def restrict_adapter(model: PeftModel, keep: Collection[str], adapter_name: str | None = None) -> tuple[str, ...]:
    """Removes an adapter from every layer that is not in `keep`, as if it had never been targeted.

    The base layer takes the place of an adapted layer that carries no other adapter, and `target_modules` of the
    adapter's config becomes the full names of what is left, so that trainable parameters, an optimizer built later,
    what is saved and the config agree (peft's EVA does the same with modules of rank 0). Adapted embeddings and
    parameters, and `modules_to_save`, stay.

    Args:
        model: Changed in place.
        keep: Full names of modules in the base model.
        adapter_name: Default: the active one.

    Returns:
        The names of the modules that lost the adapter.

    Raises:
        TargetError: `keep` is empty or names a module that does not carry the adapter.
    """
    adapter_name = adapter_name_of(model, adapter_name)
    adapted = adapted_modules(model, adapter_name)
    unknown = sorted(set(keep) - set(adapted))
    if unknown or not keep:
        raise TargetError(
            f"cannot keep {', '.join(unknown) or 'nothing'}: adapter {adapter_name!r} is on {', '.join(adapted)}"
        )
    removed = tuple(name for name in adapted if name not in keep)
    root = base_model(model)
    for name in removed:
        layer = adapted[name]
        layer.set_adapter([other for other in layer.active_adapters if other != adapter_name])
        layer.delete_adapter(adapter_name)  # not active any more, so peft activates no other in its place
        if not layer.lora_A and not layer.lora_embedding_A:
            parent, _, child = name.rpartition(".")
            setattr(root.get_submodule(parent), child, layer.get_base_layer())
    config: Any = model.peft_config[adapter_name]
    config.target_modules = _exact_targets(root, adapter_name)
    for field in ("layers_to_transform", "layers_pattern"):  # names in full need no further choice
        setattr(config, field, None)
    tuner: Any = model.base_model
    tuner.targeted_module_names = [name for name in tuner.targeted_module_names if name not in removed]
    for record in find_records(model):
        for tracked in record.adapters.values():
            tracked.arm()  # removed layers must be dropped from its tracking
    return removed


def checkpoint_modules(
    model: PeftModel, checkpoint: str | os.PathLike, adapter_name: str | None = None
) -> tuple[str, ...]:
    """The modules of `model` that the adapter saved in a checkpoint's folder is on, by its adapter_config.json.

    Raises:
        FileError: the folder holds no adapter_config.json.
        TargetError: the checkpoint's adapter is on a module that does not carry the model's, or on none.
    """
    adapter_name = adapter_name_of(model, adapter_name)
    folders = [os.fspath(checkpoint), os.path.join(checkpoint, adapter_name)]
    folder = next((f for f in folders if os.path.isfile(os.path.join(f, "adapter_config.json"))), None)
    if folder is None:
        raise FileError(f"there is no adapter_config.json in {folders[0]!r}, so it is not an adapter checkpoint")
    config: Any = PeftConfig.from_pretrained(folder)
    adapted = adapted_modules(model, adapter_name)
    modules = base_model(model).named_modules()
    linear = [name for name, module in modules if layer_kind(module) is not None]
    found = tuple(name for name in linear if check_target_module_exists(config, name))
    without = [name for name in found if name not in adapted]
    if without or not found:
        raise TargetError(
            f"the adapter in {folder!r} is on {', '.join(without) or config.target_modules}, which adapter "
            f"{adapter_name!r} of this model is not: it is on {', '.join(adapted)}. Make the model with the config of "
            "the run that is resumed"
        )
    return found


def require_modules(model: nn.Module, modules: Collection[str], adapter_name: str) -> None:
    """Raises `PeftLinearError` unless the adapter is on exactly these modules."""
    present = set(adapted_modules(model, adapter_name)) if isinstance(model, PeftModel) else set()
    if present != set(modules):
        raise PeftLinearError(
            f"the model that is about to train has adapter {adapter_name!r} on {len(present)} modules, but "
            f"{len(modules)} were chosen: it was replaced or changed after the Trainer was made (model_init does "
            "that). Choose before the Trainer is made, with recommend_modules(...).to_config()"
        )


def _exact_targets(root: nn.Module, adapter_name: str) -> set[str] | str:
    """`target_modules` that match exactly the modules which carry the adapter; a regular expression where names end
    alike."""
    names = [name for name, _ in root.named_modules()]
    carrying = {
        name
        for name, module in root.named_modules()
        if isinstance(module, LoraLayer) and (adapter_name in module.lora_A or adapter_name in module.lora_embedding_A)
    }
    if any(other.endswith(f".{name}") for name in carrying for other in names):
        return "|".join(re.escape(name) for name in sorted(carrying))
    return carrying
