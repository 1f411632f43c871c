# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Changes to peft and transformers where they test for `PeftType.LORA`, or have no hook for what a plugin must do.

Every function here makes one change, does not affect adapters of other types, and can be applied again.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from peft import PeftModel, PeftType
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, save_and_load
from torch import nn
from transformers.integrations import PeftAdapterMixin

from .anchors import ANCHOR_NAME, AnchorSource, save_anchors
from .config import ProximalLoraConfig
from .peft_type import PROXIMAL_LORA
from .reference import REFERENCE_NAME
from .state import find_records, track_adapter
from .strength import check_patterns
from .tracked import TrackedAdapter


@contextmanager
def as_lora(config: Any) -> Iterator[None]:
    """Within the block, a ProximalLoRA configuration has type LORA (conversion of MoE targets, guard for Mamba)."""
    if getattr(config, "peft_type", None) != PROXIMAL_LORA:
        yield
        return
    config.peft_type = PeftType.LORA
    try:
        yield
    finally:
        config.peft_type = PROXIMAL_LORA


def apply_all() -> None:
    """Applies every change below."""
    _read_and_write_state_as_lora()
    _hotswap_our_adapters()
    _mix_our_adapters()
    _tag_our_adapters_as_lora()
    _save_anchor_with_adapter()
    _load_anchor_with_adapter()


