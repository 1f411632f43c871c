# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The record of a model's ProximalLoRA adapters, and how it is found.

It is an attribute of the adapted model (not of the tuner around it, which `inject_adapter_in_model` discards) and has
weak references to the LoRA layers. All live records are in one weak set, so that collected models, deleted adapters
and replaced layers need no deregistration. deepcopy and pickle copy the record.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ...errors import PeftLinearError
from .config import ProximalLoraConfig
from .reference import ProximalReference
from .strength import Schedule
from .tracked import TrackedAdapter


_ATTRIBUTE = "_proximal_lora"


class LiveRecords:
    """The records that are alive, held weakly. Threads may make models while others step optimizers.

    An iteration sees the records there were when it began: a change replaces the tuple of references.
    """

    def __init__(self) -> None:
        self._references: tuple[weakref.ref[ProximalRecord], ...] = ()
        self._lock = threading.Lock()

    def add(self, record: ProximalRecord) -> None:
        """Adds a record, once."""
        with self._lock:
            alive = tuple(reference for reference in self._references if reference() not in (None, record))
            self._references = (*alive, weakref.ref(record))

    def clear(self) -> None:
        """Forgets all records."""
        with self._lock:
            self._references = ()

    def __iter__(self) -> Iterator[ProximalRecord]:
        for reference in self._references:
            record = reference()
            if record is not None:
                yield record

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        return any(True for _ in self)


live_records = LiveRecords()


class ProximalRecord:
    """The ProximalLoRA adapters of one model, by name."""

    def __init__(self) -> None:
        self.adapters: dict[str, TrackedAdapter] = {}
        live_records.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        live_records.add(self)


def track_adapter(model: nn.Module, adapter_name: str, config: ProximalLoraConfig) -> TrackedAdapter:
    """Records an adapter that was just injected into `model`; its anchor is the present factors."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    carrying = {
        name: layer
        for name, layer in layers.items()
        if adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A
    }
    record = model.__dict__.get(_ATTRIBUTE)
    if record is None:
        record = ProximalRecord()
        setattr(model, _ATTRIBUTE, record)
    forget_adapter(model, adapter_name)
    record.adapters[adapter_name] = TrackedAdapter(adapter_name, config, carrying)
    return record.adapters[adapter_name]


def forget_adapter(model: nn.Module, adapter_name: str | None = None) -> None:
    """Drops the record of one adapter of `model`, or of all."""
    record = model.__dict__.get(_ATTRIBUTE)
    if record is None:
        return
    for name in [adapter_name] if adapter_name is not None else list(record.adapters):
        adapter = record.adapters.pop(name, None)
        if adapter is not None:
            adapter.disarm()
    if adapter_name is None:
        delattr(model, _ATTRIBUTE)


def find_records(model: nn.Module) -> list[ProximalRecord]:
    """The records of `model` and all its submodules, in any wrapper (PeftModel, DDP, torch.compile)."""
    return [module.__dict__[_ATTRIBUTE] for module in model.modules() if _ATTRIBUTE in module.__dict__]


def find_adapters(model: nn.Module, adapter_name: str | None = None) -> list[TrackedAdapter]:
    """The ProximalLoRA adapters of `model`: the named one, or all that are active.

    Raises:
        PeftLinearError: there is none; the message lists the existing ones.
    """
    adapters = [adapter for record in find_records(model) for adapter in record.adapters.values()]
    if adapter_name is None:
        found = [t for t in adapters if any(t.name in layer.active_adapters for _, layer, _, _ in t.layers())]
    else:
        found = [tracked for tracked in adapters if tracked.name == adapter_name]
    if not found:
        wanted = "active ProximalLoRA adapter" if adapter_name is None else f"ProximalLoRA adapter {adapter_name!r}"
        raise PeftLinearError(
            f"{type(model).__name__} has no {wanted}; it has {sorted(t.name for t in adapters) or 'none'}. "
            "Make one with get_peft_model(model, ProximalLoraConfig(...))"
        )
    return found


def reset_proximal_anchor(model: nn.Module, adapter_name: str | None = None) -> None:
    """Makes the present factors of the named adapter (default: of every active one) its anchor.

    For an adapter whose weights were set by hand after it was made, or to continue training a loaded adapter with the
    loaded adapter, not the pretrained model, as the anchor.

    Raises:
        PeftLinearError: `model` has no such ProximalLoRA adapter.
    """
    with torch.no_grad():
        for adapter in find_adapters(model, adapter_name):
            adapter.provisional = False
            adapter.capture()


def set_proximal_schedule(model: nn.Module, schedule: Schedule | None, adapter_name: str | None = None) -> None:
    """Sets a function as the schedule of λ of the named adapter (default: of every active one).

    Args:
        model: the model, or a wrapper of it.
        schedule: `schedule(t)` is the factor by which `proximal_lambda` (and each value of `proximal_lambda_pattern`)
            is multiplied in the step after t optimizer steps, a finite number >= 0. It replaces `proximal_schedule`;
            `None` restores that. A function cannot be saved with the adapter: set it again when a run is resumed; the
            position t is restored from the optimizer's state.
        adapter_name: one adapter.

    Raises:
        PeftLinearError: `model` has no such ProximalLoRA adapter; at a step: `schedule` returned no such number.

    Example:
        >>> set_proximal_schedule(model, lambda t: 1.0 if t < 100 else 0.1)  # doctest: +SKIP
    """
    for adapter in find_adapters(model, adapter_name):
        adapter.strengths.schedule = schedule


def set_proximal_reference(model: nn.Module, reference: ProximalReference, adapter_name: str | None = None) -> None:
    """Sets what `proximal_space="function"` measures distance by, for the named adapter (default: every active one).

    It is saved with the adapter, in `proximal_reference.safetensors`, and found again when that is loaded.

    Args:
        model: the model, or a wrapper of it.
        reference: of `collect_reference`, with statistics of all modules of the adapter.
        adapter_name: one adapter.

    Raises:
        PeftLinearError: `model` has no such ProximalLoRA adapter, it adapts something else than linear layers, or the
            reference is of another model.
    """
    if not isinstance(reference, ProximalReference):
        raise PeftLinearError(
            f"the reference must be a ProximalReference, got {type(reference).__name__}; call "
            "collect_reference(model, batches) or ProximalReference.load(path)"
        )
    for adapter in find_adapters(model, adapter_name):
        adapter.set_reference(reference)
