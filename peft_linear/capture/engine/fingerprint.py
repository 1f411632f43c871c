# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""What identifies a computation: model, data, arguments and versions; a folder is resumed by its own run only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...errors import FileError
from ..batches import Batch
from ..targets import base_model
from .digests import digest, modules_digest


VERSIONS = ("torch", "transformers", "peft", "peft-linear")


def fingerprint(model: nn.Module, batches: Iterable[Batch], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """sha256 of the model's numbers, of its configuration and of every batch; arguments and versions as they are.

    Two runs with equal fingerprints compute the same kernels. Cost: one pass over the parameters' bytes.
    """
    root = base_model(model)
    named = [*model.named_parameters(), *model.named_buffers()]
    return {
        "model": {
            "class": type(root).__name__,
            "parameters and buffers": _checksum(named),
            "configuration": _checksum_of_json(_configuration(root)),
            "modules": modules_digest(root),
            "adapters": _checksum_of_json(_adapters(root)),
            "device": named[0][1].device.type if named else "cpu",
        },
        "argument": json.loads(json.dumps(dict(arguments))),
        "batch": {str(number): _checksum_of_batch(batch) for number, batch in enumerate(batches)},
        "version": {name: version(name) for name in VERSIONS},
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any], places: tuple[str, str], most: int = 5) -> list[str]:
    """What two fingerprints do not share, in words: "argument rank (8 there, 4 here)", "batch 3"."""
    found = []
    for kind in ("model", "argument", "batch", "version"):
        old, new = one.get(kind, {}), other.get(kind, {})
        for key in dict.fromkeys([*old, *new]):
            if old.get(key) == new.get(key):
                continue
            text = f"the model's {key}" if kind == "model" else f"{kind} {key}"
            if not (_is_checksum(old.get(key)) or _is_checksum(new.get(key))):
                text += f" ({_short(old.get(key))} {places[0]}, {_short(new.get(key))} {places[1]})"
            found.append(text)
    return [*found[:most], f"{len(found) - most} more"] if len(found) > most else found


def _checksum(named: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _checksum_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _checksum_of_batch(batch: Batch) -> str:
    named = dict(batch.inputs) if batch.labels is None else {**batch.inputs, "(labels)": batch.labels}
    parts = []
    for key, value in sorted(named.items(), key=lambda item: str(item[0])):
        described = digest(value)
        if described is None:
            raise FileError(
                f"a batch has {key!r} of type {type(value).__name__}, whose content cannot be told from another's, so "
                "a folder cannot be resumed with it, nor processes compared; pass tensors, numbers and lists of them"
            )
        parts.append((str(key), described))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _configuration(root: nn.Module) -> dict[str, Any]:
    """The configuration, without names and versions, which say where weights are from, not what they compute."""
    config = getattr(root, "config", None)
    values: dict[str, Any] = getattr(config, "to_dict", dict)()
    kept = {key: value for key, value in values.items() if not key.startswith("_") and key != "transformers_version"}
    return kept | {"attention": getattr(config, "_attn_implementation", None)}


def _adapters(root: nn.Module) -> dict[str, Any]:
    return {
        name: [list(layer.active_adapters), layer.disable_adapters, layer.merged, getattr(layer, "scaling", None)]
        for name, layer in root.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }


def _is_checksum(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64


def _short(value: Any, most: int = 120) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}…"