def _read_and_write_state_as_lora() -> None:
    """Reading and writing an adapter's state dict has special cases for LORA: shards, experts, biases.

    Many modules of peft import the two functions by name, so they are replaced in each of them.
    """

    def call_as_lora(original: Callable, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(original).bind(*args, **kwargs)
        call.apply_defaults()
        configs = getattr(call.arguments["model"], "peft_config", {})
        with as_lora(configs.get(call.arguments["adapter_name"])):
            return original(*args, **kwargs)

    for name in ("get_peft_model_state_dict", "set_peft_model_state_dict"):
        current = getattr(save_and_load, name)
        holders = [m for key, m in list(sys.modules.items()) if key.split(".")[0] == "peft" and m is not None]
        for module in holders:
            if module.__dict__.get(name) is current:
                wrap(module, name, call_as_lora)


class _FoundAsLora(dict):
    """A table by adapter type in which ours is looked up as LORA, without being listed."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(PeftType.LORA if key == PROXIMAL_LORA else key)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(PeftType.LORA if key == PROXIMAL_LORA else key)


def _hotswap_our_adapters() -> None:
    """Hotswapping looks up, by type, the settings that must be equal."""
    module = _optional("peft.utils.hotswap")
    if module is not None:
        module.CONFIG_KEYS_TO_CHECK = _FoundAsLora(module.CONFIG_KEYS_TO_CHECK)


def _mix_our_adapters() -> None:
    """PeftMixedModel has a tuple of the types it accepts, and makes the layers without the type's own tuner."""
    package, module = _optional("peft.tuners.mixed"), _optional("peft.tuners.mixed.model")
    if package is None or module is None:
        return
    if PROXIMAL_LORA not in module.COMPATIBLE_TUNER_TYPES:
        module.COMPATIBLE_TUNER_TYPES = package.COMPATIBLE_TUNER_TYPES = (
            *module.COMPATIBLE_TUNER_TYPES,
            PROXIMAL_LORA,
        )

    def inject_adapter(original: Callable, self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any):
        config = self.peft_config[adapter_name]
        if isinstance(config, ProximalLoraConfig):
            check_patterns(config, adapter_name, model)
        with as_lora(config):
            original(self, model, adapter_name, *args, **kwargs)
        if isinstance(config, ProximalLoraConfig):
            track_adapter(model, adapter_name, config)

    wrap(module.MixedModel, "inject_adapter", inject_adapter)


def _tag_our_adapters_as_lora() -> None:
    """Model cards on the Hub get the tag `lora` for LORA only; our adapters are LoRA adapters to every consumer."""

    def tags(original: Callable, self: PeftModel) -> list[str]:
        found = original(self)
        return [*found, "lora"] if self.active_peft_config.peft_type == PROXIMAL_LORA else found

    if hasattr(PeftModel, "_get_peft_specific_model_tags"):
        wrap(PeftModel, "_get_peft_specific_model_tags", tags)


def _save_anchor_with_adapter() -> None:
    """`save_pretrained` writes the weights and the configuration, and now the anchor beside them.

    An anchor that is there is removed before: killed in between, no anchor is left that looks like the new weights'.
    """

    def save_pretrained(original: Callable, self: PeftModel, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(original).bind(self, save_directory, *args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        names = given["selected_adapters"] or list(self.peft_config)
        tracked = {name: adapter for name in names if (adapter := _tracked(self, name)) is not None}
        refused = Path(save_directory).is_file() or not set(names) <= set(self.peft_config)
        if refused or not tracked or not given["is_main_process"]:
            return original(self, save_directory, *args, **kwargs)
        converted = given["path_initial_model_for_weight_conversion"] is not None
        # read now, since the file that they are read from may be the one that is removed
        anchors = {n: t.anchors() for n, t in tracked.items() if t.worth_saving and not converted}
        folders = {n: Path(save_directory) if n == "default" else Path(save_directory) / n for n in tracked}
        references = {n: t.reference() for n, t in tracked.items() if t.has_reference()}
        for folder in folders.values():
            for beside in (ANCHOR_NAME, REFERENCE_NAME):
                (folder / beside).unlink(missing_ok=True)
        result = original(self, save_directory, *args, **kwargs)
        weights_name = SAFETENSORS_WEIGHTS_NAME if given["safe_serialization"] else WEIGHTS_NAME
        for name, values in anchors.items():
            save_anchors(folders[name], values, weights_name)
        for name, reference in references.items():
            reference.save(folders[name] / REFERENCE_NAME)
        return result

    wrap(PeftModel, "save_pretrained", save_pretrained)


def _load_anchor_with_adapter() -> None:
    """Loading sets the weights without calling the tuner; now the anchor saved with them is loaded too.

    Both entry points are covered: peft's (`from_pretrained`, the Trainer's resume) and transformers' `load_adapter`.
    """
    hub_names = set(inspect.signature(hf_hub_download).parameters) - {"repo_id", "filename"}

    def load_adapter(original: Callable, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        call = inspect.signature(original).bind(self, *args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        path = given.get("model_id", given.get("peft_model_id"))
        if path is None:  # transformers, called by its from_pretrained
            path = getattr(given.get("load_config"), "pretrained_model_name_or_path", None)
        adapter = _tracked(self, given["adapter_name"] or "default")
        if adapter is not None and path is not None:
            extra = {**(given.get("adapter_kwargs") or {}), **given.get("kwargs", {}), **given}
            hub = {key: value for key, value in extra.items() if key in hub_names and value is not None}
            adapter.loaded_from(AnchorSource(str(path), hub), trainable=bool(given.get("is_trainable", False)))
        return result

    wrap(PeftModel, "load_adapter", load_adapter)
    wrap(PeftAdapterMixin, "load_adapter", load_adapter)


def _tracked(model: nn.Module, adapter_name: str) -> TrackedAdapter | None:
    for record in find_records(model):
        if adapter_name in record.adapters:
            return record.adapters[adapter_name]
    return None


def wrap(owner: Any, name: str, around: Callable) -> None:
    """Replaces `owner.name` by `around(original, ...)`; a wrapper of an earlier import is replaced, not wrapped."""
    original = getattr(owner, name)
    original = getattr(original, "_peft_linear_original", original)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    wrapper._peft_linear_original = original  # type: ignore[attr-defined]
    setattr(owner, name, wrapper)


def _optional(name: str) -> Any:
    """The module, or None in a version of peft without it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None
